"""Two checkpoints compared tensor by tensor, whoever wrote them."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..errors import ArgumentError
from ..formats.checkpoint import Checkpoint, TensorInfo
from .pool import Reader, for_each

__all__ = ["DiffReport", "TensorDiff", "diff"]

_TILE = 128 * 4096  # elements; a power of two of canonical blocks, so that sums do not depend on it
_TILES_PER_JOB = 32
_FLOATS = ("BF16", "F16", "F32", "F64")

# differing, first, unbounded, max_ulp, max_ulp_at, max_abs, squares_diff, squares_a of `_cpu.compare`
_Comparison = tuple[int, int, int, "int | None", int, float, float, float]


@dataclass(frozen=True)
class TensorDiff:
    """How one tensor of both checkpoints differs.

    status : "differs" (shapes equal, values compared), "shape" or "dtype" (values cannot be compared).
    differing : elements whose bits differ (whose exact values differ, between two dtypes). first, first_index : flat
        index and multi-index of the first of them.
    max_ulp : largest difference in units in the last place of the dtype with the shorter mantissa, the other side
        rounded to it (so 0 means that rounding gives the same); plain distance for integers; NaN left out; None where
        values are not interpreted. max_ulp_index : where, None for 0.
    max_abs : largest |a - b| of finite pairs. relative_error : ||a - b|| / ||a|| (Frobenius) over the finite pairs;
        infinite if an unequal pair has a NaN or an infinity (`unbounded` counts those); None where values are not
        interpreted.
    within : the relative error is at most rtol.
    """

    name: str
    status: Literal["differs", "shape", "dtype"]
    dtype_a: str
    dtype_b: str
    shape_a: tuple[int, ...]
    shape_b: tuple[int, ...]
    elements: int = 0
    differing: int = 0
    first: int | None = None
    first_index: tuple[int, ...] | None = None
    max_ulp: int | None = None
    max_ulp_index: tuple[int, ...] | None = None
    max_abs: float | None = None
    relative_error: float | None = None
    unbounded: int = 0
    within: bool = False


@dataclass(frozen=True)
class DiffReport:
    """What `diff` found. `same` decides the exit status of the command.

    identical : all names, dtypes, shapes and bits agree. same : identical, or within `rtol` with equal names, shapes.
    missing : tensors of A that B lacks. extra : tensors of B that A lacks. tensors : those that differ, by name.
    compared, equal : tensors in both, and how many of them agree in dtype and bits.
    """

    a: str
    b: str
    rtol: float | None
    identical: bool
    same: bool
    compared: int
    equal: int
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    tensors: tuple[TensorDiff, ...]
    bytes_read: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable form; an infinite error is the string "inf"."""
        data = asdict(self)
        for entry in data["tensors"]:
            for key in ("max_abs", "relative_error"):
                value = entry[key]
                if isinstance(value, float) and not math.isfinite(value):
                    entry[key] = str(value)
        return data


