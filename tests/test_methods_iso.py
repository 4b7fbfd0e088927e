"""iso_c and iso_cts against their formulas in float64, and what their definitions imply."""

from __future__ import annotations

import pytest
import torch

import mergekernels as mk
import spectral_brute as brute
from mergekernels.adapters.model import Factors
from spectral_cases import dense, lora, merged, nothing, rotation

SHAPES = [(40, 40), (64, 24), (24, 64)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", list(brute.spectra(8)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_iso_c_formula(shape, kind, dtype):
    # All tasks have the same singular vectors, so that the sum has the spectrum.
    one = brute.with_spectrum(*shape, brute.spectra(min(shape))[kind], 7)
    deltas = [(0.5 * one).to(dtype), (0.3 * one).to(dtype), (0.2 * one).to(dtype)]
    bound = 1e-7 if dtype == torch.float64 else 1e-3 if kind == "ill" else 1e-5
    found = merged("iso_c", deltas)
    assert brute.error(dense(found), brute.iso_c(deltas)) < bound
    assert found.report["rank"] == min(shape)


def test_iso_c_identities():
    deltas = [brute.with_spectrum(48, 32, brute.spectra(32)["power"], t, torch.float32) for t in range(3)]
    total = sum(deltas)
    found = merged("iso_c", deltas)
    delta, mu = dense(found).double(), found.report["mu"]
    assert brute.error(delta @ delta.T @ delta, mu**2 * delta) < 1e-5
    nuclear = float(torch.linalg.svdvals(total.double()).sum())
    assert float((delta * total).sum()) == pytest.approx(mu * nuclear, rel=1e-6)
    assert mu == pytest.approx(nuclear / 32, rel=1e-6)
    back = dense(merged("iso_c", [d.T.contiguous() for d in deltas]))
    assert brute.error(back.T, delta) < 1e-5
    q, p = rotation(48, 1), rotation(32, 2)
    assert brute.error(dense(merged("iso_c", [q @ d @ p for d in deltas])), q.double() @ delta @ p.double()) < 1e-5
    assert brute.error(dense(merged("iso_c", [deltas[2], deltas[0], deltas[1]])), delta) < 1e-5
    assert brute.error(dense(merged("iso_c", deltas, weights=[-1.0] * 3)), -delta) < 1e-6


def test_iso_c_on_factors_flattens_the_support_only():
    factors = [lora(60, 44, 4, t) for t in range(3)]
    exact = brute.iso_c([f.b.double() @ f.a.double() for f in factors])
    found = merged("iso_c", factors)
    assert isinstance(found.delta, Factors)
    assert found.report["rank"] == 12
    assert brute.error(found.delta.dense(), exact) < 1e-5
    assert brute.error(dense(merged("iso_c", [f.dense() for f in factors])), exact) < 1e-5
    values = torch.linalg.svdvals(found.delta.dense().double())
    assert float(values[11] / values[0]) > 1 - 1e-5 and float(values[12] / values[0]) < 1e-6
    # The mean is taken over all 44 values by default.
    by_rank = merged("iso_c", factors, mean_over="rank")
    assert brute.error(by_rank.delta.dense(), exact * 44 / 12) < 1e-5
    by_core = merged("iso_c", factors, mean_over="core")
    assert brute.error(by_core.delta.dense(), exact * 44 / 12) < 1e-5
    # Many factors make the sum dense.
    many = [lora(60, 44, 12, t) for t in range(4)]
    full = merged("iso_c", many)
    assert not isinstance(full.delta, Factors)
    assert brute.error(full.delta, brute.iso_c([f.dense() for f in many])) < 1e-4


def test_iso_c_of_nothing():
    deltas = [torch.randn(6, 4, generator=torch.Generator().manual_seed(1)), nothing(6, 4)]
    assert brute.error(dense(merged("iso_c", deltas)), brute.iso_c([deltas[0], torch.zeros(6, 4)])) < 1e-5
    assert not dense(merged("iso_c", [nothing(6, 4)])).any()
    assert not dense(merged("iso_c", [deltas[0], -deltas[0]])).any()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_iso_cts_formula(shape, fraction, dtype):
    q = min(shape)
    deltas = [brute.with_spectrum(*shape, brute.spectra(q)["power"], 20 + t, dtype) for t in range(4)]
    found = merged("iso_cts", deltas, common_space_fraction=fraction)
    expected = brute.iso_cts(deltas, fraction)
    # Without a gap at the cut of the common space the promise is 5e-5 times the condition of the stacked bases.
    assert brute.error(dense(found), expected) < (1e-3 if dtype == torch.float32 else 1e-6)
    delta, mu = dense(found).double(), found.report["mu"]
    assert brute.error(delta @ delta.T @ delta, mu**2 * delta) < 1e-5


def test_iso_cts_gap_at_the_cut():
    # One common part for all tasks, and a strong own part each: both cuts fall into gaps.
    common = brute.with_spectrum(48, 40, torch.linspace(20, 15, 24), 1)
    deltas = [(common + brute.with_spectrum(48, 40, [4.0, 3.5, 3.0, 2.5], 30 + t)).float() for t in range(4)]
    found = merged("iso_cts", deltas, common_space_fraction=0.6)
    assert (found.report["common"], found.report["k"]) == (24, [4, 4, 4, 4])
    assert brute.error(dense(found), brute.iso_cts(deltas, 0.6)) < 2e-5
    order = dense(merged("iso_cts", [deltas[i] for i in (3, 1, 0, 2)], common_space_fraction=0.6))
    assert brute.error(order, dense(found)) < 2e-5
    q, p = rotation(48, 1), rotation(40, 2)
    turned = dense(merged("iso_cts", [q @ d @ p for d in deltas], common_space_fraction=0.6))
    assert brute.error(turned, q @ dense(found) @ p) < 2e-5


def test_iso_cts_without_task_space_is_iso_c():
    deltas = [brute.with_spectrum(24, 16, brute.spectra(16)["flat"], t, torch.float32) for t in range(3)]
    found = merged("iso_cts", deltas, common_space_fraction=1.0)
    assert torch.equal(dense(found), dense(merged("iso_c", deltas)))


def test_iso_cts_on_factors():
    factors = [lora(60, 44, 4, t) for t in range(3)]
    # dims q: 35 common directions hold all 12, and the method is iso_c; it says so.
    found = merged("iso_cts", factors)
    assert isinstance(found.delta, Factors)
    assert found.report["k"] == [0, 0, 0] and "iso_c" in found.warnings[0]
    assert brute.error(found.delta.dense(), dense(merged("iso_c", factors))) < 1e-5
    ranked = merged("iso_cts", factors, dims="rank", common_space_fraction=0.5)
    assert (ranked.report["common"], ranked.report["k"]) == (6, [2, 2, 2])
    again = merged("iso_cts", [f.dense() for f in factors], dims="rank", common_space_fraction=0.5)
    assert brute.error(ranked.delta.dense(), dense(again)) < 1e-4


def test_iso_cts_negative_split_is_refused():
    # q = 4, T = 3, f = 0.1: c0 = 0, N = 3 round(4 / 3) = 3, fine; T = 7: N = 7 round(4 / 7) = 7 > 4.
    w = [torch.randn(4, 9, generator=torch.Generator().manual_seed(t)) for t in range(7)]
    with pytest.raises(mk.MergeError, match=r"tensor 'x': iso_cts: the common space has a negative size"):
        mk.merge(w, "iso_cts", base=torch.zeros(4, 9), name="x", common_space_fraction=0.1)
    mk.merge(w[:3], "iso_cts", base=torch.zeros(4, 9), name="x", common_space_fraction=0.1)
