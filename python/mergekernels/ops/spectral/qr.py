"""`tall_qr`: a thin orthonormal basis from a float64 Gram."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .batching import one_or_many
from .cuts import check_tol, power_of_two
from .gram import gram, times
from .iterations import extremes
from .sharded import Matrix, Sharded, blocks, check_matrix, cut_like

if TYPE_CHECKING:
    import torch

__all__ = ["TallQR", "tall_qr"]

SECOND_PASS = 1e4
"""Condition above which one pass leaves more than 1e-7 of non-orthogonality."""

FLOOR = 1e-7
"""Smallest relative cut that a float64 Gram resolves; below it the matrix itself is factored, by Householder's QR."""

SMALL = 64
"""Columns up to which all eigenvalues of the Gram are found as fast as estimates of the outermost."""


@dataclass(frozen=True)
class TallQR:
    """X ~ q @ r.

    q : (d, rank), orthonormal columns, float32 (float64 for float64 input), sharded by rows as X was.
    r : (rank, c), float64, on X's device; upper triangular if no column was cut. rank : columns of q.
    condition : estimate of the condition of what was kept, columns scaled to equal norm; 1 for rank 0.
    """

    q: Any
    r: torch.Tensor
    rank: int
    condition: float


def tall_qr(X: Any, tol: float = 1e-6) -> Any:
    """Orthonormal basis of the columns of X (d, c), and the factor that gives X back.

    X : a matrix (2-D tensor of any float dtype, or Sharded), or a list of them; c up to 2048. tol : relative cut, in
    [0, 1): what depends on the other columns up to tol is dropped; columns are compared at equal norm, so a small one
    is not dropped for being small.
    Returns TallQR, or a list of them. All-zero X has rank 0.
    Promise (float32 input): ||q^T q - I||_F / sqrt(rank) <= 1e-7 and ||X - q r||_F <= (1e-7 + tol if columns were cut)
    ||X||_F; 1e-13 for float64 input. r has the same bits however X is cut into shards, if one pass was enough.
    Errors: ArgumentError, DataError for NaN or Inf.
    Source: Cholesky QR in two passes (Yamamoto et al., 2015), with eigenvectors where columns depend on others.
    """
    tol = check_tol(tol, 1e-6)
    return one_or_many(X, lambda x, what: _tall_qr(check_matrix(x, what), tol))


def _tall_qr(x: Matrix, tol: float) -> TallQR:
    import torch

    if tol < FLOOR:
        return _householder(x, tol)
    g = gram(x)
    scale = power_of_two(g.diagonal().sqrt())
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
    if c == 0:
        return g, g, 1.0
    lower, info = torch.linalg.cholesky_ex(g)
    if int(info) == 0:
        if c <= SMALL:
            ends = torch.linalg.eigvalsh(g)[[-1, 0]].clamp_min(0).sqrt().tolist()
        top, least = ends if c <= SMALL else extremes(g, lower)
        # The estimate of the least value can be high by some percent; where that could matter, eigenvectors decide.
        if least > 2 * max(tol, FLOOR) * top:
            eye = torch.eye(c, dtype=g.dtype, device=g.device)
            return lower.mT, torch.linalg.solve_triangular(lower, eye, upper=False).mT, top / least
    values, vectors = torch.linalg.eigh(g)
    sigma = values.clamp_min(0).sqrt()
    keep = sigma > max(tol, FLOOR) * sigma[-1]
    kept, basis = sigma[keep].flip(0), vectors[:, keep].flip(1)
    condition = float(kept[0] / kept[-1]) if kept.numel() else 1.0
    return kept[:, None] * basis.mT, basis / kept, condition


def _householder(x: Matrix, tol: float) -> TallQR:
    """QR of every canonical block, QR of their triangles, and the singular values of the last one for the rank."""
    import torch

    pairs = [torch.linalg.qr(block) for block in blocks(x, torch.float64)]
    c = x.shape[1]
    if not pairs or c == 0:
        q = torch.zeros((x.shape[0], 0), dtype=x.dtype, device=x.device)
        return TallQR(q, torch.zeros((0, c), dtype=torch.float64, device=x.device), 0, 1.0)
    top, r = torch.linalg.qr(torch.cat([triangle for _, triangle in pairs]))
    norms = torch.linalg.vector_norm(r, dim=0)
    scale = power_of_two(norms)
    u, s, vh = torch.linalg.svd(r / scale, full_matrices=False)
    p = int((s > tol * s[0]).sum())
    if p < c:
        top, r = top @ u[:, :p], (s[:p, None] * vh[:p]) * scale
    condition = float(s[0] / s[p - 1]) if p else 1.0
    heights = [int(triangle.shape[0]) for _, triangle in pairs]
    tops = top.split(heights)
    q = torch.cat([(left @ piece).to(x.dtype) for (left, _), piece in zip(pairs, tops, strict=True)])
    rows = isinstance(x, Sharded) and x.dim == 0
    return TallQR(cut_like(q, x) if rows else q, r, p, condition)
