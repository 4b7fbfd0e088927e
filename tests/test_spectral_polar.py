"""`polar` and `nuclear_norm` on every route: beside U V^T in float64, with rank, residual and fall-backs.

Bounds follow the promise: 1e-5 up to a condition of 1e2 of the support, then in proportion; iterations and the Gram
route stay far below.
"""

from __future__ import annotations

import pytest
import torch

import mergekernels as mk
from mergekernels import ops
from mergekernels.adapters.model import Factors
from mergekernels.ops.spectral.minimax import schedule
from spectra import F64, SPECTRA, factors, gaussian, matrix, orthonormal, polar_of, relative, svd, values, with_values

ROUTES = ("auto", "gram", "svd", "split", "newton_schulz", "qdwh")
SHAPES = [(72, 72), (160, 48), (48, 160)]


def condition(kind, q):
    s = values(kind, q)
    s = s[s > 0]
    return float(s.max() / s.min()) if s.numel() else 1.0


def off_isometry(p, rank):
    p = p.to(F64)
    return float((p @ p.mT @ p - p).norm()) / max(rank, 1) ** 0.5


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("route", ROUTES)
def test_routes(route, kind, shape):
    x = matrix(kind, *shape)
    rank = int((values(kind, min(shape)) > 0).sum())
    made = ops.polar(x, route=route, nuclear=True)
    assert made.p.dtype == torch.float32 and made.p.shape == x.shape
    assert made.rank == rank
    assert relative(made.p, polar_of(x, rank)) <= 1e-7 * max(1e2, condition(kind, min(shape)))
    assert abs(made.nuclear - float(svd(x)[1][:rank].sum())) <= 1e-6 * max(made.nuclear, 1e-30)
    assert abs(made.residual - off_isometry(made.p, rank)) <= 3e-7 + 0.5 * made.residual
    assert off_isometry(made.p, rank) <= (3e-6 if "svd" in made.route else 6e-7)
    assert route in ("auto", *made.route.split(", "))
    assert ops.polar(x, route=route).nuclear is None


def test_gram_and_qdwh_do_not_lose_the_condition():
    """Their first steps are in float64: at 1e4 they are a hundred times better than a float32 SVD."""
    x = matrix("ill", 90, 60)
    want = polar_of(x, 60)
    for route in ("gram", "qdwh"):
        made = ops.polar(x, route=route)
        assert made.route == route and relative(made.p, want) <= 1e-6


@pytest.mark.parametrize("power", [1, 2, 3, 4, 4.5])
def test_newton_schulz_on_conditions_it_is_meant_for(power):
    """About eps times the condition, as a float32 SVD; the bound has a factor 20 over eps."""
    x = with_values(torch.logspace(0, -power, 60, dtype=F64), 150, 60).float()
    made = ops.polar(x, route="newton_schulz")
    assert made.route == "newton_schulz" and made.rank == 60
    assert relative(made.p, polar_of(x, 60)) <= 20 * 1.2e-7 * 10**power


def test_newton_schulz_of_low_rank_with_a_gap():
    """Null directions, amplified on the way, are flushed; rank 40 of 96 with a spectrum down to 1e-3."""
    x = with_values(torch.logspace(0, -3, 40, dtype=F64), 96, 96).float()
    made = ops.polar(x, route="newton_schulz")
    assert made.route == "newton_schulz" and made.rank == 40
    assert relative(made.p, polar_of(x, 40)) <= 1e-4


@pytest.mark.parametrize("tol", [1e-6, 1e-5, 1e-4, 1e-3])
def test_a_failed_check_is_rerun_and_reported(tol):
    """Values all around the cut: nothing that iterates can tell them apart, the check sees it."""
    s = torch.cat([torch.ones(20, dtype=F64), tol * torch.logspace(-0.4, -1.2, 20, dtype=F64)])
    x = with_values(s, 80, 60).float()
    made = ops.polar(x, tol=tol, route="newton_schulz")
    assert made.route == "newton_schulz, gram"
    assert made.rank == 20 and relative(made.p, polar_of(x, 20)) <= 1e-5


def test_qdwh_of_less_than_full_rank_is_rerun():
    for kind in ("deficient", "zero"):
        assert ops.polar(matrix(kind, 60, 40), route="qdwh").route == "qdwh, gram"
    # Full rank as matrices go, not at this cut.
    made = ops.polar(matrix("ill", 60, 40), tol=1e-3, route="qdwh")
    assert made.route == "qdwh, gram" and made.rank == int((values("ill", 40) > 1e-3).sum())


@pytest.mark.parametrize("route", ["gram", "svd"])
def test_cut(route):
    """A direction counts if its value is above tol times the largest."""
    s = torch.tensor([3.0, 1.0, 2e-3, 2e-4, 5e-5], dtype=F64)
    x = with_values(s, 30, 12).float()
    for tol, rank in [(None, 5), (1e-5, 5), (2e-5, 4), (1e-4, 3), (1e-2, 2), (0.5, 1)]:
        made = ops.polar(x, tol=tol, route=route, nuclear=True)
        assert made.rank == rank
        assert relative(made.p, polar_of(x, rank)) <= 1e-6 * 6e4
        assert abs(made.nuclear - float(s[:rank].sum())) <= 1e-6


