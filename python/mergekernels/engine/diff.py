"""Two checkpoints compared tensor by tensor, whoever wrote them."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from ..errors import ArgumentError
from ..formats.checkpoint import Checkpoint, TensorInfo
from .diffreport import FLOATS, TILE, DiffReport, TensorDiff, Work, describe
from .pool import Reader, for_each

__all__ = ["DiffReport", "TensorDiff", "diff"]

_TILES_PER_JOB = 32


def diff(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    rtol: float | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DiffReport:
    """Compares two checkpoints (folders or single safetensors files), tensor by tensor.

    rtol : tensors with ||a - b|| <= rtol ||a|| pass, whatever their dtypes; None asks for equal dtypes and bits.
    threads : readers; default as everywhere. progress : called with (bytes done, bytes in all) from this thread.
    Memory: two tiles of 2^19 elements per thread.

    Raises
    ------
    ArgumentError : rtol is negative or not a number. FormatError, InputError : a side is not a readable checkpoint.
    """
    from ..formats.checkpoint import open_checkpoint
    from .memory import default_threads

    if rtol is not None and not (math.isfinite(rtol) and rtol >= 0.0):
        raise ArgumentError(
            "rtol is not usable", code="diff.rtol", expected="a finite number of at least 0", got=repr(rtol)
        )
    started = time.monotonic()
    left, right = open_checkpoint(Path(a)), open_checkpoint(Path(b))
    names = sorted(left.tensors.keys() & right.tensors.keys(), key=str.encode)
    refused: list[TensorDiff] = []
    work: list[Work] = []
    for name in names:
        x, y = left.tensors[name], right.tensors[name]
        status = _why_not(x, y)
        if status is None:
            work.append(Work(x, y, math.prod(x.shape)))
        else:
            refused.append(TensorDiff(name, status, x.dtype.name, y.dtype.name, x.shape, y.shape))
    run = _Run(left, right, default_threads(threads), progress, sum(w.a.nbytes + w.b.nbytes for w in work))
    run.compare(work)
    run.norms(work)
    differing = [d for w in work if (d := describe(w, rtol)) is not None]
    tensors = tuple(sorted(refused + differing, key=lambda d: d.name.encode()))
    missing = tuple(sorted(left.tensors.keys() - right.tensors.keys(), key=str.encode))
    extra = tuple(sorted(right.tensors.keys() - left.tensors.keys(), key=str.encode))
    complete = not missing and not extra
    return DiffReport(
        a=os.fspath(a),
        b=os.fspath(b),
        rtol=rtol,
        identical=complete and not tensors,
        same=complete and all(d.within for d in tensors),
        compared=len(names),
        equal=len(names) - len(tensors),
        missing=missing,
        extra=extra,
        tensors=tensors,
        bytes_read=run.done,
        seconds=time.monotonic() - started,
    )


def _why_not(a: TensorInfo, b: TensorInfo) -> Literal["shape", "dtype"] | None:
    if a.shape != b.shape:
        return "shape"
    if a.dtype is not b.dtype and not (a.dtype.name in FLOATS and b.dtype.name in FLOATS):
        return "dtype"
    return None


class _Run:
    """The two passes over the tiles: compare all, then take the norm of A over the equal tiles of unequal tensors."""

    def __init__(
        self, a: Checkpoint, b: Checkpoint, threads: int, progress: Callable[[int, int], None] | None, total: int
    ) -> None:
        self._a, self._b = a, b
        self._threads = threads
        self._progress = progress
        self._total = total
        self._lock = threading.Lock()
        self.done = 0

    def compare(self, work: list[Work]) -> None:
        """Compares every tile; keeps what was found in those that differ."""
        jobs = (
            (w, range(t, min(t + _TILES_PER_JOB, w.num_tiles)))
            for w in work
            for t in range(0, w.num_tiles, _TILES_PER_JOB)
        )
        for_each(jobs, lambda drawn, reader: self._worker(drawn, reader, both=True), self._threads, self._tick)

    def norms(self, work: list[Work]) -> None:
        """Adds ||a||^2 of the tiles that are equal, in tensors that are not."""
        jobs: list[tuple[Work, range]] = []
        for w in work:
            # Only tensors with interpreted values have a norm.
            if w.tiles and next(iter(w.tiles.values()))[3] is not None:
                jobs.extend((w, range(t, t + 1)) for t in range(w.num_tiles) if t not in w.tiles)
        self._total += sum(_extent(w.a, w.elements, t[0])[1] for w, t in jobs)
        for_each(jobs, lambda drawn, reader: self._worker(drawn, reader, both=False), self._threads, self._tick)

    def _worker(self, jobs: Iterator[tuple[Work, range]], reader: Reader, both: bool) -> None:
        from .. import _cpu

        buffers = (_cpu.Buffer(TILE * 8), _cpu.Buffer(TILE * 8))
        memory = [memoryview(b).cast("B") for b in buffers]
        for w, tiles in jobs:
            for tile in tiles:
                start, nbytes_a = _extent(w.a, w.elements, tile)
                reader.read(self._a.files[w.a.file].path, memory[0][:nbytes_a], start, slot=0)
                count = nbytes_a // w.a.dtype.itemsize
                done = nbytes_a
                other, dtype = buffers[0].ptr, w.a.dtype.name
                if both:
                    start, nbytes_b = _extent(w.b, w.elements, tile)
                    reader.read(self._b.files[w.b.file].path, memory[1][:nbytes_b], start, slot=1)
                    other, dtype = buffers[1].ptr, w.b.dtype.name
                    done += nbytes_b
                found = _cpu.compare(buffers[0].ptr, w.a.dtype.name, other, dtype, count, not both)
                if found[0] or not both:
                    w.tiles[tile] = found
                with self._lock:
                    self.done += done

    def _tick(self) -> None:
        if self._progress is not None:
            self._progress(min(self.done, self._total), self._total)


def _extent(tensor: TensorInfo, elements: int, tile: int) -> tuple[int, int]:
    """Byte offset in the file, and bytes, of a tile."""
    first = tile * TILE
    size = tensor.dtype.itemsize
    return tensor.offset + first * size, min(TILE, elements - first) * size
