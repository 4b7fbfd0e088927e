"""`lowrank` beside truncated singular value decompositions in float64: every route, factors, mixes, shards."""

from __future__ import annotations

import pytest
import torch

from mergekernels import ops
from mergekernels.adapters.model import Factors
from mergekernels.errors import ArgumentError, DataError
from mergekernels.ops.spectral._cores import cores_of
from mergekernels.ops.spectral._inputs import as_map
from mergekernels.ops.spectral._maps import Map
from mergekernels.ops.spectral._pairs import cheapest
from mergekernels.ops.spectral.lowrank import lowrank
from mergekernels.ops.spectral.mix import Mix
from spectra import F64, SPECTRA, factors, gaussian, low_rank_of, matrix, orthonormal, relative, svd


def product(found) -> torch.Tensor:
    return found.factors.b.to(F64) @ found.factors.a.to(F64)


def check(x, found, rank, cut=1e-5):
    """Promise, measured error, rank, singular values and their place, of a result for the float64 matrix x."""
    s = svd(x)[1]
    size = float(x.norm())
    k = min(rank, int((s > cut * s[0]).sum())) if size else 0
    assert found.factors.rank == k == len(found.singular_values)
    error, best = float((x - product(found)).norm()), float(s[k:].square().sum()) ** 0.5
    assert error <= (1 + 1e-4) * best + 1e-6 * size
    assert abs(found.error * size - error) <= 1e-6 * size
    assert abs(found.kept_energy - (1 - found.error**2)) <= 1e-12
    if size:
        exact = found.route in ("core", "whole")
        assert float((found.singular_values - s[:k]).abs().max()) <= (1e-6 if exact else 3e-2) * float(s[0])


@pytest.mark.parametrize("route", ["auto", "dense", "whole"])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_dense(spectrum, route):
    for m, n in ((260, 220), (220, 300)):
        x = matrix(spectrum, m, n)
        for rank in (1, 24):
            found = ops.lowrank(x, rank=rank, route=route)
            check(x.to(F64), found, rank)
            assert found.factors.b.dtype == torch.float32 and found.factors.shape == (m, n)
            assert found.route == ("none" if spectrum == "zero" else found.route if route == "auto" else route)


@pytest.mark.parametrize("route", ["auto", "core", "implicit", "dense", "whole"])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_factors(spectrum, route):
    b, a = factors(spectrum, 230, 210, 40)
    found = ops.lowrank(Factors(b, a), rank=16, route=route)
    check(b.to(F64) @ a.to(F64), found, 16)
    if spectrum != "zero" and route != "auto":
        assert found.route == route


@pytest.mark.parametrize("route", ["core", "implicit", "dense", "whole"])
def test_at_a_gap_the_truncation_itself(route):
    """1e-5 in the delta by every route, at gaps of 2 % to 40 %."""
    for ratio in (0.98, 0.9, 0.6):
        i = torch.arange(40.0, dtype=F64)
        s = torch.where(i < 12, 1.0, ratio) * (1.0 - i / 400)
        x = Factors((orthonormal(300, 40, 1) * s).float(), orthonormal(280, 40, 2).mT.float())
        want = low_rank_of(x.b.to(F64) @ x.a.to(F64), 12)
        assert relative(product(ops.lowrank(x, rank=12, route=route)), want) <= 1e-5


@pytest.mark.parametrize("route", ["implicit", "dense"])
def test_at_the_gap_of_adapters(route):
    """Columns of falling length: the iteration could stop long before the delta is right to 1e-5."""
    fall = 0.6 ** torch.arange(16)
    parts = [Factors(gaussian(400, 16, 2 * i).float() * fall, gaussian(16, 380, 2 * i + 1).float()) for i in range(8)]
    total = ops.stack(parts)
    want = low_rank_of(total.b.to(F64) @ total.a.to(F64), 16)
    assert relative(product(ops.lowrank(total, rank=16, route=route)), want) <= 1e-5


@pytest.mark.parametrize("seed", range(4))
def test_the_core_is_the_truncation_itself(seed):
    """At a gap the delta, not only its quality: 1e-6, also with repeated and unbalanced adapters."""
    x = Factors(*factors("decay", 90, 70, 6, seed))
    scale = 2.0 ** (20 * seed)
    stacked = ops.stack([x, Factors(*factors("gap", 90, 70, 5, seed + 9)), x], [1.0, 0.3, 0.5])
    uneven = Factors(stacked.b / scale, stacked.a * scale)
    want = low_rank_of(stacked.b.to(F64) @ stacked.a.to(F64), 5)
    for f in (stacked, uneven):
        assert relative(product(ops.lowrank(f, rank=5, route="core")), want) <= 1e-6
    one = Factors(stacked.b.clone(), stacked.a.clone())
    one.b[:, 2] *= 2.0**30
    one.a[2] *= 2.0**-30
    assert relative(product(ops.lowrank(one, rank=5, route="core")), want) <= 1e-6