def test_without_a_cut_everything_counts():
    """tol = 0, for parity with public code: full rank down to what float32 holds, so LAPACK."""
    x = matrix("ill", 50, 50)
    made = ops.polar(x, tol=0.0)
    assert made.route == "svd" and made.rank == 50


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", SPECTRA)
def test_float64(kind, shape):
    x = matrix(kind, *shape, dtype=F64)
    rank = int((values(kind, min(shape)) > 0).sum())
    for route, bound in (("auto", 1e-13), ("svd", 1e-13), ("gram", 1e-12), ("qdwh", 1e-12), ("newton_schulz", 1e-12)):
        made = ops.polar(x, route=route)
        assert made.p.dtype == F64 and made.rank == rank
        # A Gram squares the condition.
        scale = condition(kind, min(shape)) ** (2 if "gram" in made.route else 1)
        assert relative(made.p, polar_of(x, rank)) <= bound * max(scale, 10)


def test_qdwh_of_ill_conditioned_float64():
    x = with_values(torch.logspace(0, -5, 40, dtype=F64), 70, 40)
    made = ops.polar(x, tol=1e-6, route="qdwh")
    assert made.route == "qdwh" and relative(made.p, polar_of(x, 40)) <= 1e-10


@pytest.mark.parametrize("rank", [1, 8, 30])
@pytest.mark.parametrize("kind", SPECTRA)
def test_factors(kind, rank):
    b, a = factors(kind, 70, 50, rank)
    keep = int((values(kind, rank) > 0).sum())
    made = ops.polar(Factors(b, a), nuclear=True)
    assert made.route == "core" and made.rank == keep == made.p.rank
    product = b.to(F64) @ a.to(F64)
    assert relative(made.p.dense(), polar_of(product, keep)) <= 1e-7 * max(1e2, condition(kind, rank))
    assert abs(made.nuclear - float(svd(product)[1].sum())) <= 1e-6 * max(made.nuclear, 1e-30)
    assert abs(ops.nuclear_norm(Factors(b, a)) - float(svd(product)[1].sum())) <= 1e-6 * max(made.nuclear, 1e-30)
    assert off_isometry(made.p.dense(), keep) <= 2e-6


def test_factors_of_unequal_size():
    """A tiny b beside a large a: no direction is lost, in any of the columns."""
    b, a = factors("flat", 60, 40, 6)
    want = polar_of(b.to(F64) @ a.to(F64), 6)
    scale = torch.tensor([1e-12, 1.0, 1e9, 1e-4, 1e4, 1e12])
    made = ops.polar(Factors(b * scale, a / scale[:, None]))
    assert made.rank == 6 and relative(made.p.dense(), want) <= 1e-5


def test_factors_of_rank_zero_and_above_the_sides():
    made = ops.polar(Factors(torch.zeros(5, 0), torch.zeros(0, 4)), nuclear=True)
    assert made.rank == 0 and made.p.shape == (5, 4) and made.nuclear == 0.0
    b, a = gaussian(20, 50).float(), gaussian(50, 12, 1).float()
    made = ops.polar(Factors(b, a))
    assert made.rank == 12 and relative(made.p.dense(), polar_of(b.to(F64) @ a.to(F64), 12)) <= 1e-5


CUTS = [(0, [30, 0, 70]), (0, [99, 1]), (1, [20, 20]), (1, [1, 38, 1])]


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("dim", "sizes"), CUTS, ids=str)
@pytest.mark.parametrize("route", ROUTES)
def test_shards(route, dim, sizes, flip):
    x = matrix("decay", 100, 40)
    if flip:
        x, dim = x.mT.contiguous(), 1 - dim
    made = ops.polar(ops.Sharded(list(x.split(sizes, dim)), dim), route=route, nuclear=True)
    assert made.p.dim == dim and made.p.sizes == sizes
    assert made.rank == 40 and relative(made.p.dense(), polar_of(x, 40)) <= 1e-5
    assert abs(made.nuclear - float(svd(x)[1].sum())) <= 1e-6 * made.nuclear
    assert made.residual <= 3e-6
    if route == "gram":
        assert made.nuclear == ops.polar(x, route="gram", nuclear=True).nuclear


