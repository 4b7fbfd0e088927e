"""`soft_threshold`: proximal maps of the nuclear norm."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ...errors import ArgumentError
from .above import triplets_above
from .batching import in_threads
from .gram import gram, times
from .qr import tall_qr
from .sharded import check_matrix, cut_like
from .small import small_svd

if TYPE_CHECKING:
    import torch

    from ...adapters.model import Factors

__all__ = ["SoftThreshold", "soft_threshold"]


SMALL = 384
"""Short side up to which the eigenvectors of the Gram are always the faster way."""


@dataclass(frozen=True)
class SoftThreshold:
    """What `soft_threshold` returns.

    y : the shrunk matrix, like X. nuclear : its nuclear norm. rank : its rank. basis : orthonormal columns (short side,
    at least `rank` of them) that help the next call with a similar X, as `warm`; None for factors.
    route : "gram", "above" (only the values above the threshold were computed), "core" (factors) or "none" (mu = 0).
    """

    y: Any
    nuclear: float
    rank: int
    basis: torch.Tensor | None
    route: str


def soft_threshold(X: Any, mu: float, kind: Literal["plain", "squared"] = "plain", warm: Any = None) -> Any:
    """Shrinks singular values towards zero.

    X : a matrix (m, n) (2-D tensor of any float dtype, Sharded, or Factors), or a list of them. mu : >= 0.
    kind : "plain" subtracts mu from every singular value and keeps what stays positive, the minimiser of
    ||Y - X||_F^2 / 2 + mu ||Y||_*; "squared" the minimiser of ||Y - X||_F^2 + mu ||Y||_*^2, which subtracts mu ||Y||_*.
    warm : `basis` of an earlier result for a similar X (a list of them, None where there is none, if X is a list).
    It saves time where few values are above the threshold and never changes the result beyond the promise.
    Returns SoftThreshold, or a list of them; y is like X (tensor, Sharded cut alike, Factors).
    mu = 0 returns X itself, mu >= sigma_1 ("plain") exact zeros. Promise: within 1e-6 ||X||_F whatever the condition.
    Errors: ArgumentError, DataError for NaN or Inf.
    """
    if not (mu >= 0 and math.isfinite(mu)):
        raise ArgumentError("mu is out of range", code="argument", expected="a finite number >= 0", got=str(mu))
    if kind not in ("plain", "squared"):
        raise ArgumentError("kind is unknown", code="argument", expected="'plain' or 'squared'", got=repr(kind))
    if not isinstance(X, (list, tuple)):
        return _shrink(X, "X", float(mu), kind, warm)
    starts = [None] * len(X) if warm is None else warm
    if not isinstance(starts, (list, tuple)) or len(starts) != len(X):
        raise ArgumentError("warm does not fit X", code="argument", expected=f"a list of {len(X)} or None")
    tasks = [(x, f"X[{i}]", start) for i, (x, start) in enumerate(zip(X, starts, strict=True))]
    return in_threads(tasks, lambda task: _shrink(task[0], task[1], float(mu), kind, task[2]))


def threshold(sigma: torch.Tensor, mu: float, kind: str) -> float:
    """What is subtracted from the falling singular values."""
    import torch

    if kind == "plain" or mu == 0.0 or sigma.numel() == 0:
        return mu
    k = torch.arange(1, sigma.numel() + 1, dtype=sigma.dtype, device=sigma.device)
    tau = mu * sigma.cumsum(0) / (1 + mu * k)
    after = torch.cat([sigma[1:], sigma.new_zeros(1)])
    return float(tau[int((after <= tau).int().argmax())])


def _shrink(x: Any, what: str, mu: float, kind: str, warm: torch.Tensor | None) -> SoftThreshold:
    import torch

    from ...adapters.model import Factors

    if isinstance(x, Factors):
        return _shrink_factors(x, what, mu, kind)
    matrix = check_matrix(x, what)
    m, n = matrix.shape
    tall = matrix if m >= n else matrix.mT
    side = min(m, n)
    if warm is not None and (warm.ndim != 2 or warm.shape[0] != side):
        raise ArgumentError(
            f"warm does not fit {what}",
            code="argument",
            tensor=what,
            expected=f"({side}, k)",
            got=str(tuple(warm.shape)),
        )
    if mu > 0 and side > SMALL and isinstance(tall, torch.Tensor) and tall.dtype == torch.float32:
        found = triplets_above(tall, lambda s: threshold(s, mu, kind), warm)
        if found is not None:
            (u, s, w), basis = found
            left = s - threshold(s, mu, kind)
            y = (u * left.to(u.dtype)) @ w.mT
            return SoftThreshold(y if m >= n else y.mT, float(left.sum()), int(left.numel()), basis, "above")
    values, vectors = torch.linalg.eigh(gram(tall))
    sigma, basis = values.clamp_min(0).sqrt().flip(0), vectors.flip(1)
    left = (sigma - threshold(sigma, mu, kind)).clamp_min(0)
    rank = int((left > 0).sum())
    helpful = basis[:, : rank + rank // 4 + 8].to(matrix.dtype)
    if mu == 0.0:
        return SoftThreshold(matrix, float(sigma.sum()), rank, helpful, "none")
    weights = left[:rank] / sigma[:rank]
    root = basis[:, :rank] * weights.sqrt()
    # The operator has norm 1 or less: nothing is lost by a product in the matrix's own dtype.
    shrunk = times(tall, (root @ root.mT).to(matrix.dtype), matrix.dtype)
    return SoftThreshold(cut_like(shrunk if m >= n else shrunk.mT, matrix), float(left.sum()), rank, helpful, "gram")


def _shrink_factors(x: Factors, what: str, mu: float, kind: str) -> SoftThreshold:
    from ...adapters.model import Factors

    check_matrix(x.b, f"b of {what}")
    check_matrix(x.a, f"a of {what}")
    left, right = tall_qr(x.b), tall_qr(x.a.mT)  # equal columns: b and a need no balance
    core = small_svd(left.r @ right.r.mT)
    s = core.s[: core.rank]
    shrunk = (s - threshold(s, mu, kind)).clamp_min(0)
    rank = int((shrunk > 0).sum())
    if mu == 0.0:
        return SoftThreshold(x, float(s.sum()), rank, None, "none")
    b = left.q @ (core.u[:, :rank] * shrunk[:rank]).to(x.b.dtype)
    a = core.vh[:rank].to(x.a.dtype) @ right.q.mT
    return SoftThreshold(Factors(b, a), float(shrunk.sum()), rank, None, "core")
