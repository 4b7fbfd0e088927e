"""Tiles of products of factors, generated when asked for."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from ..._backends import _triton_factors
from ...adapters.model import Factors
from ...errors import ArgumentError
from .stacking import stack

if TYPE_CHECKING:
    import torch

__all__ = ["FactorTiles"]

BLOCK = 512  # products are always formed in the same blocks, so that a tile's bits do not depend on its box


class FactorTiles:
    """Any box of sum_t w_t b_t a_t, or of one w_t b_t a_t, without the whole matrix.

    factors : products of one shape (m, n), one device. weights : one number each, default 1. Tiles are float64 if any
    factor is, else float32.
    The same element has the same bits in every box that holds it. On a GPU products up to rank 64 are formed by a
    Triton kernel, all of a box in one launch, with every product and sum rounded in the order of the ranks.
    """

    def __init__(self, factors: Sequence[Factors], weights: Sequence[float] | None = None) -> None:
        total = stack(factors, weights)
        self._sum = total
        self.shape = total.shape
        ends = [0]
        for f in factors:
            ends.append(ends[-1] + f.rank)
        self._ends = ends
        # Whether the kernel serves the products, and the sum; left factors transposed, for it.
        ranks = [f.rank for f in factors]
        self._fused = _triton_factors.serves(self._sum.b, ranks), _triton_factors.serves(self._sum.b, ends[-1:])
        self._left = self._sum.b.mT.contiguous() if any(self._fused) else None
        self._each = [Factors(self._sum.b[:, i:j].contiguous(), self._sum.a[i:j]) for i, j in pairwise(ends)]
        self._strips: dict[int | None, list[torch.Tensor]] = {}

    @property
    def device(self) -> torch.device:
        """Where the factors and the tiles are."""
        return self._sum.b.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the tiles."""
        return self._sum.b.dtype

    def __len__(self) -> int:
        return len(self._each)

    def tile(
        self,
        rows: tuple[int, int] | None = None,
        cols: tuple[int, int] | None = None,
        model: int | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The box rows[0]:rows[1], cols[0]:cols[1] of the sum, or of product number `model`.

        out : where to write it, a tensor of the box's shape; fresh memory costs more than the product.
        """
        import torch

        f = self._sum if model is None else self._each[model]
        (r0, r1), (c0, c1) = rows, cols = self._box(rows, cols)
        if self._left is not None and self._fused[model is None]:
            ends = [0, self._ends[-1]] if model is None else self._ends[model : model + 2]
            found = _triton_factors.factor_tiles(self._left, self._sum.a, ends, rows, cols)[0]
            return found if out is None else out.copy_(found)
        if out is None:
            out = f.b.new_empty((r1 - r0, c1 - c0))
        strips = self._columns(model)
        for i in range(r0 // BLOCK * BLOCK, r1, BLOCK):
            for j in range(c0 // BLOCK * BLOCK, c1, BLOCK):
                left, right = f.b[i : i + BLOCK], strips[j // BLOCK]
                bottom, end = i + left.shape[0], j + right.shape[1]
                if r0 <= i and bottom <= r1 and c0 <= j and end <= c1:
                    torch.mm(left, right, out=out[i - r0 : bottom - r0, j - c0 : end - c0])
                    continue
                block = left @ right
                y0, y1, x0, x1 = max(i, r0), min(bottom, r1), max(j, c0), min(end, c1)
                out[y0 - r0 : y1 - r0, x0 - c0 : x1 - c0] = block[y0 - i : y1 - i, x0 - j : x1 - j]
        return out

    @property
    def at_once(self) -> bool:
        """Whether the tiles of all products come from one launch."""
        return self._left is not None and self._fused[0]

    def tiles(self, rows: tuple[int, int] | None = None, cols: tuple[int, int] | None = None) -> Sequence[torch.Tensor]:
        """The box of every product, as `tile`."""
        if self._left is None or not self._fused[0]:
            return [self.tile(rows, cols, model) for model in range(len(self))]
        return list(_triton_factors.factor_tiles(self._left, self._sum.a, self._ends, *self._box(rows, cols)))

    def _box(
        self, rows: tuple[int, int] | None, cols: tuple[int, int] | None
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        """The box that is asked for, checked."""
        (r0, r1), (c0, c1) = rows or (0, self.shape[0]), cols or (0, self.shape[1])
        if not (0 <= r0 <= r1 <= self.shape[0] and 0 <= c0 <= c1 <= self.shape[1]):
            raise ArgumentError(
                "box outside the matrix",
                code="argument.box",
                expected=f"within {self.shape}",
                got=f"rows {r0}:{r1}, columns {c0}:{c1}",
            )
        return (r0, r1), (c0, c1)

    def _columns(self, model: int | None) -> list[torch.Tensor]:
        """The a of the sum or of a product in strips of BLOCK columns."""
        if model not in self._strips:
            a = (self._sum if model is None else self._each[model]).a
            self._strips[model] = [a[:, j : j + BLOCK].contiguous() for j in range(0, a.shape[1], BLOCK)]
        return self._strips[model]
