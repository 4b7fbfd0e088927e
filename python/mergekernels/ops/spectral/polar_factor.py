"""`polar`: the orthogonal direction of a matrix, without its singular vectors one by one."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from ...errors import ArgumentError
from .batching import groups, one_or_many
from .cuts import check_tol, rank_cut
from .factor_sides import both_sides, departure, product_of
from .gram import gram, inner, times
from .iterations import extremes, newton_schulz, probes, qdwh
from .qr import tall_qr
from .sharded import Matrix, Sharded, check_matrix, cut_like, dense, moderate
from .small import small_svd
from .split_gram import split_polar

if TYPE_CHECKING:
    import torch

    from ...adapters.model import Factors

__all__ = ["Polar", "polar"]

Route = Literal["auto", "core", "gram", "svd", "split", "newton_schulz", "qdwh"]
ROUTES = ("auto", "core", "gram", "svd", "split", "newton_schulz", "qdwh")

ACCEPT = 1e-5
"""Residual up to which an iteration's result is taken."""

FLOOR = 1e-6
"""Relative singular value below which a float64 Gram cannot tell a direction from rounding."""

LONG = 1.25
"""Aspect from which the Gram route is faster than LAPACK's float32 SVD on CPU ; both take about as long there."""

SHORT = 16.0
"""Aspect up to which a float32 Gram with a float64 block for weak directions is tried first on CPU."""

TINY = 128
"""Short side up to which LAPACK is as fast as anything."""

SMALL_ON_GPU = 2048
"""Short side up to which an eigendecomposition on a GPU is cheap enough to spare all doubt about the rank."""


@dataclass(frozen=True)
class Polar:
    """p = U V^T of X = U S V^T over the singular values above the cut: a partial isometry.

    p : like X (tensor, Sharded cut alike, or Factors), float32 (float64 for float64 input). rank : how many values
    are above the cut. nuclear : sum of these values, None unless asked for. residual : ||P P^T P - P||_F / sqrt(rank),
    estimated with eight random vectors. route : what computed it; "newton_schulz, gram" where the first one's result
    failed its check and the second one's is returned.
    """

    p: Any
    rank: int
    nuclear: float | None
    residual: float
    route: str


def polar(X: Any, tol: float | None = None, route: Route = "auto", nuclear: bool = False) -> Any:
    """The polar factor on the support of X (m, n): directions that X does not have do not appear in it.

    X : a matrix (2-D tensor of any float dtype, Sharded, or Factors), or a list of them.
    tol : directions with sigma <= tol * sigma_1 give zero; in [0, 1), default `rank_cut` of the matrix decomposed.
    nuclear : also the sum of the singular values.
    route : "auto" picks by device, shape and dtype. "core" (what Factors take): two `tall_qr` and a small SVD.
    "gram": eigenvectors of the float64 Gram of the short side; cuts below 1e-6 count as 1e-6. "svd": LAPACK or
    cuSOLVER. "split": eigenvectors of the Gram in the matrix's precision, weak directions in float64, for flat spectra
    of full rank; it gives any other spectrum to "svd" or "gram". "newton_schulz": fixed steps of degree 5, which can
    miss or keep values within a factor 4 below the cut. "qdwh": Halley steps for full rank. The last two check their
    result and rerun on "gram" where it fails; "auto" also does so wherever the rank is not full.
    Returns Polar, or a list of them.
    Promise: P is the exact factor of X + E on the support with ||E||_F <= 50 eps ||X||_F; so its error grows with the
    condition of the support, from 1e-5 (float32) at 1e2.
    Errors: ArgumentError, DataError for NaN or Inf.
    Source: Higham, Functions of Matrices (2008), chapter 8.
    """
    if route not in ROUTES:
        raise ArgumentError("unknown route", code="argument", expected=", ".join(ROUTES), got=repr(route))
    if tol is not None:
        check_tol(tol, 0.0)
    if isinstance(X, (list, tuple)) and (route == "newton_schulz" or _wants_batches(X, route)):
        return _batched(X, tol, route, nuclear)
    return one_or_many(X, lambda x, what: _polar(x, what, tol, route, nuclear))


def _polar(x: Any, what: str, tol: float | None, route: str, nuclear: bool) -> Polar:
    from ...adapters.model import Factors

    if isinstance(x, Factors):
        if route not in ("auto", "core"):
            raise ArgumentError(
                "factors have one route", code="argument", tensor=what, expected="'auto' or 'core'", got=repr(route)
            )
        return _core(x, what, tol, nuclear)
    if route == "core":
        raise ArgumentError("route 'core' is for Factors", code="argument", tensor=what, got=type(x).__name__)
    matrix = check_matrix(x, what)
    m, n = matrix.shape
    if m < n:  # everything below works on the short side as columns
        flat = _tall(matrix.mT, tol, route, nuclear)
        return replace(flat, p=flat.p.mT)
    return _tall(matrix, tol, route, nuclear)