def test_all_of_the_rank_is_exact():
    """Nothing is lost where the rank suffices, and duplicates need no rank of their own."""
    x = Factors(*factors("gap", 120, 100, 8))
    twice = ops.stack([x, x], [0.5, 0.25])
    found = ops.lowrank(twice, rank=16)
    assert found.factors.rank == 8 and found.error <= 1e-7 and found.kept_energy == pytest.approx(1.0)
    assert relative(product(found), 0.75 * (x.b.to(F64) @ x.a.to(F64))) <= 1e-6
    dense = (x.b.to(F64) @ x.a.to(F64)).float()
    for route in ("dense", "whole"):
        again = ops.lowrank(dense, rank=12, route=route)
        assert again.factors.rank == 8 and relative(product(again), dense) <= 1e-6
    gone = ops.lowrank(ops.stack([x, x], [0.5, -0.5]), rank=4)
    assert gone.factors.rank == 0 or float(product(gone).norm()) <= 1e-6 * float(dense.norm())


@pytest.mark.parametrize("kind", ["factors", "dense", "mix"])
@pytest.mark.parametrize("energy", [0.2, 0.8, 0.999, 1.0])
def test_energy_takes_the_least_rank(kind, energy):
    b, a = factors("decay", 120, 110, 24)
    extra = matrix("gap", 120, 110)
    x: object = {
        "factors": Factors(b, a),
        "dense": extra,
        "mix": ops.Mix(factors=[(1.5, Factors(b, a))], dense=[(0.1, extra)]),
    }[kind]
    whole = as_map(x, "X").dense().to(F64)
    found = ops.lowrank(x, energy=energy)
    s = svd(whole)[1]
    shares = torch.cumsum(s.square(), 0) / s.square().sum()
    least = int((shares < energy).sum()) + 1 if energy < 1 else int((s > 1e-5 * s[0]).sum())
    assert found.factors.rank == least and found.kept_energy >= energy - 1e-6
    assert ops.lowrank(x, rank=2, energy=energy).factors.rank == min(2, least)


@pytest.mark.parametrize("route", ["auto", "implicit", "dense", "whole"])
def test_mixes(route):
    one, two = (Factors(*factors("decay", 200, 190, 10, i)) for i in range(2))
    first, second = matrix("decay", 200, 190, 5), matrix("gap", 200, 190, 6)
    mix = ops.Mix(factors=[(0.5, one), (-2.0, two)], dense=[(0.25, first), (-0.01, second)])
    want = 0.5 * one.dense().to(F64) - 2.0 * two.dense().to(F64) + 0.25 * first.to(F64) - 0.01 * second.to(F64)
    found = ops.lowrank(mix, rank=18, route=route)
    check(want, found, 18)
    alone = ops.lowrank(ops.Mix(factors=[(3.0, one)]), rank=4)
    assert relative(product(alone), 3.0 * low_rank_of(one.dense(), 4)) <= 1e-5 and alone.route == "core"
    only = ops.lowrank(ops.Mix(dense=[(1.0, first), (-1.0, first)]), rank=4)
    assert only.factors.rank == 0 and only.kept_energy == 1.0


def test_spreads_and_signs():
    x = Factors(*factors("gap", 60, 50, 9))
    by = {spread: ops.lowrank(x, rank=5, spread=spread) for spread in ("b", "sqrt", "a")}
    s = by["b"].singular_values
    for spread, left, right in (("b", s, s**0), ("sqrt", s.sqrt(), s.sqrt()), ("a", s**0, s)):
        f = by[spread].factors
        assert torch.allclose(f.b.to(F64).norm(dim=0), left, rtol=1e-6)
        assert torch.allclose(f.a.to(F64).norm(dim=1), right, rtol=1e-6)
        assert relative(product(by[spread]), product(by["b"])) <= 1e-6
        largest = f.b.gather(0, f.b.abs().argmax(0, keepdim=True))
        assert bool((largest > 0).all())
        off = f.b.to(F64).mT @ f.b.to(F64)
        assert float((off - torch.diag(off.diagonal())).norm()) <= 1e-6 * float(off.norm())