@dataclass
class _Work:
    """A tensor under comparison: results of its tiles by tile number; equal tiles are left out."""

    a: TensorInfo
    b: TensorInfo
    elements: int
    tiles: dict[int, _Comparison] = field(default_factory=dict)

    @property
    def num_tiles(self) -> int:
        return -(-self.elements // _TILE)


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
    work: list[_Work] = []
    for name in names:
        x, y = left.tensors[name], right.tensors[name]
        status = _why_not(x, y)
        if status is None:
            work.append(_Work(x, y, math.prod(x.shape)))
        else:
            refused.append(TensorDiff(name, status, x.dtype.name, y.dtype.name, x.shape, y.shape))
    run = _Run(left, right, default_threads(threads), progress, sum(w.a.nbytes + w.b.nbytes for w in work))
    run.compare(work)
    run.norms(work)
    differing = [d for w in work if (d := _describe(w, rtol)) is not None]
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
    if a.dtype is not b.dtype and not (a.dtype.name in _FLOATS and b.dtype.name in _FLOATS):
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

    def compare(self, work: list[_Work]) -> None:
        """Compares every tile; keeps what was found in those that differ."""
        jobs = (
            (w, range(t, min(t + _TILES_PER_JOB, w.num_tiles)))
            for w in work
            for t in range(0, w.num_tiles, _TILES_PER_JOB)
        )
        for_each(jobs, lambda drawn, reader: self._worker(drawn, reader, both=True), self._threads, self._tick)

    def norms(self, work: list[_Work]) -> None:
        """Adds ||a||^2 of the tiles that are equal, in tensors that are not."""
        jobs: list[tuple[_Work, range]] = []
        for w in work:
            # Only tensors with interpreted values have a norm.
            if w.tiles and next(iter(w.tiles.values()))[3] is not None:
                jobs.extend((w, range(t, t + 1)) for t in range(w.num_tiles) if t not in w.tiles)
        self._total += sum(_extent(w.a, w.elements, t[0])[1] for w, t in jobs)
        for_each(jobs, lambda drawn, reader: self._worker(drawn, reader, both=False), self._threads, self._tick)

    def _worker(self, jobs: Iterator[tuple[_Work, range]], reader: Reader, both: bool) -> None:
        from .. import _cpu

        buffers = (_cpu.Buffer(_TILE * 8), _cpu.Buffer(_TILE * 8))
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
    first = tile * _TILE
    size = tensor.dtype.itemsize
    return tensor.offset + first * size, min(_TILE, elements - first) * size


def _describe(w: _Work, rtol: float | None) -> TensorDiff | None:
    """The findings of all tiles as one; None if the tensors agree in dtype and bits."""
    if not w.tiles and w.a.dtype is w.b.dtype:
        return None
    tiles = [(t * _TILE, w.tiles[t]) for t in sorted(w.tiles)]
    unequal = [(start, c) for start, c in tiles if c[0]]
    measured = w.a.dtype.name in _MEASURED
    first = unequal[0][0] + unequal[0][1][1] if unequal else None
    farthest = max(((c[3] or 0, -(start + c[4])) for start, c in unequal if c[4] >= 0), default=None)
    unbounded = sum(c[2] for _, c in unequal)
    error = None
    if measured:
        squares = _tree([c[6] for _, c in tiles])
        norm = _tree([c[7] for _, c in tiles])
        error = _ratio(squares, norm, unbounded)
    return TensorDiff(
        name=w.a.name,
        status="differs",
        dtype_a=w.a.dtype.name,
        dtype_b=w.b.dtype.name,
        shape_a=w.a.shape,
        shape_b=w.b.shape,
        elements=w.elements,
        differing=sum(c[0] for _, c in unequal),
        first=first,
        first_index=None if first is None else _unravel(first, w.a.shape),
        max_ulp=(farthest[0] if farthest else 0) if measured else None,
        max_ulp_index=_unravel(-farthest[1], w.a.shape) if farthest else None,
        max_abs=max((c[5] for _, c in unequal), default=0.0) if measured else None,
        relative_error=error,
        unbounded=unbounded,
        within=rtol is not None and error is not None and error <= rtol,
    )


_MEASURED = frozenset((*_FLOATS, "BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"))


def _ratio(squares: float, norm: float, unbounded: int) -> float:
    if unbounded or not math.isfinite(squares) or not math.isfinite(norm):
        return math.inf
    if squares == 0.0:
        return 0.0
    return math.sqrt(squares / norm) if norm > 0.0 else math.inf


def _tree(values: list[float]) -> float:
    """The binary tree over neighbours; a last one without a partner passes through."""
    while len(values) > 1:
        pairs = [values[i] + values[i + 1] for i in range(0, len(values) - 1, 2)]
        values = pairs + values[2 * len(pairs) :]
    return values[0] if values else 0.0


def _unravel(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    index: list[int] = []
    for size in reversed(shape):
        index.append(flat % size)
        flat //= size
    return tuple(reversed(index))
