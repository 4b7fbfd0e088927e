"""What a comparison of two checkpoints found: of tiles, of tensors, of all."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ..formats.checkpoint import TensorInfo

__all__ = ["FLOATS", "TILE", "DiffReport", "TensorDiff", "Work", "describe"]

TILE = 128 * 4096  # elements; a power of two of canonical blocks, so that sums do not depend on it
FLOATS = ("BF16", "F16", "F32", "F64")
_MEASURED = frozenset((*FLOATS, "BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"))

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
class Work:
    """A tensor under comparison: results of its tiles by tile number; equal tiles are left out."""

    a: TensorInfo
    b: TensorInfo
    elements: int
    tiles: dict[int, _Comparison] = field(default_factory=dict)

    @property
    def num_tiles(self) -> int:
        """How many tiles it has."""
        return -(-self.elements // TILE)


def describe(w: Work, rtol: float | None) -> TensorDiff | None:
    """The findings of all tiles as one; None if the tensors agree in dtype and bits."""
    if not w.tiles and w.a.dtype is w.b.dtype:
        return None
    tiles = [(t * TILE, w.tiles[t]) for t in sorted(w.tiles)]
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