@pytest.mark.parametrize("dim", [0, 1])
def test_shards(dim):
    x = matrix("gap", 260, 230)
    whole, cut = ops.lowrank(x, rank=76), ops.lowrank(ops.Sharded(x.split(59, dim), dim), rank=76)
    assert relative(product(cut), product(whole)) <= 1e-5 and cut.route == whole.route
    small = ops.Sharded(matrix("gap", 60, 50).split(13, dim), dim)
    one = ops.lowrank(small, rank=16)
    assert one.route == "whole" and torch.equal(
        one.singular_values, ops.lowrank(small.dense(), rank=16).singular_values
    )


def test_lists_give_what_single_calls_give():
    items = [
        Factors(*factors("decay", 64, 40, 7)),
        matrix("flat", 33, 21),
        Factors(torch.zeros(10, 0), torch.zeros(0, 12)),
        ops.Mix(dense=[(2.0, matrix("gap", 20, 30))]),
        matrix("decay", 64, 40).bfloat16(),
    ]
    ranks = [3, 4, 2, 5, 6]
    for found, x, rank in zip(ops.lowrank(items, rank=ranks), items, ranks, strict=True):
        alone = ops.lowrank(x, rank=rank)
        assert torch.equal(found.factors.b, alone.factors.b) and torch.equal(found.factors.a, alone.factors.a)
        assert found.error == alone.error and found.route == alone.route
    assert ops.lowrank(items, rank=2)[2].factors.rank == 0
    assert ops.lowrank([], rank=2) == []


def test_float64_factors_do_not_square():
    """A direction of 1e-10 survives where Grams lose everything below 1e-8."""
    s = torch.tensor([1.0, 1e-5, 1e-10], dtype=F64)
    u, v = orthonormal(40, 3, 1), orthonormal(30, 3, 2)
    found = ops.lowrank(Factors(u * s, v.mT), rank=3)
    assert found.factors.b.dtype == F64
    assert torch.allclose(found.singular_values, s, rtol=1e-5)
    dense = ops.lowrank((u * s) @ v.mT, rank=3)
    assert torch.allclose(dense.singular_values, s, rtol=1e-4)


def test_invariants():
    """Scaling by a power of two keeps bits; rotations act on the delta; transposing transposes."""
    x = Factors(*factors("gap", 70, 50, 12))
    base = ops.lowrank(x, rank=4)
    scaled = ops.lowrank(Factors(x.b * 2.0**-30, x.a), rank=4)
    assert torch.equal(scaled.factors.b, base.factors.b * 2.0**-30) and torch.equal(scaled.factors.a, base.factors.a)
    q = orthonormal(70, 70, 3)
    turned = ops.lowrank(Factors((q @ x.b.to(F64)).float(), x.a), rank=4)
    assert relative(product(turned), q @ product(base)) <= 1e-6
    flipped = ops.lowrank(Factors(x.a.mT, x.b.mT), rank=4)
    assert relative(product(flipped), product(base).mT) <= 1e-6


def test_the_route_follows_the_work():
    def route(x, rank, energy=None):
        return cheapest(as_map(x, "X"), rank, energy, False)

    def zeros(m, n, r):
        return Factors(torch.zeros(m, r), torch.zeros(r, n))

    assert route(zeros(2048, 2048, 128), 16) == "core"
    assert route(zeros(4096, 4096, 1024), 16) == "implicit"
    assert route(zeros(512, 512, 2000), 16) == "dense"
    assert route(torch.zeros(64, 64), 16) == "whole"
    assert route(torch.zeros(1024, 1024), 16) == "dense"
    assert route(torch.zeros(1024, 1024), 500) == "whole"


def test_the_norm_of_a_product_three_ways():
    for r in (8, 300, 500):
        x: Map = as_map(Factors(gaussian(320, r).float(), gaussian(r, 310, 1).float()), "X")
        want = float(x.dense().to(F64).norm() ** 2)
        assert x.norm2 == pytest.approx(want, rel=1e-6) and x.near_norm2 == pytest.approx(x.norm2, rel=1e-6)


