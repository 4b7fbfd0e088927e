"""`tall_qr`: a thin orthonormal basis from a float64 Gram."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .batching import one_or_many
from .cuts import check_tol, power_of_two
from .gram import gram, times
from .sharded import Matrix, check_matrix

if TYPE_CHECKING:
    import torch

__all__ = ["TallQR", "tall_qr"]

SECOND_PASS = 1e4
"""Condition above which one pass leaves more than 1e-7 of non-orthogonality."""


@dataclass(frozen=True)
class TallQR:
    """X ~ q @ r.

    q : (d, rank), orthonormal columns, float32 (float64 for float64 input), sharded by rows as X was.
    r : (rank, c), float64, on X's device; upper triangular if no column was cut. rank : columns of q.
    condition : estimate of the condition of X with columns scaled to equal norm, of what was kept.
    """

    q: Any
    r: torch.Tensor
    rank: int
    condition: float


def tall_qr(X: Any, tol: float = 1e-6) -> Any:
    """Orthonormal basis of the columns of X (d, c), and the factor that gives X back.

    X : a matrix (2-D tensor of any float dtype, or Sharded), or a list of them. tol : relative cut, in [0, 1): what
    depends on other columns up to tol is dropped.
    Returns TallQR, or a list of them.
    Promise (float32 input): ||q^T q - I||_F / sqrt(rank) <= 1e-7 and ||X - q r||_F <= (1e-7 + tol if columns were cut)
    ||X||_F. All-zero X has rank 0.
    Errors: ArgumentError, DataError for NaN or Inf.
    Source: Cholesky QR in two passes (Yamamoto et al., 2015), with eigenvectors where columns depend on others.
    """
    tol = check_tol(tol, 1e-6)
    return one_or_many(X, lambda x, what: _tall_qr(check_matrix(x, what), tol))


def _tall_qr(x: Matrix, tol: float) -> TallQR:
    import torch

    g = gram(x)
    norms = g.diagonal().sqrt()
    scale = power_of_two(norms)
    r, inverse, condition = _triangle(g / scale / scale[:, None], tol)
    r, inverse = r * scale, inverse / scale[:, None]
    q = times(x, inverse, x.dtype)
    if condition > SECOND_PASS or x.dtype == torch.float64:
        again, inverse, _ = _triangle(gram(q), 0.0)
        q, r = times(q, inverse, x.dtype), again @ r
    return TallQR(q, r, int(r.shape[0]), condition)


def _triangle(g: torch.Tensor, tol: float) -> tuple[torch.Tensor, torch.Tensor, float]:
    """R (p, c) with R^T R ~ g, a right inverse of it (c, p), and the condition of what was kept."""
    import torch

    c = g.shape[0]
    values, vectors = torch.linalg.eigh(g)
    sigma = values.clamp_min(0).sqrt()
    top = float(sigma[-1]) if c else 0.0
    keep = sigma > max(tol, 1e-8) * top
    p = int(keep.sum())
    if p == 0:
        return g.new_zeros((0, c)), g.new_zeros((c, 0)), 1.0
    condition = top / float(sigma[c - p])
    if p == c:
        factor, info = torch.linalg.cholesky_ex(g, upper=True)
        if int(info) == 0:
            eye = torch.eye(c, dtype=g.dtype, device=g.device)
            return factor, torch.linalg.solve_triangular(factor, eye, upper=True), condition
    kept, basis = sigma[keep].flip(0), vectors[:, keep].flip(1)
    return kept[:, None] * basis.mT, basis / kept, condition
