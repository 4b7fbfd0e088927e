"""Merged task vectors to factors of a rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..errors import ArgumentError
from .model import Factors

if TYPE_CHECKING:
    from .model import Delta

__all__ = ["Cut", "check_cut", "exact_factors", "truncated", "with_signs"]

Spread = Literal["b", "sqrt", "a"]


@dataclass(frozen=True)
class Cut:
    """Factors of a merged task vector. kept_energy : share of its sum of squares that they hold, in [0, 1]."""

    factors: Factors
    kept_energy: float
    route: str


def check_cut(rank: object, energy: object, spread: object) -> None:
    """Refuse a rank, an energy or a spread that nothing can have.

    Raises
    ------
    ArgumentError : rank is no integer of at least 1, energy no number in (0, 1], both are given, or spread is none of
        "b", "sqrt" and "a".
    """
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise ArgumentError("rank is not usable", code="rank", expected="an integer of at least 1", got=repr(rank))
    number = isinstance(energy, (int, float)) and not isinstance(energy, bool)
    if energy is not None and not (number and 0.0 < float(energy) <= 1.0):  # type: ignore[arg-type]
        raise ArgumentError("energy is not usable", code="energy", expected="a number in (0, 1]", got=repr(energy))
    if rank is not None and energy is not None:
        raise ArgumentError("rank and energy are both given", code="rank", expected="one of them", got="both")
    if spread not in ("b", "sqrt", "a"):
        raise ArgumentError("spread is not usable", code="spread", expected="'b', 'sqrt' or 'a'", got=repr(spread))


def truncated(deltas: Sequence[Delta], rank: int | None, energy: float | None, spread: Spread) -> list[Cut]:
    """The best approximations of the matrices at a rank (as far as they have it), or with a share of their energy."""
    from ..ops.spectral.lowrank import lowrank

    shapes = [tuple(d.shape) for d in deltas]
    ranks = None if rank is None else [min(rank, *shape) for shape in shapes]
    return [Cut(r.factors, r.kept_energy, r.route) for r in lowrank(list(deltas), ranks, energy, spread)]


def exact_factors(delta: Delta) -> Cut:
    """Factors whose product is the matrix itself: of a dense one the matrix and an identity."""
    import torch

    if isinstance(delta, Factors):
        return Cut(delta, 1.0, "exact")
    m, n = delta.shape
    if n <= m:
        return Cut(Factors(delta, torch.eye(n, dtype=delta.dtype, device=delta.device)), 1.0, "exact, dense")
    return Cut(Factors(torch.eye(m, dtype=delta.dtype, device=delta.device), delta), 1.0, "exact, dense")


def with_signs(factors: Factors) -> Factors:
    """The same product with the entry of largest magnitude in every column of b positive, the first among equals."""
    import torch

    if factors.rank == 0:
        return factors
    places = factors.b.abs().argmax(dim=0, keepdim=True)
    signs = torch.where(factors.b.gather(0, places)[0] < 0, -1.0, 1.0).to(factors.b.dtype)
    return Factors(factors.b * signs, factors.a * signs[:, None])
