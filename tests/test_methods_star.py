"""star and low_rank against their formulas in float64."""

from __future__ import annotations

import pytest
import torch

import mergekernels as mk
import spectral_brute as brute
from mergekernels.adapters.model import Factors
from spectral_cases import dense, lora, merged, nothing

SHAPES = [(40, 40), (64, 24), (24, 64)]


def tasks(shape, kind, dtype=torch.float32, count=3):
    return [brute.with_spectrum(*shape, brute.spectra(min(shape))[kind], 40 + t, dtype) for t in range(count)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", list(brute.spectra(8)))
@pytest.mark.parametrize("eta", [0.5, 40.0, 97.0, 100.0])
def test_star_formula(shape, kind, eta):
    deltas = tasks(shape, kind)
    assert brute.error(dense(merged("star", deltas, eta=eta)), brute.star(deltas, eta)) < 5e-5


def test_star_keeps_the_nuclear_norm_and_scales():
    one = tasks((48, 32), "power")[0]
    found = dense(merged("star", [one], eta=30.0)).double()
    values = torch.linalg.svdvals(one.double())
    assert float(torch.linalg.svdvals(found).sum()) == pytest.approx(float(values.sum()), rel=1e-6)
    k = merged("star", [one], eta=30.0).report["k"][0]
    assert int((torch.linalg.svdvals(found) > 1e-5).sum()) == k < 32
    assert brute.error(dense(merged("star", [2.0 * one], eta=30.0)), 2.0 * found) < 1e-6
    assert brute.error(dense(merged("star", [one], eta=100.0)), one) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_star_on_factors(dtype):
    factors = [lora(60, 44, r, r, dtype) for r in (4, 6, 3)]
    exact = brute.star([f.b.double() @ f.a.double() for f in factors], 60.0)
    found = merged("star", factors, eta=60.0)
    assert isinstance(found.delta, Factors)
    assert found.delta.rank == sum(found.report["k"]) < 13
    assert found.delta.b.dtype == dtype
    assert brute.error(found.delta.dense(), exact) < 1e-5
    assert brute.error(dense(merged("star", [f.dense() for f in factors], eta=60.0)), exact) < 1e-5


def test_star_counts_zero_tasks():
    one = tasks((24, 16), "flat")[0]
    half = dense(merged("star", [one, nothing(24, 16)]))
    assert brute.error(half, 0.5 * dense(merged("star", [one]))) < 1e-6
    assert torch.equal(dense(merged("star", [one, nothing(24, 16)], count_zero=False)), dense(merged("star", [one])))
    assert not dense(merged("star", [nothing(24, 16)])).any()


def test_star_needs_eta_above_zero():
    with pytest.raises(mk.MergeError, match=r"star: eta is 0; expected a number in \(0, 100\]"):
        merged("star", [torch.ones(2, 2)], eta=0.0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["gap", "head", "power", "ill"])
def test_low_rank_formula(shape, kind):
    deltas, weights, rank = tasks(shape, kind), [1.0, -0.5, 2.0], min(shape) // 4
    found = merged("low_rank", deltas, rank=rank, weights=weights)
    assert brute.error(dense(found), brute.low_rank(deltas, weights, rank)) < 1e-4
    assert found.report["k"] == [rank] * 3
    # The best error per task is what is promised.
    for d, kept in zip(deltas, found.report["kept_energy"], strict=True):
        s2 = torch.linalg.svdvals(d.double()).square()
        assert kept == pytest.approx(float(s2[:rank].sum() / s2.sum()), rel=1e-5)


def test_low_rank_by_energy_and_on_factors():
    one = brute.with_spectrum(32, 24, [4.0, 2.0, 1.0, 0.5], 1, torch.float32)  # squares 16, 4, 1, 0.25 of 21.25
    assert merged("low_rank", [one], energy=0.9).report["k"] == [2]
    assert merged("low_rank", [one], energy=0.98).report["k"] == [3]
    assert merged("low_rank", [one], energy=0.98, rank=1).report["k"] == [1]
    assert brute.error(dense(merged("low_rank", [one], energy=1.0)), one) < 1e-6
    f = lora(60, 44, 8, 3)
    found = merged("low_rank", [f], rank=5)
    assert isinstance(found.delta, Factors) and found.delta.rank == 5
    assert brute.error(found.delta.dense(), brute.low_rank([f.dense()], [1.0], 5)) < 1e-5


def test_low_rank_refusals():
    with pytest.raises(mk.MergeError, match="neither rank nor energy is given"):
        merged("low_rank", [torch.ones(4, 4)])
    with pytest.raises(mk.MergeError, match="'rank' is not usable; expected a number of at least 1; got 0"):
        merged("low_rank", [torch.ones(4, 4)], rank=0)
    with pytest.raises(mk.MergeError, match=r"tensor 'w': low_rank: rank is 5; expected at most 4"):
        mk.merge([torch.ones(4, 6)], "low_rank", base=torch.zeros(4, 6), name="w", rank=5)