@pytest.mark.parametrize("route", ["auto", "newton_schulz", "gram"])
def test_lists_of_unequal_matrices(route):
    xs = [matrix(kind, *shape, seed=i) for i in range(2) for kind in SPECTRA for shape in SHAPES]
    xs += [torch.zeros(0, 4), ops.Sharded(list(xs[0].split(30)), 0), Factors(*factors("flat", 9, 8, 3))]
    if route != "auto":
        xs.pop()
    for x, made in zip(xs, ops.polar(xs, route=route, nuclear=True), strict=True):
        alone = ops.polar(x, route=route, nuclear=True)
        got, want = (q.p.dense() if not isinstance(q.p, torch.Tensor) else q.p for q in (made, alone))
        assert made.rank == alone.rank and made.route == alone.route
        assert relative(got, want) <= 1e-3 and abs(made.nuclear - alone.nuclear) <= 1e-5 * max(alone.nuclear, 1e-30)
    assert ops.polar([]) == []


@pytest.mark.parametrize("route", ROUTES)
def test_equivariance(route):
    """f(Q X P^T) = Q f(X) P^T, f(X^T) = f(X)^T, f(c X) = f(X)."""
    x = matrix("decay", 60, 40, dtype=F64)
    q, r = orthonormal(60, 60, 7), orthonormal(40, 40, 8)
    f = lambda y: ops.polar(y.float(), route=route).p.to(F64)  # noqa: E731
    assert relative(f(q @ x @ r.mT), q @ f(x) @ r.mT) <= 1e-5
    assert relative(f(x.mT), f(x).mT) <= 1e-5
    for c in (1e-25, 3.0, 1e25):
        assert relative(f(c * x), f(x)) <= 1e-5
    assert relative(f(f(x)), f(x)) <= 1e-5


def test_equivariance_where_rank_is_low():
    """On a null space an SVD's vectors are arbitrary; here nothing of them comes out."""
    x = with_values(values("decay", 4), 48, 48)
    q, r = orthonormal(48, 48, 7), orthonormal(48, 48, 8)
    for route in ROUTES:
        f = lambda y, route=route: ops.polar(y.float(), route=route)  # noqa: E731
        assert f(x).rank == 4
        assert relative(f(q @ x @ r.mT).p, q @ f(x).p.to(F64) @ r.mT) <= 1e-5


def test_half_precision():
    x = matrix("flat", 60, 20).to(torch.bfloat16)
    made = ops.polar(x)
    assert made.p.dtype == torch.float32 and relative(made.p, polar_of(x, 20)) <= 1e-5


def test_nuclear_norm():
    for kind in SPECTRA:
        for shape in SHAPES:
            for dtype, bound in ((torch.float32, 1e-7), (F64, 1e-13)):
                x = matrix(kind, *shape, dtype=dtype)
                want = float(svd(x)[1].sum())
                # What is zero in the Gram is rounding of 1e-8 of the largest value in its root.
                noise = 1e-7 * float(svd(x)[1][0]) if dtype == torch.float32 else 0.0
                assert abs(ops.nuclear_norm(x) - want) <= bound * want + noise
    x = matrix("flat", 90, 30)
    assert ops.nuclear_norm(ops.Sharded(list(x.split(25)), 0)) == ops.nuclear_norm(x)
    assert ops.nuclear_norm([x, x[:0]]) == [ops.nuclear_norm(x), 0.0]


@pytest.mark.parametrize("low", [1e-7, 1e-5, 1e-3, 0.1, 0.5, 0.99])
def test_schedule(low):
    """Every value from `low` to 1 ends at 1, steps stay in [0, 1.05], zero stays near zero."""
    steps = schedule(low)
    x = torch.cat([torch.logspace(-9, 0, 5001, dtype=F64).clamp_min(low), torch.ones(1, dtype=F64)])
    tiny = torch.tensor(low * 1e-3, dtype=F64)
    for a, b, c in steps:
        x = a * x + b * x**3 + c * x**5
        tiny = a * tiny + b * tiny**3 + c * tiny**5
        assert float(x.min()) > 0.0 and float(x.max()) <= 1.05
    assert float((x - 1).abs().max()) <= 1e-7
    assert float(tiny) <= 1e-5
    assert len(steps) <= 3 + 1.8 * -torch.tensor(low).log10() + 3


def test_bad_input():
    def code(*args, **kwargs):
        with pytest.raises(mk.MergeError) as info:
            ops.polar(*args, **kwargs)
        return info.value.code, str(info.value)

    x = gaussian(6, 4)
    b, a = gaussian(6, 2), gaussian(2, 4)
    a[0, 0] = float("inf")
    assert code(Factors(b, a))[0] == "data.nonfinite" and "a of X" in code(Factors(b, a))[1]
    assert code([x, x * float("nan")]) == code([x, x * float("nan")]) and "X[1]" in code([x, x * float("nan")])[1]
    assert "X[1]" in code([x, x * float("nan")], route="newton_schulz")[1]
    assert code(x, route="fast")[0] == "argument"
    assert code(x, route="core")[0] == "argument"
    assert code(Factors(gaussian(6, 2), gaussian(2, 4)), route="svd")[0] == "argument"
    assert code(x, tol=1.0)[0] == "argument"
    assert code(x.view(2, 3, 4))[0] == "matrix.dimension"
    assert code(x * 1e160)[0] == code(x * 1e-160)[0] == "data.range"
