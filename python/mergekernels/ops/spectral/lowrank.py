"""Best approximations of low rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, overload

from ...adapters.model import Factors
from ...errors import ArgumentError
from ._arguments import check_size, per_matrix
from ._cores import cores_of
from ._inputs import Input, as_map
from ._maps import Map
from ._pairs import Pairs, leading
from .batching import in_threads
from .small import fix_signs, signs_of

if TYPE_CHECKING:
    import torch

__all__ = ["LowRank", "lowrank"]

Spread = Literal["b", "sqrt", "a"]
Route = Literal["auto", "core", "implicit", "dense", "whole"]


@dataclass(frozen=True)
class LowRank:
    """A matrix cut to low rank.

    factors : b (m, k) and a (k, n), float32 (float64 for float64 input); b @ a is the approximation.
    singular_values : of X, the k that were kept, float64, falling, on the CPU.
    kept_energy : share of ||X||_F^2 in the approximation, in [0, 1]; 1 for a zero matrix.
    error : ||X - b a||_F / ||X||_F, measured in float64 before the factors are rounded; 0 for a zero matrix.
    route : "core" (the factors' triangles), "implicit" (iteration on factors or a mix), "dense" (iteration on the dense
    matrix), "whole" (all singular values), "none" (nothing to decompose).
    """

    factors: Factors
    singular_values: torch.Tensor
    kept_energy: float
    error: float
    route: str


@overload
def lowrank(
    X: Input, rank: int | None = ..., energy: float | None = ..., spread: Spread = ..., route: Route = ...
) -> LowRank: ...
@overload
def lowrank(
    X: Sequence[Input],
    rank: int | Sequence[int] | None = ...,
    energy: float | None = ...,
    spread: Spread = ...,
    route: Route = ...,
) -> list[LowRank]: ...
def lowrank(
    X: Input | Sequence[Input],
    rank: int | Sequence[int] | None = None,
    energy: float | None = None,
    spread: Spread = "b",
    route: Route = "auto",
) -> LowRank | list[LowRank]:
    """The best approximation of each matrix with at most `rank` singular values, as factors.

    X : one matrix or a list of matrices of any shapes: a tensor (m, n), Sharded, Factors, or a Mix of weighted products
    and dense matrices. 16-bit input is computed in float32.
    rank : at most so many singular values, 0 to min(m, n); for a list one number or one per matrix. The result has
    fewer where the matrix has fewer above the relative cut of its rank (`rank_cut`).
    energy : the least number of values whose sum of squares reaches this share of ||X||_F^2, in (0, 1]; with `rank` the
    smaller of both. One of the two must be given.
    spread : where the singular values go: "b" (b = U S, a = V^T), "sqrt" (their root on both sides), "a" (b = U).
    route : by default the one with the fewest operations; see LowRank.route.
    Returns LowRank, or a list of them. In each column of U the entry of largest magnitude is positive.
    Promise: ||X - b a||_F <= (1 + 1e-4) times the least possible + 1e-6 ||X||_F; by the routes "core" and "whole" the
    least possible + 1e-6 ||X||_F; the least possible with values above the cut of the rank only. Where
    sigma_{k+1} < 0.99 sigma_k, b a is the truncation to 1e-5 ||b a||_F.
    Errors: ArgumentError, DataError for NaN or Inf.
    Source: factored truncation by QR and a small SVD; block Krylov iteration (Musco and Musco, 2015).
    """
    if spread not in ("b", "sqrt", "a"):
        raise ArgumentError("unknown spread", code="argument.spread", expected="b, sqrt or a", got=str(spread))
    single, items, ranks = per_matrix(X, rank, "rank")
    done = {} if single or energy is not None or route != "auto" else _together(items, ranks, spread)
    left = [i for i in range(len(items)) if i not in done]
    maps = [as_map(items[i], "X" if single else f"X[{i}]") for i in left]
    sizes = [check_size(m, ranks[i], energy, "rank") for m, i in zip(maps, left, strict=True)]

    def one(task: tuple[Map, int]) -> LowRank:
        pairs = leading(task[0], task[1], energy, strict=False, tol=1e-5, route=route)
        return _factors(pairs, task[0].dtype, spread)

    done |= zip(left, in_threads(list(zip(maps, sizes, strict=True)), one), strict=True)
    return done[0] if single else [done[i] for i in range(len(items))]


def _together(items: Sequence[Input], ranks: Sequence[int | None], spread: str) -> dict[int, LowRank]:
    """Those that are products of equal shape, by position."""
    done: dict[int, LowRank] = {}
    for cores in cores_of(items, ranks):
        us, vh = cores.us, cores.vh
        signs = signs_of(us)
        us.mul_(signs)
        vh.mul_(signs.mT)
        s = cores.squares[:, : us.shape[2]].sqrt().to(us)
        if spread != "b":
            move = (s.sqrt() if spread == "sqrt" else s).clamp_min(1e-38)
            us, vh = us / move[:, None, :], vh * move[:, :, None]
        totals = cores.squares.sum(1).tolist()
        for i, (position, k) in enumerate(zip(cores.positions, cores.found, strict=True)):
            squares = cores.squares[i]
            lost = min(1.0, float(squares[k:].sum()) / totals[i])
            factors = Factors(us[i, :, :k].contiguous(), vh[i, :k].contiguous())
            done[position] = LowRank(factors, squares[:k].sqrt(), 1.0 - lost, math.sqrt(lost), "core")
    return done


def _factors(pairs: Pairs, dtype: torch.dtype, spread: str) -> LowRank:
    import torch

    s = pairs.values[: pairs.k].to(pairs.us.device)
    us, vh = fix_signs(pairs.us, pairs.v.mT)
    # From U S and V^T to the spread asked for.
    move = torch.ones_like(s) if spread == "b" else s.sqrt() if spread == "sqrt" else s
    factors = Factors((us / move).to(dtype).contiguous(), (vh * move[:, None]).to(dtype).contiguous())
    lost = min(1.0, pairs.lost / pairs.total) if pairs.total > 0.0 else 0.0
    return LowRank(factors, pairs.values[: pairs.k], 1.0 - lost, math.sqrt(lost), pairs.route)
