"""`soft_threshold`: proximal maps of the nuclear norm."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ...errors import ArgumentError
from .batching import one_or_many
from .gram import gram, times
from .qr import tall_qr
from .sharded import check_matrix, cut_like
from .small import small_svd
from .stacking import balance

if TYPE_CHECKING:
    import torch

    from ...adapters.model import Factors

__all__ = ["SoftThreshold", "soft_threshold"]


@dataclass(frozen=True)
class SoftThreshold:
    """y : the shrunk matrix, like X. nuclear : its nuclear norm. rank : its rank."""

    y: Any
    nuclear: float
    rank: int


def soft_threshold(X: Any, mu: float, kind: Literal["plain", "squared"] = "plain") -> Any:
    """Shrinks singular values towards zero.

    X : a matrix (m, n) (2-D tensor, Sharded, or Factors), or a list of them. mu : >= 0. kind : "plain" subtracts mu
    from every singular value and keeps what stays positive, the minimiser of ||Y - X||_F^2 / 2 + mu ||Y||_*;
    "squared" the minimiser of ||Y - X||_F^2 + mu ||Y||_*^2, which subtracts mu ||Y||_*.
    Returns SoftThreshold, or a list of them; y is like X (tensor, Sharded cut alike, Factors).
    mu = 0 returns X itself, mu >= sigma_1 ("plain") exact zeros. Promise: within 1e-6 ||X||_F whatever the condition.
    Errors: ArgumentError, DataError for NaN or Inf.
    """
    if not (mu >= 0 and math.isfinite(mu)):
        raise ArgumentError("mu is out of range", code="argument", expected="a finite number >= 0", got=str(mu))
    if kind not in ("plain", "squared"):
        raise ArgumentError("kind is unknown", code="argument", expected="'plain' or 'squared'", got=repr(kind))
    return one_or_many(X, lambda x, what: _shrink(x, what, float(mu), kind))


def threshold(sigma: torch.Tensor, mu: float, kind: str) -> float:
    """What is subtracted from the falling singular values."""
    import torch

    if kind == "plain" or mu == 0.0 or sigma.numel() == 0:
        return mu
    k = torch.arange(1, sigma.numel() + 1, dtype=sigma.dtype, device=sigma.device)
    tau = mu * sigma.cumsum(0) / (1 + mu * k)
    after = torch.cat([sigma[1:], sigma.new_zeros(1)])
    return float(tau[int((after <= tau).int().argmax())])


def _shrink(x: Any, what: str, mu: float, kind: str) -> SoftThreshold:
    import torch

    from ...adapters.model import Factors

    if isinstance(x, Factors):
        return _shrink_factors(x, what, mu, kind)
    matrix = check_matrix(x, what)
    m, n = matrix.shape
    tall = matrix if m >= n else matrix.mT
    values, vectors = torch.linalg.eigh(gram(tall))
    sigma, basis = values.clamp_min(0).sqrt().flip(0), vectors.flip(1)
    tau = threshold(sigma, mu, kind)
    left = (sigma - tau).clamp_min(0)
    rank = int((left > 0).sum())
    if mu == 0.0:
        return SoftThreshold(matrix, float(sigma.sum()), rank)
    weights = left[:rank] / sigma[:rank]
    y = times(tall, (basis[:, :rank] * weights) @ basis[:, :rank].mT, matrix.dtype)
    return SoftThreshold(cut_like(y if m >= n else y.mT, matrix), float(left.sum()), rank)


def _shrink_factors(x: Factors, what: str, mu: float, kind: str) -> SoftThreshold:
    from ...adapters.model import Factors

    check_matrix(x.b, f"b of {what}")
    check_matrix(x.a, f"a of {what}")
    b, a = balance(x.b, x.a)
    left, right = tall_qr(b), tall_qr(a.mT)
    core = small_svd(left.r @ right.r.mT)
    s = core.s[: core.rank]
    shrunk = (s - threshold(s, mu, kind)).clamp_min(0)
    rank = int((shrunk > 0).sum())
    if mu == 0.0:
        return SoftThreshold(x, float(s.sum()), rank)
    b = left.q @ (core.u[:, :rank] * shrunk[:rank]).to(x.b.dtype)
    a = core.vh[:rank].to(x.a.dtype) @ right.q.mT
    return SoftThreshold(Factors(b, a), float(shrunk.sum()), rank)