def _auto(x: Matrix, tol: float) -> str:
    """The route for a tall matrix."""
    import torch

    m, n = x.shape
    if x.device.type != "cpu":
        if x.dtype == torch.float64 or tol < FLOOR:
            return "svd"
        return "gram" if n <= SMALL_ON_GPU else "newton_schulz"
    if isinstance(x, Sharded) and tol >= FLOOR:
        return "gram"  # the only one that needs no copy of the whole
    return "svd" if x.dtype == torch.float64 or tol < FLOOR or m < LONG * n else "gram"


def _may_split(x: Matrix, cut: float) -> bool:
    """Whether the split Gram is worth a try."""
    import torch

    m, n = x.shape
    plain = isinstance(x, torch.Tensor) and x.dtype == torch.float32 and x.device.type == "cpu"
    return plain and n > TINY and m < SHORT * n and cut >= FLOOR


def _inner(p: Matrix, x: Matrix) -> float:
    """<P, X>, the nuclear norm of X."""
    pairs = zip(_rows(p).parts, _rows(x).parts, strict=True)
    return sum(inner(q, y) for q, y in pairs)


def _tall(x: Matrix, tol: float | None, route: str, nuclear: bool) -> Polar:
    m, n = x.shape
    cut = check_tol(tol, rank_cut(m, n))
    strict = route == "auto"
    if strict:
        route = _auto(x, cut)
    if min(m, n) == 0:
        return Polar(x, 0, 0.0 if nuclear else None, 0.0, route)
    if route == "split" or (strict and _may_split(x, cut)):
        p = split_polar(dense(x), cut)
        if p is not None:
            return _finish(x, p, n, _inner(p, x) if nuclear else None, "split")
        if route == "split":
            other = "svd" if m < LONG * n else "gram"
            return replace(_tall(x, tol, other, nuclear), route=f"split, {other}")
    if route == "svd":
        return _svd(x, check_tol(tol, rank_cut(m, n, x.dtype)), nuclear)
    if route == "gram":
        return _gram(x, gram(x), cut, nuclear, "gram")
    rows = _rows(x)
    if route == "qdwh":
        return _qdwh(x, rows, cut, nuclear)
    made = Sharded(newton_schulz(list(rows.parts), cut), 0)
    return _checked(x, made, cut, nuclear, "newton_schulz", full=strict)


def _rows(x: Matrix) -> Sharded:
    """The matrix as row shards: as it is cut, or in one piece."""
    return x if isinstance(x, Sharded) and x.dim == 0 else Sharded([dense(x)], 0)


def measure(p: Matrix) -> tuple[float, float]:
    """tr(P^T P), and ||P P^T P - P||_F estimated with random vectors."""
    return sum(inner(q, q) for q in _rows(p).parts), _off(p)


def _off(p: Matrix) -> float:
    """||P P^T P - P||_F, estimated with random vectors."""
    import torch

    rows = _rows(p).parts
    # As rows: products with few columns are several times slower.
    v = probes(p.shape[1], p.dtype, p.device).mT.contiguous()
    images = [v.to(q.device) @ q.mT for q in rows]
    back = sum(((y @ q).to(p.device) for q, y in zip(rows, images, strict=True)), torch.zeros_like(v))
    off = sum(
        float(torch.linalg.vector_norm(back.to(q.device) @ q.mT - y, dtype=torch.float64)) ** 2
        for q, y in zip(rows, images, strict=True)
    )
    return math.sqrt(off / v.shape[0])


def _finish(x: Matrix, p: Matrix, rank: int, total: float | None, route: str) -> Polar:
    return Polar(cut_like(p, x), rank, total, _off(p) / max(rank, 1) ** 0.5, route)


def _checked(x: Matrix, p: Matrix, cut: float, nuclear: bool, route: str, full: bool) -> Polar:
    """The result of an iteration if it is a partial isometry (of full rank, where asked for), else the Gram route's."""

    trace, off = measure(p)
    rank = round(trace) if trace == trace and trace < 2.0**31 else -1
    good = rank >= 0 and abs(trace - rank) <= 0.05 and off <= ACCEPT * max(rank, 1) ** 0.5
    if not good or (full and rank != x.shape[1]):
        return _gram(x, gram(x), cut, nuclear, f"{route}, gram")
    total = _inner(p, x) if nuclear else None
    return Polar(cut_like(p, x), rank, total, off / max(rank, 1) ** 0.5, route)


