"""Best approximations of low rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, overload

from ...adapters.model import Factors
from ...errors import ArgumentError
from ._maps import FactorMap, Map, Matrix, as_map

if TYPE_CHECKING:
    import torch

__all__ = ["LowRank", "lowrank"]

Spread = Literal["b", "sqrt", "a"]


@dataclass(frozen=True)
class LowRank:
    """A matrix cut to low rank.

    factors : b (m, k), a (k, n) in the matrix's dtype; the product is the approximation. singular_values : its k
    singular values, float64, falling, on the CPU. kept_energy : their sum of squares over that of the matrix, in
    [0, 1]; 1 for a zero matrix. error : ||X - b a||_F / ||X||_F, 0 for a zero matrix. route : how it was computed.
    """

    factors: Factors
    singular_values: torch.Tensor
    kept_energy: float
    error: float
    route: str


@overload
def lowrank(
    X: Matrix, rank: int | None = ..., energy: float | None = ..., spread: Spread = ..., route: str = ...
) -> LowRank: ...
@overload
def lowrank(
    X: Sequence[Matrix],
    rank: int | Sequence[int] | None = ...,
    energy: float | None = ...,
    spread: Spread = ...,
    route: str = ...,
) -> list[LowRank]: ...
def lowrank(
    X: Matrix | Sequence[Matrix],
    rank: int | Sequence[int] | None = None,
    energy: float | None = None,
    spread: Spread = "b",
    route: str = "auto",
) -> LowRank | list[LowRank]:
    """The best approximation of each matrix with at most `rank` singular values, as factors.

    X : one matrix or a list of matrices of any shapes: a tensor (m, n), Factors, or a Mix.
    rank : at most so many singular values, 0 <= rank <= min(m, n); for a list of matrices one number or one per
    matrix. The result has fewer where the matrix has fewer above the relative cut of its rank.
    energy : the least number of values whose sum of squares reaches this share of the matrix's, in (0, 1]. With `rank`
    too, the smaller of both. One of the two must be given.
    spread : where the singular values go: "b" (b = U S, a = V^T), "sqrt" (the root on both sides), "a".
    In each column of U the entry of largest magnitude is positive.
    Errors: ArgumentError, DataError for NaN or Inf.
    """
    single = not isinstance(X, (list, tuple))
    items: Sequence[Matrix] = [X] if single else X  # type: ignore[list-item,assignment]
    ranks = list(rank) if isinstance(rank, Sequence) else [rank] * len(items)
    if len(ranks) != len(items):
        raise ArgumentError(
            "rank must be one number or one per matrix", code="argument.rank", expected=str(len(items)),
            got=str(len(ranks)),
        )  # fmt: skip
    maps = [as_map(x, "X" if single else f"X[{i}]") for i, x in enumerate(items)]
    for m, r in zip(maps, ranks, strict=True):
        _check(m, r, energy, spread)
    results = [_exact(m, r, energy, spread) for m, r in zip(maps, ranks, strict=True)]
    return results[0] if single else results


def _check(x: Map, rank: int | None, energy: float | None, spread: str) -> None:
    if rank is None and energy is None:
        raise ArgumentError("give rank, energy or both", code="argument.rank")
    if rank is not None and not 0 <= rank <= min(x.shape):
        raise ArgumentError(
            "rank out of range", code="argument.rank", expected=f"0 to {min(x.shape)}, the smaller side", got=str(rank)
        )
    if energy is not None and not 0.0 < energy <= 1.0:
        raise ArgumentError("energy out of range", code="argument.energy", expected="(0, 1]", got=str(energy))
    if spread not in ("b", "sqrt", "a"):
        raise ArgumentError("unknown spread", code="argument.spread", expected="b, sqrt or a", got=str(spread))


def _exact(x: Map, rank: int | None, energy: float | None, spread: str) -> LowRank:
    """Through the whole spectrum: of the core of the factors, or of the dense matrix, in float64."""
    import torch

    if isinstance(x, FactorMap):
        qb, rb = torch.linalg.qr(x.b.to(torch.float64))
        qa, ra = torch.linalg.qr(x.a.T.to(torch.float64))
        u, s, vh = torch.linalg.svd(rb @ ra.T, full_matrices=False)
        u, vh, route = qb @ u, vh @ qa.T, "core"
    else:
        u, s, vh = torch.linalg.svd(x.dense().to(torch.float64), full_matrices=False)
        route = "svd"
    return _cut(x, u, s, vh, rank, energy, spread, route)


def _cut(
    x: Map, u: torch.Tensor, s: torch.Tensor, vh: torch.Tensor, rank: int | None, energy: float | None, spread: str,
    route: str,
) -> LowRank:  # fmt: skip
    """The leading triplets as factors; signs by the rule."""
    import torch

    total = x.norm2
    squares = s.cpu().square()
    tol = min(1e-5, max(x.shape) * 1.2e-7)
    k = int((s > tol * s[0]).sum()) if len(s) else 0
    if rank is not None:
        k = min(k, rank)
    if energy is not None and total > 0.0:
        reached = torch.cumsum(squares, 0) >= energy * total * (1.0 - 1e-12)
        k = min(k, int(reached.to(torch.int8).argmax()) + 1 if bool(reached.any()) else k)
    u, s, vh = u[:, :k], s[:k], vh[:k]
    if k:
        rows = u.abs().argmax(0)
        sign = torch.where(u.gather(0, rows[None])[0] < 0, -1.0, 1.0).to(u.dtype)
        u, vh = u * sign, vh * sign[:, None]
    left = s if spread == "b" else s.sqrt() if spread == "sqrt" else torch.ones_like(s)
    right = s if spread == "a" else s.sqrt() if spread == "sqrt" else torch.ones_like(s)
    factors = Factors((u * left).to(x.dtype), (vh * right[:, None]).to(x.dtype))
    kept = min(1.0, float(squares[:k].sum()) / total) if total > 0.0 else 1.0
    return LowRank(factors, s.cpu(), kept, math.sqrt(max(0.0, 1.0 - kept)), route)
