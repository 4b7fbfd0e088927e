"""How a pass over one tensor is cut into pieces that a worker's tiles can hold."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

from ..ops.program import Program
from ..ops.sums import Segments
from ..tensors import CANONICAL_BLOCK, Piece

__all__ = ["Tiling", "flat", "gram_tiling", "least_of_gram", "roomy_of_gram", "slab_unit"]

_SEGMENT_BYTES = 2048
"""Bytes of a row that a box of columns should cover, so that a read is worth its call."""


@dataclass(frozen=True)
class Tiling:
    """A grid of boxes over a tensor seen as `rows` x `cols`: boxes of `high` x `wide`, smaller at the ends."""

    rows: int
    cols: int
    high: int
    wide: int

    @property
    def across(self) -> int:
        """Boxes side by side."""
        return -(-self.cols // self.wide)

    @property
    def count(self) -> int:
        """Number of pieces."""
        return -(-self.rows // self.high) * self.across

    @property
    def largest(self) -> int:
        """Elements of the largest piece."""
        return min(self.high, self.rows) * min(self.wide, self.cols)

    def piece(self, index: int) -> Piece:
        """Box `index`, from left to right and down."""
        down, right = divmod(index, self.across)
        row, col = down * self.high, right * self.wide
        wide = min(self.wide, self.cols - col)
        if self.rows == 1:
            return Piece.flat(col, wide)
        return Piece(row * self.cols + col, min(self.high, self.rows - row), wide, self.cols)


def flat(n: int, tile: int, unit: int = CANONICAL_BLOCK) -> Tiling:
    """Runs of a multiple of `unit` elements, about `tile` of them and at least one unit."""
    return Tiling(1, n, 1, max(1, tile // unit) * unit)


def slab_unit(program: Program) -> int:
    """Elements of which a piece must hold a multiple: whole canonical blocks, and whole slabs of the program."""
    return program.slab * CANONICAL_BLOCK // gcd(program.slab, CANONICAL_BLOCK)


def least_of_gram(segments: Segments, n: int) -> int:
    """Elements of the smallest tile that a pass of dot products can do with."""
    return min(n, CANONICAL_BLOCK)


def roomy_of_gram(segments: Segments, n: int, itemsize: int) -> int:
    """Elements of a tile beyond which a larger one brings nothing, 0 where the usual size is right."""
    if segments.axis != "columns":
        return 0
    return min(n, CANONICAL_BLOCK * max(1, _SEGMENT_BYTES // itemsize))


def gram_tiling(segments: Segments, n: int, tile: int, room: int) -> Tiling:
    """The boxes of a pass of dot products. tile : elements that are best. room : the most that a tile can hold.

    By row: whole rows, or runs of whole blocks of one row that is longer than a tile. By column: boxes of 4096 rows.
    """
    if segments.axis == "tensor":
        return flat(n, tile)
    if segments.axis == "rows":
        length = segments.length
        if length <= tile or length <= CANONICAL_BLOCK:
            return Tiling(segments.count, length, max(1, tile // length), length)
        return Tiling(segments.count, length, 1, max(1, tile // CANONICAL_BLOCK) * CANONICAL_BLOCK)
    high = min(CANONICAL_BLOCK, segments.length)
    wide = min(segments.count, max(1, room // high))
    if wide == segments.count and segments.length > high:
        # Boxes of the full width are runs, of which more fit.
        high *= max(1, min(tile, room) // (high * wide))
    return Tiling(segments.length, segments.count, high, wide)
