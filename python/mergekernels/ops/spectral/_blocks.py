"""Orthonormal blocks from float64 Grams."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._random import signs

if TYPE_CHECKING:
    import torch

__all__ = ["orthonormal", "root"]

ILL = 1e-6  # relative size of a pivot below which a Cholesky factor is not trusted


def root(g: torch.Tensor) -> torch.Tensor:
    """R with R^T R = G for a positive semidefinite G in float64: a Cholesky factor, or from eigenvectors."""
    import torch

    r: torch.Tensor
    r, info = torch.linalg.cholesky_ex(g, upper=True)
    if not int(info):
        return r
    values, vectors = torch.linalg.eigh(g)
    r = values.clamp_min(0.0).sqrt()[:, None] * vectors.mT
    return r


def orthonormal(
    w: torch.Tensor, noise: float = 0.0, signs_for: tuple[int, int] = (0, 0)
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Factors w ~ q r with q (n, s) orthonormal in w's dtype, r (s, s) float64 on the CPU.

    Directions of w no longer than `noise`, or than 1e-8 of the longest, are replaced by random ones (`signs_for`: seed
    and draw), their rows of r are 0; the third result counts them. One pass: where w is ill-conditioned, or columns
    were replaced, orthogonality is not that of w's dtype and a second pass is due.
    """
    import torch

    wide = w.to(torch.float64)
    g = wide.mT @ wide
    r, info = torch.linalg.cholesky_ex(g, upper=True)
    pivots = r.diagonal().abs()
    if not int(info) and len(pivots):
        least = float(pivots.min())
        if least > 2.0 * noise and least > ILL * float(pivots.max()):
            q = torch.linalg.solve_triangular(r.mT, wide.mT, upper=False).mT
            return q.to(w.dtype), r.cpu(), 0
    values, vectors = torch.linalg.eigh(g)
    lengths = values.clamp_min(0.0).sqrt().flip(0)
    good = int(((lengths > noise) & (lengths > 1e-8 * lengths[0])).sum()) if len(lengths) else 0
    vectors = vectors.flip(1)[:, :good]
    lengths = lengths[:good]
    q = wide @ (vectors / lengths)
    s = w.shape[1]
    r = torch.zeros_like(g)
    r[:good] = lengths[:, None] * vectors.mT
    if good < s:
        other = signs(w.shape[0], s - good, *signs_for, like=q)
        other = other - q @ (q.mT @ other)
        q = torch.cat([q, other / torch.linalg.vector_norm(other, dim=0)], 1)
    return q.to(w.dtype), r.cpu(), s - good
