"""Adapters of one module in common orthonormal bases: B_t A_t = Q_B M_t Q_A^T, with small M_t."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .._methods.adapters.clamp import clamping
from .._methods.matrix import Merged
from .align import Place
from .cutting import Limits
from .deltas import Deltas
from .job import Job
from .model import Factors
from .truncate import Cut, with_signs

if TYPE_CHECKING:
    import torch

__all__ = ["Core", "core_of", "cut_cores"]


@dataclass(frozen=True)
class Core:
    """One module. q_b (m, p), q_a (n, s): orthonormal columns. r_b (p, R), r_a (s, R), float64: the factors in these
    bases, so that sum of w_t B_t A_t = q_b (r_b diag(w) r_a^T) q_a^T. ranks : of the adapters, R is their sum.
    """

    place: Place
    q_b: torch.Tensor
    q_a: torch.Tensor
    r_b: torch.Tensor
    r_a: torch.Tensor
    ranks: tuple[int, ...]

    def matrix(self, weights: Sequence[float]) -> torch.Tensor:
        """r_b diag(w) r_a^T."""
        import torch

        each = torch.tensor(weights, dtype=self.r_b.dtype, device=self.r_b.device)
        columns = each.repeat_interleave(torch.tensor(self.ranks, device=self.r_b.device))
        return (self.r_b * columns) @ self.r_a.mT


def core_of(place: Place, deltas: Deltas) -> Core:
    """The bases and the factors in them."""
    from ..ops.spectral.qr import tall_qr
    from ..ops.spectral.stacking import balance, stack

    whole = stack([deltas[t] for t in range(len(deltas))])
    b, a = balance(whole.b, whole.a)
    left, right = tall_qr([b, a.mT.contiguous()])
    return Core(place, left.q, right.q, left.r, right.r, deltas.ranks)


def cut_cores(cores: Sequence[Core], job: Job, limits: Limits) -> Iterator[tuple[Place, Merged, Cut]]:
    """The best approximations of the weighted sums."""
    from ..ops.spectral.small import small_svd

    weights = [job.scale * w for w in job.params["weight"]]
    finish = clamping(job.params)
    rank = limits.rank if limits.asked else limits.largest
    for core, found in zip(cores, small_svd([core.matrix(weights) for core in cores]), strict=True):
        squares = found.s.square().cumsum(0)
        total = float(squares[-1]) if len(squares) else 0.0
        k = found.rank if rank is None else min(rank, found.rank)
        if limits.energy is not None and total > 0.0:
            k = min(found.rank, int((squares < limits.energy * total * (1.0 - 1e-12)).sum()) + 1)
        merged = Merged(Factors(core.q_b[:, :0], core.q_a[:, :0].mT))
        if k == 0:
            yield core.place, merged, Cut(merged.delta, 1.0, "zero")  # type: ignore[arg-type]
            continue
        u, s, vh = found.u[:, :k], found.s[:k], found.vh[:k]
        left = s if limits.spread == "b" else s.sqrt() if limits.spread == "sqrt" else s.new_ones(())
        right = s if limits.spread == "a" else s.sqrt() if limits.spread == "sqrt" else s.new_ones(())
        b = core.q_b @ (u * left).to(core.q_b.dtype)
        a = (vh * right.reshape(-1, 1) if right.dim() else vh).to(core.q_a.dtype) @ core.q_a.mT
        factors = with_signs(Factors(b, a))
        if finish is not None:
            factors = finish(factors)
        yield core.place, merged, Cut(factors, min(1.0, float(squares[k - 1]) / total), "prepared core")
