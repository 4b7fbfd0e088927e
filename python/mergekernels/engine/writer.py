"""Where a job writes: tiles to planned offsets, a digest in order, a record at the end."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .context import Context, Worker
from .digesting import OrderedDigest
from .layout import PlacedTensor
from .receipts import TensorRecord
from .unit import Unit

__all__ = ["Target", "Writer"]


@dataclass(frozen=True)
class Target:
    """Where a job writes.

    passed : told of input bytes read for the first time. sync, done : told when a background sync of the unit is due,
    and when its last tensor is written.
    """

    unit: Unit
    placed: PlacedTensor
    passed: Callable[[int], None]
    sync: Callable[[Unit], None]
    done: Callable[[Unit], None]


class Writer:
    """The output side of a job: tiles to planned offsets, digest in order, record at the end."""

    def __init__(self, target: Target, tile_bytes: int, tiles: int) -> None:
        self._target = target
        self._tile_bytes = tile_bytes
        self._digest = OrderedDigest(tiles)

    def put(self, worker: Worker, index: int, data: memoryview) -> None:
        """Writes tile `index`, which is `data`, and hashes what can be hashed."""
        unit, placed = self._target.unit, self._target.placed
        if unit.write(data, placed.offset + index * self._tile_bytes):
            self._target.sync(unit)

        def again(other: int) -> memoryview:
            start = other * self._tile_bytes
            size = min(self._tile_bytes, placed.nbytes - start)
            return unit.read_back(worker.tiles.out[:size], placed.offset + start)

        self._digest.add(index, data, again)

    def digest(self) -> str:
        """The SHA-256 of all tiles, after the last."""
        return self._digest.hexdigest() if self._target.placed.nbytes else hashlib.sha256(b"").hexdigest()

    def finish(self, ctx: Context, statistics: dict[str, Any], warnings: list[str]) -> None:
        """Hands the tensor's record to the unit."""
        placed = self._target.placed
        tensor = ctx.plan.merge.tensors[placed.index]
        record = TensorRecord(tensor.name, tensor.dtype.name, tensor.shape, self.digest(), statistics, tuple(warnings))
        if self._target.unit.finish(record):
            self._target.done(self._target.unit)
