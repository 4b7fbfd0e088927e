"""The shared left basis of several matrices (KnOTS), and each matrix in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..factor_space import all_factors, small_gap

if TYPE_CHECKING:
    import torch

    from ...adapters.model import Delta, Factors

__all__ = ["Small", "Tied", "tie"]

_GOOD = 1e-4
"""Least singular value, beside the largest, of a stack (columns scaled to one norm) whose Gram serves as well as QR."""


@dataclass(frozen=True)
class Small:
    """What is small about the shared basis of matrices in factors: enough to have it again without decomposing.

    coefficients : u^T [B_1 .. B_T], (rank, R), float64. back : u = [B_1 .. B_T] back, (R, rank). s, gap : as in `Tied`.
    """

    coefficients: torch.Tensor
    back: torch.Tensor
    s: torch.Tensor
    gap: float


@dataclass(frozen=True)
class Tied:
    """[D_1 .. D_T] = u diag(s) v^T, cut at the rank; Z_t = u^T D_t.

    u : (m, rank), orthonormal columns, float64, the entry of largest magnitude in each positive; None if not asked for.
    s : (rank,), falling, float64. gap : smallest difference of neighbouring s beside the largest. coefficients :
    u^T B_t (rank, r_t), of matrices in factors, float64; none of dense ones, whose Z_t are u^T D_t. small : where the
    basis came from a well conditioned stack of factors.
    """

    u: torch.Tensor | None
    s: torch.Tensor
    gap: float
    coefficients: tuple[torch.Tensor, ...]
    deltas: tuple[Delta, ...]
    shape: tuple[int, int]
    small: Small | None = None

    @property
    def rank(self) -> int:
        """Columns of u."""
        return int(self.s.shape[0])

    def basis(self) -> torch.Tensor:
        """The basis u."""
        assert self.u is not None
        return self.u

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
        left = self.basis()[:, first:last].mT.to(dtype)
        return [left @ _dense(d).to(dtype) for d in self.deltas]


def tie(
    deltas: Sequence[Delta], cut: float | None, absolute: bool, small: Small | None = None, basis: bool = True
) -> Tied:
    """The left singular basis of the matrices side by side.

    deltas : of one shape (m, n), at least one; factors unless any is dense. cut : singular values at or below it go,
    relative to the largest or absolute; default `rank_cut` of the matrix that is decomposed. small : of an earlier call
    on the same matrices. basis : False leaves u out where it is not needed.
    """
    import torch

    factors = all_factors(deltas)
    if factors is None:
        return _tie_dense([_dense(d) for d in deltas], cut, absolute)
    m, n = factors[0].shape
    ranks = [f.rank for f in factors]
    b = torch.cat([f.b for f in factors], dim=1)
    u: torch.Tensor | None = None
    if b.shape[1] == 0:
        wide = b.double()
        return Tied(wide, wide.new_zeros(0), 1.0, tuple(wide.new_zeros(0, 0) for _ in factors), tuple(factors), (m, n))
    if small is None:
        small, u = _from_gram(b, factors, cut, absolute)
    elif basis:
        u = b.double() @ small.back
    if small is not None:
        parts = torch.split(small.coefficients, ranks, 1)
        return Tied(u, small.s, small.gap, parts, tuple(factors), (m, n), small)
    u, coefficients, s = _from_qr(b, factors, cut, absolute)
    return Tied(u, s, small_gap(s), torch.split(coefficients, ranks, 1), tuple(factors), (m, n))


def _from_gram(
    b: torch.Tensor, factors: Sequence[Factors], cut: float | None, absolute: bool
) -> tuple[Small | None, torch.Tensor | None]:
    """By the float64 Grams of the stacked B and of each A; nothing where their conditions do not allow it.

    An error of eps in a Gram moves a singular value sigma by eps sigma_1^2 / (2 sigma): below 1e-10 sigma_1 as long as
    sigma is above 1e-6 sigma_1.
    """
    import torch

    if b.shape[1] > b.shape[0]:
        return None, None
    wide = b.double()
    triangle = _cholesky(wide.mT @ wide)
    if triangle is None:
        return None, None
    lower = []
    for f in factors:
        if f.rank:
            a = f.a.double()
            found = _cholesky(a @ a.mT)
            if found is None:
                return None, None
            lower.append(found.mT)
        else:
            lower.append(b.new_zeros(0, 0, dtype=torch.float64))
    w, s, k = _left(triangle, lower, [f.rank for f in factors], cut, absolute, b.dtype)
    back = torch.linalg.solve_triangular(triangle, w[:, :k], upper=True)
    u = wide @ back
    u, w = _signed(u, w[:, :k].mT)
    # The signs are in w now; solving again is cheaper than finding them out.
    back = torch.linalg.solve_triangular(triangle, w.mT, upper=True)
    coefficients = (w @ triangle) * (b != 0).any(0)
    return Small(coefficients, back, s[:k], small_gap(s[:k])), u


def _cholesky(gram: torch.Tensor) -> torch.Tensor | None:
    """The upper triangle r with r^T r = gram, if its columns, scaled to one norm, are independent enough."""
    import torch

    norms = gram.diagonal().sqrt()
    if not bool((norms > 0).all()):
        return None
    level = gram / norms / norms[:, None]
    values = torch.linalg.eigvalsh(level)
    if float(values[0]) < _GOOD**2 * float(values[-1]):
        return None
    r, info = torch.linalg.cholesky_ex(level, upper=True)
    return r * norms if int(info) == 0 else None


def _from_qr(
    b: torch.Tensor, factors: Sequence[Factors], cut: float | None, absolute: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(u, u^T [B_1 .. B_T], s) by Householder reflections: exact to rounding, whatever the condition."""
    import torch

    wide = b.double()
    q, r = torch.linalg.qr(wide)
    # A_t A_t^T = L_t L_t^T, so D_t and B_t L_t have one left basis; a wide L_t (r_t > n) serves as well.
    lower = [torch.linalg.qr(f.a.double().mT, mode="r")[1].mT for f in factors]
    w, s, k = _left(r, lower, [f.rank for f in factors], cut, absolute, b.dtype)
    u, w = _signed(q @ w[:, :k], w[:, :k].mT)
    # A zero column has no coordinates; left to rounding, it would take part in votes.
    return u, (w @ r) * (b != 0).any(0), s[:k]