def test_bad_arguments():
    x = Factors(*factors("gap", 30, 20, 4))
    for kwargs, word in (
        ({}, "neither rank nor energy"),
        ({"rank": 21}, "rank is out of range"),
        ({"rank": -1}, "rank is out of range"),
        ({"rank": 2.5}, "rank is out of range"),
        ({"energy": 0.0}, "energy"),
        ({"rank": 2, "spread": "c"}, "spread"),
        ({"rank": 2, "route": "fast"}, "route"),
        ({"rank": [2, 3]}, "one number or one per matrix"),
    ):
        with pytest.raises(ArgumentError, match=word):
            ops.lowrank(x, **kwargs)
    with pytest.raises(ArgumentError, match="core route needs factors"):
        ops.lowrank(matrix("gap", 9, 9), rank=1, route="core")
    with pytest.raises(ArgumentError, match="do not fit together"):
        ops.lowrank(Factors(x.b, x.a[:3]), rank=1)
    with pytest.raises(ArgumentError, match="differ in shape"):
        ops.lowrank(ops.Mix(factors=[(1.0, x)], dense=[(1.0, torch.zeros(3, 3))]), rank=1)
    with pytest.raises(ArgumentError, match="differ in shape"):
        ops.lowrank(ops.Mix(), rank=1)
    with pytest.raises(ArgumentError, match="finite"):
        ops.lowrank(ops.Mix(factors=[(float("nan"), x)]), rank=1)
    x.a[1, 2] = float("nan")
    with pytest.raises(DataError, match=r"X\[0\]\.a"):
        ops.lowrank([x], rank=1)
    with pytest.raises(DataError, match=r"X\.factors\[0\]\.a"):
        ops.lowrank(ops.Mix(factors=[(1.0, x)]), rank=1)


def _products(count: int, m: int, n: int, ranks: tuple[int, ...]) -> list[Mix]:
    generator = torch.Generator().manual_seed(5)
    return [
        Mix(
            [
                (w, Factors(torch.randn(m, r, generator=generator), torch.randn(r, n, generator=generator)))
                for w, r in zip((0.5, -1.5, 3.0), ranks, strict=False)
            ]
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("spread", ["b", "sqrt", "a"])
@pytest.mark.parametrize(("m", "n", "rank"), [(120, 90, 7), (64, 200, 24), (300, 300, 60)])
def test_many_products_of_one_shape_are_each_by_itself(m: int, n: int, rank: int, spread) -> None:
    """The batch of `_cores`, which ordinary products of one shape take together."""
    items = _products(5, m, n, (8, 12, 4))
    together = [i for found in cores_of(items, [rank] * 5) for i in found.positions]
    assert sorted(together) == list(range(5))
    for threads in (1, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            many = lowrank(items, rank, spread=spread)
        finally:
            torch.set_num_threads(before)
        for item, found in zip(items, many, strict=True):
            one = lowrank(item, rank, spread=spread)
            assert found.route == one.route == "core" and found.factors.shape == one.factors.shape
            assert found.factors.rank == one.factors.rank == min(rank, 24)
            for got, want in ((found.factors.b, one.factors.b), (found.factors.a, one.factors.a)):
                assert float((got - want).norm()) < 1e-5 * float(want.norm())
            torch.testing.assert_close(found.singular_values, one.singular_values, rtol=1e-7, atol=0.0)
            assert abs(found.kept_energy - one.kept_energy) < 1e-8 and abs(found.error - one.error) < 1e-6
            whole = sum(w * f.b.double() @ f.a.double() for w, f in item.factors)
            if rank >= 24:  # nothing is cut
                assert float((found.factors.dense() - whole).norm() / whole.norm()) < 1e-6


def test_odd_products_among_many_are_looked_at_by_themselves() -> None:
    """Dependent and zero columns, terms that cancel, sizes beyond float32: left out of the batch, and right."""
    items = [f for mix in _products(8, 80, 90, (24,)) for _, f in mix.factors]
    items[1].b[:, 3] = 0.0
    items[2].a[5] = items[2].a[4]
    items[4] = Factors(items[4].b * 1e-25, items[4].a * 1e-25)
    items[5].b[:, 12:] = -items[5].b[:, :12] * (1 + 1e-6)
    items[5].a[12:] = items[5].a[:12]
    mixed = [*items, Mix([(1.0, items[0]), (-1.0, items[0])])]
    inside = {i for found in cores_of(mixed, [10] * 9) for i in found.positions}
    assert {0, 3, 6, 7} <= inside <= {0, 2, 3, 6, 7}  # whether equal rows are noticed is a matter of rounding
    for item, found in zip(mixed, lowrank(mixed, 10), strict=True):
        one = lowrank(item, 10)
        assert found.factors.rank == one.factors.rank and found.route == one.route
        assert float((found.factors.dense() - one.factors.dense()).norm()) <= 1e-6 * float(one.factors.dense().norm())
    items[6].b[0, 0] = float("nan")
    with pytest.raises(DataError, match=r"X\[6\]"):
        lowrank(items, 10)
