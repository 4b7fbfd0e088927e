"""The shared left basis of several matrices (KnOTS), and each matrix in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..factor_space import all_factors, small_gap

if TYPE_CHECKING:
    import torch

    from ...adapters.model import Delta, Factors

__all__ = ["Tied", "tie"]


@dataclass(frozen=True)
class Tied:
    """[D_1 .. D_T] = u diag(s) v^T, cut at the rank; Z_t = u^T D_t.

    u : (m, rank), orthonormal columns, float64, the entry of largest magnitude in each positive. s : (rank,), falling,
    float64. gap : smallest difference of neighbouring s beside the largest. coefficients : u^T B_t (rank, r_t), of
    matrices in factors, float64; none of dense ones, whose Z_t are u^T D_t.
    """

    u: torch.Tensor
    s: torch.Tensor
    gap: float
    coefficients: tuple[torch.Tensor, ...]
    deltas: tuple[Delta, ...]
    n: int

    @property
    def rank(self) -> int:
        """Columns of u."""
        return int(self.u.shape[1])

    def factored(self, dtype: torch.dtype) -> list[Factors] | None:
        """Each Z_t = (u^T B_t) A_t in factors; None for dense matrices."""
        from ...adapters.model import Factors

        factors = all_factors(self.deltas)
        if factors is None:
            return None
        return [Factors(c.to(dtype), f.a.to(dtype)) for c, f in zip(self.coefficients, factors, strict=True)]

    def rows(self, first: int, last: int, dtype: torch.dtype) -> list[torch.Tensor]:
        """Rows first .. last - 1 of every Z_t. The same bits whenever the same rows are asked for."""
        factored = self.factored(dtype)
        if factored is not None:
            return [f.b[first:last] @ f.a for f in factored]
        left = self.u[:, first:last].mT.to(dtype)
        return [left @ _dense(d).to(dtype) for d in self.deltas]


def tie(deltas: Sequence[Delta], cut: float | None, absolute: bool) -> Tied:
    """The left singular basis of the matrices side by side.

    deltas : of one shape (m, n), at least one; factors unless any is dense. cut : singular values at or below it go,
    relative to the largest or absolute; default `rank_cut` of the matrix that is decomposed.
    """
    import torch

    from ...ops import rank_cut, small_svd

    factors = all_factors(deltas)
    if factors is None:
        return _tie_dense([_dense(d) for d in deltas], cut, absolute)
    n = factors[0].shape[1]
    b = torch.cat([f.b for f in factors], dim=1).double()
    if b.shape[1] == 0:
        return Tied(b, b.new_zeros(0), 1.0, tuple(b.new_zeros(0, 0) for _ in factors), tuple(factors), n)
    # Triangles by Householder reflections in float64: the singular values, and with them the rank, are exact to
    # rounding, whatever the condition. A_t A_t^T = L_t L_t^T, so D_t and B_t L_t have one left basis.
    q, r = torch.linalg.qr(b)
    ranks = [f.rank for f in factors]
    parts = torch.split(r, ranks, 1)
    # qr of a wide A_t^T (more rows than columns in A_t) gives a wide triangle: its transpose still serves as L_t.
    lower = [torch.linalg.qr(f.a.double().mT, mode="r")[1].mT for f in factors]
    joint = torch.cat([part @ low for part, low in zip(parts, lower, strict=True)], dim=1)
    narrow = factors[0].b.dtype
    svd = small_svd(joint)
    rows, columns = joint.shape
    default = rank_cut(rows, columns, torch.float64 if narrow == torch.float64 else None)
    k = _rank(svd.s, default if cut is None else cut, absolute and cut is not None)
    u, w = _signed(q @ svd.u[:, :k], svd.u[:, :k].mT)
    # A zero column has no coordinates; left to rounding, it would take part in votes.
    there = torch.split((b != 0).any(0), ranks)
    coefficients = tuple((w @ part) * mask for part, mask in zip(parts, there, strict=True))
    return Tied(u, svd.s[:k], small_gap(svd.s[:k]), coefficients, tuple(factors), n)


def _tie_dense(deltas: Sequence[torch.Tensor], cut: float | None, absolute: bool) -> Tied:
    """Of dense matrices: by the Gram of the short side, which is m where T n >= m."""
    import torch

    from ...ops import rank_cut

    m, n = deltas[0].shape
    if m <= n * len(deltas):
        gram = sum((d.double() @ d.double().mT for d in deltas[1:]), deltas[0].double() @ deltas[0].double().mT)
        values, vectors = torch.linalg.eigh(gram)
        s, u = values.clamp_min(0).sqrt().flip(0), vectors.flip(1)
    else:
        u, s, _ = torch.linalg.svd(torch.cat([d.double() for d in deltas], dim=1), full_matrices=False)
    default = rank_cut(m, n * len(deltas))
    k = _rank(s, default if cut is None else cut, absolute and cut is not None)
    u, _ = _signed(u[:, :k], u[:, :k].mT)
    return Tied(u, s[:k], small_gap(s[:k]), (), tuple(deltas), n)


def _rank(s: torch.Tensor, cut: float, absolute: bool) -> int:
    if s.numel() == 0 or float(s[0]) == 0.0:
        return 0
    return int((s > (cut if absolute else cut * float(s[0]))).sum())


def _signed(u: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from ...ops.spectral.small import fix_signs

    return fix_signs(u, w)


def _dense(delta: Delta) -> torch.Tensor:
    from ...adapters.model import Factors

    return delta.dense() if isinstance(delta, Factors) else delta