def _left(
    r: torch.Tensor,
    lower: Sequence[torch.Tensor],
    ranks: list[int],
    cut: float | None,
    absolute: bool,
    narrow: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(left singular vectors, singular values, rank) of [r_1 L_1 .. r_T L_T]."""
    import torch

    from ...ops import rank_cut

    joint = torch.cat([part @ low for part, low in zip(torch.split(r, ranks, 1), lower, strict=True)], dim=1)
    u, s, _ = torch.linalg.svd(joint, full_matrices=False)
    rows, columns = joint.shape
    default = rank_cut(rows, columns, torch.float64 if narrow == torch.float64 else None)
    return u, s, _rank(s, default if cut is None else cut, absolute and cut is not None)


def _tie_dense(deltas: Sequence[torch.Tensor], cut: float | None, absolute: bool) -> Tied:
    """Of dense matrices: by the Gram of the short side, which is m where T n >= m."""
    import torch

    from ...ops import rank_cut

    m, n = deltas[0].shape
    if m <= n * len(deltas):
        gram = deltas[0].double() @ deltas[0].double().mT
        for d in deltas[1:]:
            wide = d.double()
            gram.addmm_(wide, wide.mT)
        values, vectors = torch.linalg.eigh(gram)
        s, u = values.clamp_min(0).sqrt().flip(0), vectors.flip(1)
    else:
        u, s, _ = torch.linalg.svd(torch.cat([d.double() for d in deltas], dim=1), full_matrices=False)
    default = rank_cut(m, n * len(deltas))
    k = _rank(s, default if cut is None else cut, absolute and cut is not None)
    u, _ = _signed(u[:, :k], u[:, :k].mT)
    return Tied(u, s[:k], small_gap(s[:k]), (), tuple(deltas), (m, n))


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
