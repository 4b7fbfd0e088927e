"""What an earlier attempt left: receipts whose files still have their digests are kept, all else is done again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from ..errors import MergeError
from .context import Context, Worker
from .digests import file_sha256
from .fileops import read_exact
from .layout import OutputFile, PlacedTensor
from .receipts import Receipt, read_receipt
from .scheduler import Scheduler
from .staging import Staging

__all__ = ["finished_units"]


class _DigestJob:
    """Re-reads one tensor of a staged file."""

    want = 0
    least = 0
    granted = 0
    tiles = 1

    def __init__(self, ctx: Context, path: Path, fd: int, placed: PlacedTensor, digests: dict[str, str]) -> None:
        self._io = ctx.io
        self._path = path
        self._fd = fd
        self._placed = placed
        self._digests = digests
        self.name = placed.name
        self.weight = placed.nbytes
        self.moved = 0

    def open(self) -> None:
        """Nothing to take."""

    def run(self, worker: Worker, index: int) -> None:
        """The whole tensor, tile by tile."""
        digest = hashlib.sha256()
        memory = worker.tiles.out
        while self.moved < self._placed.nbytes:
            part = memory[: min(len(memory), self._placed.nbytes - self.moved)]
            read_exact(self._io, self._fd, part, self._placed.offset + self.moved, self._path)
            digest.update(part)
            self.moved += len(part)
        self._digests[self._placed.name] = digest.hexdigest()

    def advance(self) -> bool:
        """One pass."""
        return False


def finished_units(
    ctx: Context, staging: Staging, scheduler: Scheduler[Worker], tick: Callable[[int, str], None]
) -> list[Receipt]:
    """Receipts of units that need not be done again: readable, of this plan, and the file has their size and
    digests.
    """
    kept = []
    for file in ctx.plan.files:
        receipt = read_receipt(ctx.io, staging, file.name)
        if receipt is not None and _verify(ctx, staging, file, receipt, scheduler, tick):
            kept.append(receipt)
    return kept


def _verify(
    ctx: Context,
    staging: Staging,
    file: OutputFile,
    receipt: Receipt,
    scheduler: Scheduler[Worker],
    tick: Callable[[int, str], None],
) -> bool:
    path = staging.tree / file.name
    try:
        fd = ctx.io.open(path, 0)
    except OSError:
        return False
    try:
        if ctx.io.fstat(fd).st_size != file.size or receipt.size != file.size:
            return False
        header = bytearray(len(file.header))
        read_exact(ctx.io, fd, memoryview(header), 0, path)
        digests: dict[str, str] = {}
        scheduler.run([_DigestJob(ctx, path, fd, t, digests) for t in file.tensors], tick)
        recorded = {r.name: r.sha256 for r in receipt.tensors}
        order = [digests[t.name] for t in file.tensors]
        return (
            bytes(header) == file.header and digests == recorded and file_sha256(file.header, order) == receipt.sha256
        )
    except (OSError, MergeError):
        return False
    finally:
        ctx.io.close(fd)
