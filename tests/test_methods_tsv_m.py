"""tsv_m against the formula in float64, and what its definition implies."""

from __future__ import annotations

import pytest
import torch

import mergekernels as mk
import spectral_brute as brute
import spectral_cases
from mergekernels.adapters.model import Factors
from spectral_cases import dense, lora, nothing, rotation

SHAPES = [(40, 40), (64, 24), (24, 64)]


def merged(deltas, **arguments):
    return spectral_cases.merged("tsv_m", deltas, **arguments)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", list(brute.spectra(8)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_formula(shape, kind, dtype):
    q = min(shape)
    deltas = [brute.with_spectrum(*shape, brute.spectra(q)[kind], 10 + t, dtype) for t in range(4)]
    found = merged(deltas)
    # 5e-5 is the promise without a gap at the cut; an ill-conditioned U_cat costs its condition.
    assert brute.error(dense(found), brute.tsv_m(deltas)) < (5e-5 if dtype == torch.float32 else 1e-7)
    assert found.report["k"] == [q // 4] * 4


def test_transpose():
    deltas = [brute.with_spectrum(48, 32, brute.spectra(32)["gap"], t, torch.float32) for t in range(4)]
    there, back = dense(merged(deltas)), dense(merged([d.T.contiguous() for d in deltas]))
    assert brute.error(back.T, there) < 1e-5


def test_equivariance_order_and_scale():
    deltas = [brute.with_spectrum(48, 32, brute.spectra(32)["gap"], t, torch.float32) for t in range(4)]
    q, p = rotation(48, 1), rotation(32, 2)
    plain = dense(merged(deltas))
    assert brute.error(dense(merged([q @ d @ p for d in deltas])), q @ plain @ p) < 1e-5
    assert brute.error(dense(merged([deltas[i] for i in (2, 0, 3, 1)])), plain) < 1e-5
    assert brute.error(dense(merged([3.0 * d for d in deltas])), 3.0 * plain) < 1e-5
    assert brute.error(dense(merged(deltas, weights=3.0)), 3.0 * plain) < 1e-5


def test_one_task_and_equal_tasks():
    one = brute.with_spectrum(24, 16, brute.spectra(16)["flat"], 3, torch.float32)
    assert torch.equal(dense(merged([one])), one)
    low = brute.with_spectrum(24, 16, [3.0, 2.0, 1.0], 3, torch.float32)
    # Four equal tasks of rank 3 <= 16 / 4 give the task, not four times it.
    assert brute.error(dense(merged([low] * 4)), low) < 1e-5


def test_orthogonal_tasks_add_up():
    basis, other = rotation(32, 5), rotation(32, 6)
    parts = [slice(8 * t, 8 * t + 8) for t in range(4)]
    deltas = [(basis[:, p] * torch.linspace(2, 1, 8) @ other[:, p].T) for p in parts]
    assert brute.error(dense(merged(deltas)), sum(deltas)) < 1e-5


@pytest.mark.parametrize("ranks", [[4, 4, 4], [2, 5, 3], [16, 4, 12]])
def test_factors_equal_dense(ranks):
    factors = [lora(60, 44, r, t) for t, r in enumerate(ranks)]
    exact = brute.tsv_m([f.b.double() @ f.a.double() for f in factors])
    found = merged(factors)
    assert isinstance(found.delta, Factors)
    assert found.delta.rank == sum(min(r, 44 // 3) for r in ranks)
    assert brute.error(found.delta.dense(), exact) < 1e-5
    assert brute.error(dense(merged([f.dense() for f in factors])), exact) < 5e-5
    # Factors beside a dense task are multiplied out.
    mixed = merged([factors[0].dense(), *factors[1:]])
    assert not isinstance(mixed.delta, Factors)
    assert brute.error(mixed.delta, exact) < 5e-5


def test_zero_tasks_count_unless_told():
    deltas = [brute.with_spectrum(24, 18, brute.spectra(18)["gap"], t, torch.float32) for t in range(2)]
    zero = nothing(24, 18)
    found = merged([*deltas, zero])
    assert found.report["k"] == [6, 6]
    assert brute.error(dense(found), brute.tsv_m([*deltas, torch.zeros(24, 18)])) < 5e-5
    assert torch.equal(dense(found), dense(merged([*deltas, torch.zeros(24, 18)])))
    alone = merged([*deltas, zero], count_zero=False)
    assert alone.report["k"] == [9, 9]
    assert torch.equal(dense(alone), dense(merged(deltas)))
    none = merged([zero, zero])
    assert none.delta.rank == 0
    assert not none.delta.dense().any()


def test_dims_rank():
    factors = [lora(40, 32, 8, t) for t in range(2)]
    found = merged(factors, dims="rank")
    assert found.report["k"] == [4, 4]
    parts = [brute.svd(f.dense()) for f in factors]
    u, s, v = (torch.cat([p[i][..., :4] for p in parts], -1) for i in range(3))
    assert brute.error(dense(found), brute.polar(u) @ torch.diag(s) @ brute.polar(v).T) < 1e-5
    with pytest.raises(mk.MergeError, match=r"tensor 'w': k = floor\(rank / T\) is 0; expected task vectors of rank 2"):
        merged([lora(40, 32, 1, t) for t in range(2)], dims="rank")


def test_more_tasks_than_directions():
    w = [torch.randn(3, 9, generator=torch.Generator().manual_seed(t)) for t in range(4)]
    with pytest.raises(mk.MergeError, match=r"tensor 'narrow': tsv_m: k = floor\(q / T\) is 0.*at least 4; got 3"):
        mk.merge(w, "tsv_m", base=torch.zeros(3, 9), name="narrow")
    plain = mk.merge(w, "tsv_m", base=torch.zeros(3, 9), name="narrow", exclude="narrow")
    torch.testing.assert_close(plain, torch.stack(w).mean(0))


def test_repeat_gives_the_same_bits():
    deltas = [torch.randn(40, 40, generator=torch.Generator().manual_seed(t)) for t in range(3)]
    assert torch.equal(dense(merged(deltas)), dense(merged(deltas)))


@pytest.mark.parametrize("kind", ["flat", "head", "power"])
def test_larger_matrices(kind):
    """Where the dominant subspaces and the polar factors take the routes of large matrices."""
    deltas = [brute.with_spectrum(320, 272, brute.spectra(272)[kind], t, torch.float32) for t in range(8)]
    found = merged(deltas)
    assert found.report["polar"] == "split"
    assert brute.error(dense(found), brute.tsv_m(deltas)) < 5e-5
    assert found.report["residual"] < 1e-5
