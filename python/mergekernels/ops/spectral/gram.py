"""Grams in float64 that add over rows, and thin products, both by canonical blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .sharded import BLOCK, Matrix, Sharded, blocks

if TYPE_CHECKING:
    import torch

__all__ = ["gram", "inner", "plain_gram", "row_gram", "short_gram", "symmetric", "times"]

TILE = 256
"""Columns of one tile of a Gram; only tiles on and above the diagonal are multiplied."""

NARROW = 64
"""The same, of a Gram of up to TILE columns."""


def gram(x: Matrix) -> torch.Tensor:
    """X^T X in float64, (n, n), exactly symmetric.

    Block after block in order; the same bits however X is cut into shards. Products of float32 are exact, so the
    error is that of float64 sums.
    """
    import torch

    n = x.shape[1]
    total = torch.zeros((n, n), dtype=torch.float64, device=x.device)
    for block in blocks(x, torch.float64):
        _upper_tiles(block, total)
    return symmetric(total)


def row_gram(x: torch.Tensor) -> torch.Tensor:
    """X X^T in float64, (m, m), exactly symmetric, of a float matrix (m, n) whose rows lie in one piece."""
    import torch

    m, n = x.shape
    total = torch.zeros((m, m), dtype=torch.float64, device=x.device)
    for start in range(0, n, BLOCK):
        _upper_tiles(x[:, start : start + BLOCK].to(torch.float64).mT, total)
    return symmetric(total)


def short_gram(x: torch.Tensor, rows: bool) -> torch.Tensor:
    """X^T X, or X X^T with `rows`, in float64 of products of float32 matrices at most 1024 long in themselves."""
    import torch

    c = x.shape[0] if rows else x.shape[1]
    total = torch.zeros((c, c), dtype=torch.float64)
    part = torch.empty((c, c), dtype=x.dtype)
    for piece in x.split(1024, 1 if rows else 0):  # type: ignore[no-untyped-call]
        tall = piece.mT if rows else piece
        for i in range(0, c, NARROW):
            torch.mm(tall[:, i : i + NARROW].mT, tall[:, i:], out=part[i : i + NARROW, i:])
        total += part
    return symmetric(total)


def inner(x: torch.Tensor, y: torch.Tensor) -> float:
    """<X, Y> of matrices: rows in their own dtype, blocks of rows that stay in the cache, their sums in float64."""
    import torch

    pieces = zip(x.split(128), y.split(128), strict=True)  # type: ignore[no-untyped-call]
    return float(sum((p * q).sum(-1).sum(dtype=torch.float64) for p, q in pieces))


def plain_gram(parts: list[torch.Tensor], whole: bool = True) -> torch.Tensor:
    """The sum of X_i^T X_i over row shards (..., m_i, n), in their own dtype, on the first one's device.

    whole : False promises no more than the upper triangle.
    """
    import torch

    first = parts[0]
    if first.ndim > 2 or first.device.type != "cpu":  # half the products would save little there, and cost launches
        total = first.mT @ first
        for part in parts[1:]:
            total += (part.mT @ part).to(total.device)
        return total
    total = torch.zeros((first.shape[1], first.shape[1]), dtype=first.dtype)
    for part in parts:
        _upper_tiles(part.to(first.device), total)
    return symmetric(total) if whole else total


def _upper_tiles(block: torch.Tensor, total: torch.Tensor) -> None:
    """Adds block^T block to the tiles of `total` on and above the diagonal: one product for a whole row of tiles."""
    n = block.shape[1]
    tile = TILE if n > TILE else NARROW
    for i in range(0, n, tile):
        total[i : i + tile, i:].addmm_(block[:, i : i + tile].mT, block[:, i:])


def symmetric(upper: torch.Tensor) -> torch.Tensor:
    """The symmetric matrix whose upper triangle is given; the rest of the argument is not read."""
    return upper.triu() + upper.triu(1).mT


def times(x: Matrix, small: torch.Tensor, dtype: torch.dtype) -> Matrix:
    """X @ small, accumulated in the dtype of `small` and stored in `dtype`; row shards stay row shards."""
    import torch

    rows, cols = x.shape[0], small.shape[1]
    if isinstance(x, Sharded) and x.dim == 0:
        pieces = [times(p, small.to(p.device), dtype) for p in x.parts]
        return Sharded([p for p in pieces if isinstance(p, torch.Tensor)], 0)
    if isinstance(x, torch.Tensor) and x.dtype == small.dtype == dtype:
        return x @ small
    out = torch.empty((rows, cols), dtype=dtype, device=x.device)
    start = 0
    for block in blocks(x, small.dtype):
        stop = start + block.shape[0]
        if small.dtype == dtype:
            torch.mm(block, small, out=out[start:stop])
        else:
            out[start:stop].copy_(block @ small)
        start = stop
    return out
