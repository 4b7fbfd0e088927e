"""Requests for exact sums: norms, masked norms, dot products, and the divergence of rows.

Every sum runs over canonical blocks in a fixed order (T1): products in float64, lane l = i mod 256 of a block of 4,096
adds its 16 elements in order, lanes combine by a binary tree (stride 128, 64, ... 1), blocks by a binary tree over
block numbers. Sums by row or column restart the index i at every segment.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Literal

from ..errors import ArgumentError
from .arguments import check_bool, check_choice, check_integer

__all__ = ["QUANTITIES", "Gram", "Reduce", "Segments", "Sums", "pair_slot"]

QUANTITIES = (
    "abs",
    "squares",
    "kept_abs",
    "kept_squares",
    "agreeing_abs",
    "importance_squares",
    "kept_count",
    "alone_count",
    "negative_count",
    "total_abs",
    "merged_abs",
)
"""What `Reduce` sums; the last two give one number, the others one per model."""


@dataclass(frozen=True)
class Segments:
    """How a tensor is cut into segments that are summed by themselves.

    axis "tensor": one segment, the tensor at hand whatever its length. "rows": `count` segments of `length` consecutive
    elements. "columns": `count` segments of `length` elements that are `count` apart: element g belongs to segment
    g % count and is number g // count of it.
    """

    axis: Literal["tensor", "rows", "columns"]
    count: int
    length: int

    def __post_init__(self) -> None:
        check_choice(self.axis, ("tensor", "rows", "columns"), "axis")
        check_integer(self.count, 1, 1 << 62, "count")
        check_integer(self.length, 0, 1 << 62, "length")


@dataclass(frozen=True)
class Gram:
    """Dot products of all pairs of models: G[i, j] = sum of vi * vj over a segment, vt = dt = C(xt - x0) or xt.

    subtract : take deltas (needs a base). The slots of the sums are the pairs i <= j, row by row; see `pair_slot`.
    """

    segments: Segments
    subtract: bool

    def __post_init__(self) -> None:
        check_bool(self.subtract, "subtract")


@dataclass(frozen=True)
class Reduce:
    """Sums over one tensor of what a `Program` computes on its way; the program writes nothing.

    quantities : in the terms of `Program`, per model "abs": |dt|; "squares": dt^2; "kept_abs": |et| before `factors`;
    "kept_squares": et^2 before `factors`; "agreeing_abs": |q| where model t agrees, else 0; "importance_squares": Ft^2;
    and counts, as sums of 1.0: "kept_count": et != 0 (NaN is); "alone_count": et != 0 and no other model's is;
    "negative_count": Ft < 0.
    One number: "total_abs": |+0 + d1 + ... + dT| (sum in C); "merged_abs": |y| before the anchor is added.
    Slots: the quantities in order, those per model as T slots.
    """

    quantities: tuple[str, ...]

    def __post_init__(self) -> None:
        for name in self.quantities:
            check_choice(name, QUANTITIES, "quantities")
        if not self.quantities:
            raise ArgumentError("no quantity to sum", code="reduce.quantities", expected="one or more", got="none")

    def num_slots(self, num_models: int) -> int:
        """How many sums there are."""
        return sum(1 if name in QUANTITIES[-2:] else num_models for name in self.quantities)


def pair_slot(i: int, j: int, num_models: int) -> int:
    """The slot of the pair (i, j) in the upper triangle."""
    i, j = min(i, j), max(i, j)
    return i * num_models - i * (i - 1) // 2 + j - i


@dataclass(frozen=True)
class Sums:
    """Folded sums: per tensor of the scope and slot, one number for each segment (a single one for axis "tensor")."""

    values: tuple[tuple[array[float], ...], ...]

    def number(self, slot: int, tensor: int = 0) -> float:
        """The sum of a slot over a whole tensor."""
        return self.values[tensor][slot][0]

    def segments(self, slot: int, tensor: int = 0) -> array[float]:
        """The sums of a slot, one per segment."""
        return self.values[tensor][slot]
