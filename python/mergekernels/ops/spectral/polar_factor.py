"""`polar` and `nuclear_norm`: the orthogonal direction of a matrix, without its singular vectors one by one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from .batching import one_or_many
from .cuts import check_tol, rank_cut
from .gram import gram, times
from .qr import tall_qr
from .sharded import Matrix, check_matrix, dense, split_like
from .small import small_svd
from .stacking import balance

if TYPE_CHECKING:
    import torch

    from ...adapters.model import Factors

__all__ = ["Polar", "nuclear_norm", "polar"]

Route = Literal["auto", "core", "gram", "svd", "newton_schulz", "qdwh"]


@dataclass(frozen=True)
class Polar:
    """p = U V^T of X = U S V^T over the singular values above the cut: a partial isometry.

    p : like X (tensor, Sharded cut alike, or Factors), float32 (float64 for float64 input). rank : how many values
    are above the cut. nuclear : sum of the singular values, if asked for. residual : ||P P^T P - P||_F / sqrt(rank).
    route : what computed it.
    """

    p: Any
    rank: int
    nuclear: float | None
    residual: float
    route: str


def polar(X: Any, tol: float | None = None, route: Route = "auto", nuclear: bool = False) -> Any:
    """The polar factor on the support of X (m, n).

    X : a matrix (2-D tensor, Sharded, or Factors), or a list of them. tol : directions with sigma <= tol * sigma_1 give
    zero; in [0, 1), default `rank_cut`. nuclear : also the nuclear norm.
    Returns Polar, or a list of them.
    Errors: ArgumentError, DataError for NaN or Inf.
    """
    return one_or_many(X, lambda x, what: _polar(x, what, tol, route, nuclear))


def _polar(x: Any, what: str, tol: float | None, route: str, nuclear: bool) -> Polar:
    from ...adapters.model import Factors

    if isinstance(x, Factors):
        return _core(x, what, tol, nuclear)
    matrix = check_matrix(x, what)
    if route == "svd":
        return _svd(matrix, tol, nuclear)
    return _gram(matrix, tol, nuclear)


def _core(x: Factors, what: str, tol: float | None, nuclear: bool) -> Polar:
    from ...adapters.model import Factors

    check_matrix(x.b, f"b of {what}")
    check_matrix(x.a, f"a of {what}")
    b, a = balance(x.b, x.a)
    left, right = tall_qr(b), tall_qr(a.mT)
    core = small_svd(left.r @ right.r.mT, tol)
    k = core.rank
    u, vh = core.u[:, :k].to(x.b.dtype), core.vh[:k].to(x.a.dtype)
    p = Factors(left.q @ u, vh @ right.q.mT)
    z = (p.b.mT @ p.b) @ (p.a @ p.a.mT)
    residual = _residual(z) if k else 0.0
    return Polar(p, k, float(core.s[:k].sum()) if nuclear else None, residual, "core")


def _residual(z: torch.Tensor) -> float:
    """||Z - I||_F / sqrt(k) of a k x k matrix."""
    import torch

    k = z.shape[0]
    return float(torch.linalg.matrix_norm(z - torch.eye(k, dtype=z.dtype, device=z.device)) / max(k, 1) ** 0.5)


def _svd(x: Matrix, tol: float | None, nuclear: bool) -> Polar:
    import torch

    whole = dense(x)
    cut = check_tol(tol, rank_cut(x.shape[0], x.shape[1], x.dtype))
    u, s, vh = torch.linalg.svd(whole, full_matrices=False)
    k = int((s > cut * s[0]).sum()) if s.numel() else 0
    p = u[:, :k] @ vh[:k]
    total = float(s[:k].double().sum()) if nuclear else None
    return Polar(split_like(p, x), k, total, _residual(vh[:k] @ vh[:k].mT), "svd")


def _gram(x: Matrix, tol: float | None, nuclear: bool) -> Polar:
    import torch

    m, n = x.shape
    if m < n:
        flat = _gram(x.mT, tol, nuclear)
        return Polar(flat.p.mT, flat.rank, flat.nuclear, flat.residual, flat.route)
    cut = check_tol(tol, rank_cut(m, n))
    values, vectors = torch.linalg.eigh(gram(x))
    sigma = values.clamp_min(0).sqrt()
    keep = sigma > cut * sigma[-1] if n else sigma > 0
    k = int(keep.sum())
    basis = vectors[:, keep]
    p = times(x, (basis / sigma[keep]) @ basis.mT, x.dtype)
    z = basis.mT @ gram(p) @ basis
    total = float(sigma[keep].sum()) if nuclear else None
    return Polar(p, k, total, _residual(z) if k else 0.0, "gram")


def nuclear_norm(X: Any) -> Any:
    """The sum of singular values, float64.

    X : a matrix (2-D tensor, Sharded, or Factors), or a list of them. Returns a float, or a list of them.
    Errors: ArgumentError, DataError for NaN or Inf.
    """
    return one_or_many(X, _nuclear_norm)


def _nuclear_norm(x: Any, what: str) -> float:
    import torch

    from ...adapters.model import Factors

    if isinstance(x, Factors):
        check_matrix(x.b, f"b of {what}")
        check_matrix(x.a, f"a of {what}")
        b, a = balance(x.b, x.a)
        core = tall_qr(b).r @ tall_qr(a.mT).r.mT
        return float(torch.linalg.svdvals(core).sum())
    matrix = check_matrix(x, what)
    if matrix.dtype == torch.float64:
        return float(torch.linalg.svdvals(dense(matrix)).sum())
    m, n = matrix.shape
    return float(torch.linalg.eigvalsh(gram(matrix if m >= n else matrix.mT)).clamp_min(0).sqrt().sum())
