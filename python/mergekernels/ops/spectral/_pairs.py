"""Leading singular triplets of a map, by the cheapest route."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ...errors import ArgumentError
from ._blocks import orthonormal, root
from ._krylov import Ritz, Want, krylov
from ._maps import DenseMap, FactorMap, Map, MixMap, Wide, scaled, transposed
from ._plain import plain_eigh, suits
from .cuts import power_of_two, rank_cut
from .gram import gram

if TYPE_CHECKING:
    import torch

__all__ = ["ROUTES", "Pairs", "leading"]

ROUTES = ("auto", "core", "implicit", "dense", "whole")
STEEP = 30.0  # sigma_1 / sigma_k above which float32 products blur the last directions

EXACT = 3.0  # how much longer the core may take than an iteration: it gives the truncation itself
HEAD = 100.0  # sigma_1 / sigma_k above which an iteration with float32 products misses weak directions
SHORT = 1e-12  # share of energy, the square of what `lowrank` promises, that may be lost where fewer pairs are found
RANGE = 2.0**60  # norms between 1 / RANGE and RANGE have squares, and squares of these, far inside of float32
CLEAN = 1e-8  # share of energy outside below which X is as good as of low rank


@dataclass(frozen=True)
class Pairs:
    """k singular triplets.

    values : all singular values that are known, at least k, float64, falling, CPU. us : U S, (m, k). v : (n, k),
    orthonormal. Both float64 or X's dtype. total : ||X||_F^2. lost : ||X - us v^T||_F^2. residual, rounds : of the
    iteration, 0 where there is none. route : one of ROUTES but "auto".
    """

    values: torch.Tensor
    k: int
    us: torch.Tensor
    v: torch.Tensor
    total: float
    lost: float
    residual: float
    rounds: int
    route: str


def leading(
    x: Map, rank: int, energy: float | None, *, strict: bool, tol: float, warm: torch.Tensor | None = None,
    seed: int = 0, route: str = "auto",
) -> Pairs:  # fmt: skip
    """The leading triplets: at most `rank`, and the least that hold `energy`; see `lowrank` and `subspace`.

    warm : start vectors of the right side, (n, any).
    """
    import torch

    if route not in ROUTES:
        raise ArgumentError("unknown route", code="argument.route", expected=", ".join(ROUTES), got=str(route))
    if route == "core" and not isinstance(x, FactorMap):
        raise ArgumentError("the core route needs factors", code="argument.route", got="a dense matrix or a mix")
    if not rank or x.near_norm2 == 0.0:
        return _nothing(x, x.near_norm2)
    norm = math.sqrt(x.near_norm2)
    if not 1.0 / RANGE < norm < RANGE and math.isfinite(norm):
        power = math.frexp(norm)[1]
        back = 2.0**power
        small = scaled(x, -power)
        # A norm that is out of range still would come back for ever.
        if 1.0 / RANGE < math.sqrt(small.near_norm2) < RANGE:
            found = leading(small, rank, energy, strict=strict, tol=tol, warm=warm, seed=seed, route=route)
            return replace(
                found, values=found.values * back, us=found.us * back, total=found.total * back * back,
                lost=found.lost * back * back,
            )  # fmt: skip
    chosen = cheapest(x, rank, energy, warm is not None) if route == "auto" else route
    if chosen == "core":
        assert isinstance(x, FactorMap)
        return _core(x, rank, energy)
    if chosen == "dense" and not isinstance(x, DenseMap):
        x = DenseMap(x.dense())
    want = Want(rank, energy, x.near_norm2, rank_cut(*x.shape))
    flip = x.shape[0] < x.shape[1]
    if chosen in ("dense", "whole") and route == "auto" and suits(x, want, strict):
        sideways = transposed(x) if flip else x
        near = plain_eigh(sideways, want)
        if near is not None:
            return _polished(sideways, near, want, strict, flip, "plain")
        # A head: float32 products of an iteration would blur the many weaker directions that are wanted.
        chosen = "whole"
    if chosen == "whole":
        return _whole(x, rank, energy)
    if flip and warm is not None:
        warm = orthonormal(x.times(warm.to(device=x.device, dtype=x.dtype)))[0]
    sideways = transposed(x) if flip else x
    ritz = krylov(sideways, want, strict, tol, warm, seed)
    if ritz is not None:
        pairs = _polished(sideways, ritz, want, strict, flip, chosen)
        if x.dtype == torch.float64 or not (_short(pairs, want) or _steep(pairs)):
            return pairs
        # X^T X in float32 is known to 1e-7 of its head; what is far below needs products in float64.
        ritz = krylov(Wide(sideways), want, strict, tol, warm, seed)
    if ritz is not None:
        pairs = _polished(sideways, ritz, want, strict, flip, chosen)
        if not _short(pairs, want):
            return pairs
    return _core(x, rank, energy) if _thin(x) else _whole(x, rank, energy)  # type: ignore[arg-type]


def _steep(pairs: Pairs) -> bool:
    """Whether the pairs reach far below the first."""
    return pairs.k > 0 and float(pairs.values[0]) > HEAD * float(pairs.values[pairs.k - 1])


def _short(pairs: Pairs, want: Want) -> bool:
    """Whether there are fewer pairs than asked for although something is left."""
    if pairs.k >= want.rank or pairs.lost <= SHORT * pairs.total:
        return False
    return want.energy is None or pairs.total - pairs.lost < want.energy * pairs.total * (1.0 - 1e-12)


def cheapest(x: Map, rank: int, energy: float | None, warm: bool) -> str:
    """The route with the fewest operations, counted as float32 ones; float64 products count three times.

    Decompositions count as they were measured against products (LAPACK, one core): 30 n^3, and more when small.
    """
    m, n = x.shape
    small = min(m, n)
    k = rank if energy is None else min(rank, max(1, small // 8))
    inner = x.inner if isinstance(x, FactorMap) else x.factors.inner if isinstance(x, MixMap) else 0
    form = 2.0 * m * n * inner
    costs = {"whole": form + 6.0 * m * n * (small + k) + 30.0 * small**3}
    columns = 2.0 * k + 30.0 if warm else 6.0 * k + 100.0
    if 3 * k + 64 < 0.8 * small and small > 96:
        own = columns * 8.0 * small * (2.0 * k + 64.0) + 4.0 * 30.0 * (2.0 * k + 64.0) ** 3
        costs["dense"] = form + 4.0 * columns * m * n + own
        if inner:
            norm = min(form, 2.0 * (m + n) * inner**2)  # to know what is lost, without the product
            costs["implicit"] = norm + 4.0 * columns * x.work + own
    if isinstance(x, FactorMap):
        costs["core"] = ((m + n) * inner * (6.0 * inner + 12.0 * k) + 80.0 * inner**3) / EXACT
    return min(costs, key=lambda name: costs[name])


def _nothing(x: Map, total: float) -> Pairs:
    import torch

    m, n = x.shape
    us = torch.zeros((m, 0), dtype=x.dtype, device=x.device)
    v = torch.zeros((n, 0), dtype=x.dtype, device=x.device)
    return Pairs(torch.zeros(0, dtype=torch.float64), 0, us, v, total, total, 0.0, 0, "none")


def _thin(x: Map) -> bool:
    return isinstance(x, FactorMap) and x.inner <= min(x.shape)


def _core(x: FactorMap, rank: int, energy: float | None) -> Pairs:
    """Factors: everything in inner x inner, float64. Neither triangle is inverted, so dependent columns do no harm."""
    import torch

    if x.dtype == torch.float64:
        return _core_wide(x, rank, energy)
    left, right = x.grams
    # Units balanced by powers of two, exactly: a small column beside a large row still counts.
    balance = power_of_two((right.diagonal().clamp_min(1e-300) / left.diagonal().clamp_min(1e-300)).sqrt().sqrt())
    left, right = left * balance * balance[:, None], right / balance / balance[:, None]
    ra = root(right)
    # X^T X in the basis of a's rows; its values are known to 1e-16 of the largest, 1e-8 in sigma, far below the cut.
    half = left @ ra.mT
    core = ra @ half
    values, w = torch.linalg.eigh((core + core.mT) / 2)
    squares = values.flip(0).clamp_min(0.0).cpu()
    total = float(squares.sum())
    k = Want(rank, energy, total, rank_cut(x.inner, x.inner)).count(squares)
    w = w.flip(1)[:, :k]
    # U S = X V = b (ra^T w), and V S^2 = X^T U S = a^T (G_b ra^T w): no triangle is inverted.
    b, a = x.wide
    us = b @ (balance[:, None] * (ra.mT @ w))
    v = (((half @ w) / balance[:, None] / squares[:k].to(w.device)).mT @ a).mT
    return Pairs(squares.sqrt(), k, us, v, total, float(squares[k:].sum()), 0.0, 0, "core")


def _core_wide(x: FactorMap, rank: int, energy: float | None) -> Pairs:
    """Float64 factors: Householder QR, which does not square the condition."""
    import torch

    qb, rb = torch.linalg.qr(x.b)
    qa, ra = torch.linalg.qr(x.a.mT)
    p, s, w = torch.linalg.svd(rb @ ra.mT, full_matrices=False)
    squares = s.cpu().square()
    total = float(squares.sum())
    k = Want(rank, energy, total, rank_cut(int(rb.shape[0]), int(rb.shape[1]), torch.float64)).count(squares)
    us, v = qb @ (p[:, :k] * s[:k]), qa @ w[:k].mT
    return Pairs(s.cpu(), k, us, v, total, float(squares[k:].sum()), 0.0, 0, "core")


def _whole(x: Map, rank: int, energy: float | None) -> Pairs:
    """The whole spectrum: of the float64 Gram of the smaller side, or by LAPACK for float64 input."""
    import torch

    total = x.norm2
    if x.dtype == torch.float64:
        u, s, w = torch.linalg.svd(x.dense(), full_matrices=False)
        squares = s.cpu().square()
        k = Want(rank, energy, total, rank_cut(*x.shape, torch.float64)).count(squares)
        return Pairs(s.cpu(), k, u[:, :k] * s[:k], w[:k].mT, total, float(squares[k:].sum()), 0.0, 0, "whole")
    matrix = x.x if isinstance(x, DenseMap) else x.dense()
    flip = x.shape[0] < x.shape[1]
    if flip:
        matrix = matrix.mT
    values, vectors = torch.linalg.eigh(gram(matrix))
    squares = values.flip(0).clamp_min(0.0).cpu()
    k = Want(rank, energy, total, rank_cut(*x.shape)).count(squares)
    v = vectors.flip(1)[:, :k]
    us = DenseMap(matrix).times(v)
    lost = float(squares[k:].sum())
    if flip:
        s = squares[:k].sqrt().to(v.device)
        us, v = v * s, us / s
    return Pairs(squares.sqrt(), k, us, v, total, lost, 0.0, 0, "whole")


def _polished(x: Map, found: Ritz, want: Want, strict: bool, flip: bool, route: str) -> Pairs:
    """The pairs once more from X V itself, which knows small singular values that X^T X has lost."""
    import torch

    q, y, squares, z = _again(x, orthonormal(found.basis)[0])
    k = want.count(squares)
    total = want.total
    lost = total - float(squares[:k].sum())
    steep = strict and k and float(squares[0]) > STEEP**2 * float(squares[k - 1])
    if x.dtype == torch.float32 and (steep or lost < CLEAN * total):
        # One step in float64: float32 products leave 1e-6 of what lies outside, and blur weak directions.
        w = x.adjoint(x.times((q @ z.to(q)).to(torch.float64)))
        w = w / torch.linalg.vector_norm(w, dim=0).clamp_min(1e-300)
        q, y, squares, z = _again(x, orthonormal(orthonormal(w)[0])[0])
        k = want.count(squares)
    v, us = q.to(torch.float64) @ z[:, :k], y.to(torch.float64) @ z[:, :k]
    if lost < 1e-3 * total and k:
        total = x.norm2
        # Little is lost: that of the float32 basis and exact products, by its definition.
        v = v.to(x.dtype).to(torch.float64)
        us = x.times(v)
        own = us.mT @ us
        lost = total - 2.0 * float(own.diagonal().sum()) + float((own * (v.mT @ v)).sum())
    s = squares[:k].sqrt().to(v.device)
    if flip:
        us, v = v * s, us / s
    return Pairs(squares.sqrt(), k, us, v, total, max(0.0, lost), found.residual, found.rounds, route)


def _again(x: Map, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The basis q, y = X q, the squared singular values of y (falling, CPU) and its right singular vectors."""
    import torch

    y = x.times(q)
    wide = y.to(torch.float64)
    values, vectors = torch.linalg.eigh(wide.mT @ wide)
    return q, y, values.flip(0).clamp_min(0.0).cpu(), vectors.flip(1)