def _svd(x: Matrix, cut: float, nuclear: bool) -> Polar:
    import torch

    whole, power = dense(x), 0
    if not moderate(whole):  # the largest values could leave the range of float32
        power = math.frexp(float(whole.abs().max()))[1]
        whole = whole * 2.0**-power
    u, s, vh = torch.linalg.svd(whole, full_matrices=False)
    k = int((s > cut * s[0]).sum())
    total = float(s[:k].sum(dtype=torch.float64)) * 2.0**power if nuclear else None
    return _finish(x, u[:, :k] @ vh[:k], k, total, "svd")


def _gram(x: Matrix, g: torch.Tensor, cut: float, nuclear: bool, route: str) -> Polar:
    import torch

    values, vectors = torch.linalg.eigh(g)
    sigma = values.clamp_min(0).sqrt()
    top = float(sigma[-1])
    keep = sigma > max(cut, FLOOR) * top
    basis, sigma = vectors[:, keep], sigma[keep]
    k = int(sigma.numel())
    root = (basis / sigma.sqrt()) @ (basis / sigma.sqrt()).mT
    # A product in float32 loses eps times the condition of the root.
    close = k > 0 and top / float(sigma[0]) <= 30 and x.dtype == torch.float32
    p = times(x, root.float() if close else root, x.dtype)
    return _finish(x, p, k, float(sigma.sum()) if nuclear else None, route)


def _qdwh(x: Matrix, rows: Sharded, cut: float, nuclear: bool) -> Polar:
    import torch

    g = gram(x)
    lower, info = torch.linalg.cholesky_ex(g)
    if int(info) != 0:
        return _gram(x, g, cut, nuclear, "qdwh, gram")
    top, least = extremes(g, lower)
    if not least > 1.5 * max(cut, FLOOR) * top:  # the rank is in doubt, or not full
        return _gram(x, g, cut, nuclear, "qdwh, gram")
    return _checked(x, qdwh(rows, g, top, least), cut, nuclear, "qdwh", full=True)


def _wants_batches(x: Any, route: str) -> bool:
    """Whether matrices lie on a GPU and are so large that their route will be Newton-Schulz."""
    import torch

    return route == "auto" and any(
        isinstance(t, torch.Tensor) and t.device.type != "cpu" and min(t.shape, default=0) > SMALL_ON_GPU for t in x
    )


def _batched(x: Any, tol: float | None, route: str, nuclear: bool) -> list[Polar]:
    """Newton-Schulz over all tensors of one shape at once; everything else one by one."""
    import torch

    from ...adapters.model import Factors

    made: list[Polar | None] = [None] * len(x)
    ready: dict[int, torch.Tensor] = {}
    for i, item in enumerate(x):
        plain = None if isinstance(item, (Factors, Sharded)) else check_matrix(item, f"X[{i}]")
        if isinstance(plain, torch.Tensor) and plain.numel():
            tall = plain if plain.shape[0] >= plain.shape[1] else plain.mT
            name = _auto(tall, check_tol(tol, rank_cut(*plain.shape))) if route == "auto" else route
            if name == "newton_schulz":
                ready[i] = tall
                continue
        made[i] = _polar(item, f"X[{i}]", tol, route, nuclear)
    where = list(ready)
    for group in groups([(t.shape, t.dtype, t.device) for t in ready.values()]):
        members = [ready[where[j]] for j in group]
        cut = check_tol(tol, rank_cut(*members[0].shape))
        (stacked,) = newton_schulz([torch.stack(members)], cut)
        for j, tall, p in zip(group, members, stacked, strict=True):
            done = _checked(tall, p, cut, nuclear, "newton_schulz", full=route == "auto")
            flipped = tall.shape != x[where[j]].shape
            made[where[j]] = replace(done, p=done.p.mT) if flipped else done
    return [p for p in made if p is not None]


def _core(x: Factors, what: str, tol: float | None, nuclear: bool) -> Polar:
    from ...adapters.model import Factors

    sides = both_sides(x) if tol is None or tol >= FLOOR else None
    if sides is not None:
        found = product_of(*sides)
        s = found.s
        k = int((s > check_tol(tol, rank_cut(x.rank, x.rank)) * s[0]).sum())
        p = Factors(sides[0].times(found.left[:, :k]), sides[1].rows(found.right[:, :k]))
    else:
        check_matrix(x.b, f"b of {what}")
        check_matrix(x.a, f"a of {what}")
        left, right = tall_qr(x.b), tall_qr(x.a.mT)  # equal columns: b and a need no balance
        core = small_svd(left.r @ right.r.mT, tol)
        k, s = core.rank, core.s
        p = Factors(left.q @ core.u[:, :k].to(x.b.dtype), core.vh[:k].to(x.a.dtype) @ right.q.mT)
    off = departure(p.b, p.a) if k else 0.0
    return Polar(p, k, float(s[:k].sum()) if nuclear else None, off / max(k, 1) ** 0.5, "core")
