"""Common coordinates of several low-rank matrices: every B_t A_t as u M_t v with shared orthonormal u and v."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from ..adapters.model import Delta, Factors

__all__ = ["Core", "all_factors", "core_of", "small_gap", "weighted"]


@dataclass(frozen=True)
class Core:
    """Coordinates of T products: B_t A_t = u @ left[t] @ right[t] @ v.

    u : (m, p), v : (s, n), orthonormal columns and rows, in the factors' dtype. left : (p, r_t) each, right : (r_t, s),
    float64. gap : smallest difference of neighbouring singular values of either stack beside its largest, 1 where the
    bases are not singular ones.
    """

    u: torch.Tensor
    v: torch.Tensor
    left: tuple[torch.Tensor, ...]
    right: tuple[torch.Tensor, ...]
    gap: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """(p, s)."""
        return int(self.u.shape[1]), int(self.v.shape[0])

    def tasks(self) -> list[torch.Tensor]:
        """The core matrices M_t, (p, s), float64."""
        return [b @ a for b, a in zip(self.left, self.right, strict=True)]

    def expand(self, core: torch.Tensor) -> Factors:
        """U @ core @ v in factors, at the rank of the smaller side."""
        from ..adapters.model import Factors

        p, s = self.shape
        core = core.to(self.u.dtype)
        return Factors(self.u @ core, self.v) if s <= p else Factors(self.u, core @ self.v)


def all_factors(deltas: Sequence[Delta]) -> list[Factors] | None:
    """The deltas in one dtype, if every one is in factors. A lazy sequence is walked once."""
    import torch

    from ..adapters.model import Factors

    found = []
    for delta in deltas:
        if not isinstance(delta, Factors):
            return None
        found.append(delta)
    wide = torch.float64 if any(torch.float64 in (f.b.dtype, f.a.dtype) for f in found) else torch.float32
    return [Factors(f.b.to(wide), f.a.to(wide)) for f in found]


def weighted(factors: Sequence[Factors], weights: Sequence[float]) -> list[Factors]:
    """w_t B_t A_t, the weight in B."""
    from ..adapters.model import Factors

    return [f if w == 1.0 else Factors(f.b * w, f.a) for f, w in zip(factors, weights, strict=True)]


def core_of(factors: Sequence[Factors], *, singular: bool = False) -> Core:
    """Bases of [B_1 .. B_T] and of the stacked A_t, and the products in them.

    singular : singular bases, ordered by singular value and with the signs that `small_svd` gives vectors, instead of
    any orthonormal ones.
    """
    import torch

    from ..ops import balance

    b = torch.cat([f.b for f in factors], dim=1)
    a = torch.cat([f.a for f in factors], dim=0)
    # Without it, a small column of B beside a large row of A would be taken for one that depends on the others.
    level_b, level_a = balance(b, a)
    u, left, gap = _basis(level_b, b, singular)
    v, right, other = _basis(level_a.mT, a.mT, singular)
    ranks = [f.rank for f in factors]
    return Core(u, v.mT, torch.split(left, ranks, 1), torch.split(right.mT, ranks, 0), min(gap, other))


def _basis(level: torch.Tensor, x: torch.Tensor, singular: bool) -> tuple[torch.Tensor, torch.Tensor, float]:
    """An orthonormal basis q (d, p) of the columns of x, their coordinates (p, c), and the smallest gap.

    level : x with its columns scaled, of which the basis is computed. The singular basis is that of x itself.
    """
    from ..ops import small_eigh, small_svd, tall_qr
    from ..ops.spectral.small import fix_signs

    d, c = x.shape
    if c <= d:
        found = tall_qr(level)
        q = found.q
        # The columns of x and of `level` differ by powers of two alone.
        scale = _scale(level, x)
        coordinates = found.r * scale
    else:
        wide = level.double()
        eigh = small_eigh(wide @ wide.mT, tol=1e-12)
        q = eigh.vectors[:, : eigh.rank].to(x.dtype)
        coordinates = eigh.vectors[:, : eigh.rank].mT @ x.double()
    # A zero column has no coordinates; left to rounding, it would take part in votes.
    there = (x != 0).any(0)
    if not singular or q.shape[1] == 0:
        return q, coordinates * there, 1.0
    svd = small_svd(coordinates)
    q, coordinates = fix_signs(q.double() @ svd.u, svd.u.mT @ coordinates)
    return q.to(x.dtype), coordinates * there, small_gap(svd.s)


def _scale(level: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Per column the power of two that turns `level` into x."""
    import torch

    top = level.abs().argmax(0, keepdim=True)
    a, b = level.gather(0, top)[0].double(), x.gather(0, top)[0].double()
    return torch.where(a == 0, torch.ones_like(a), b / a)


def small_gap(s: Any) -> float:
    """The smallest difference of neighbouring singular values (falling), beside the largest; 1 for fewer than two."""
    if len(s) < 2 or float(s[0]) == 0.0:
        return 1.0
    return float((s[:-1] - s[1:]).min() / s[0])
