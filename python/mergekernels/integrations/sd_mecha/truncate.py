"""Truncation to a rank as sd-mecha has it: a randomised basis from torch's numbers, or the best approximation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...ops import lowrank, subspace

if TYPE_CHECKING:
    import torch

__all__ = ["best", "in_random_basis"]


def best(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """The truncated singular value decomposition, multiplied out. matrix : (m, n); rank : below both sides."""
    m, n = matrix.shape
    if 8 * rank > min(m, n):
        found = lowrank(matrix, rank, route="whole").factors
        return found.b @ found.a
    if m < n:
        basis = subspace(matrix, rank, side="left", accuracy="subspace").basis
        return basis @ (basis.T @ matrix)
    basis = subspace(matrix, rank, side="right", accuracy="subspace").basis
    return (matrix @ basis) @ basis.T


def in_random_basis(matrix: torch.Tensor, rank: int, iters: int, seed: int | None) -> torch.Tensor:
    """The projection on what `iters` subspace iterations find from a random start.

    matrix : (m, n). rank : below both sides. seed : of the start; None takes torch's global generator, whose numbers
    are used up as sd-mecha uses them. Singular vectors inside the basis do not matter: all of it is kept.
    """
    import torch

    wide = matrix.shape[0] < matrix.shape[1]
    a = matrix.mT if wide else matrix
    generator = None if seed is None else torch.Generator(a.device).manual_seed(seed)
    start = torch.randn(a.shape[1], rank, dtype=a.dtype, device=a.device, generator=generator)
    q: torch.Tensor = torch.linalg.qr(a @ start).Q
    for _ in range(iters):
        q = torch.linalg.qr(a.mT @ q).Q
        q = torch.linalg.qr(a @ q).Q
    return (matrix @ q) @ q.mT if wide else q @ (q.mT @ matrix)
