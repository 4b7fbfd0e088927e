"""regmean against the normal equations in float64."""

from __future__ import annotations

import pytest
import torch

import mergekernels as mk
import spectral_brute as brute


def layers(m: int, n: int, count: int = 3, samples: int = 100, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    weights = [torch.randn(m, n, generator=g) for _ in range(count)]
    inputs = [torch.randn(samples, n, generator=g) @ torch.randn(n, n, generator=g) for _ in range(count)]
    return weights, inputs, [x.T @ x / len(x) for x in inputs]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(20, 12), (12, 20)])
def test_formula(alpha, shape):
    weights, _, grams = layers(*shape)
    factors = [1.0, 2.0, 0.5]
    found = mk.merge(weights, "regmean", gram=grams, alpha=alpha, weights=factors)
    assert brute.error(found, brute.regmean(weights, grams, factors, alpha)) < 1e-5


def test_it_minimises_the_squared_error_on_the_inputs():
    weights, inputs, grams = layers(9, 6)

    def loss(w):
        return sum(
            float((x.double() @ (w - v).double().T).square().sum()) / len(x)
            for v, x in zip(weights, inputs, strict=True)
        )

    best = mk.merge(weights, "regmean", gram=grams)
    at = loss(best)
    for seed in range(5):
        step = 1e-2 * torch.randn(9, 6, generator=torch.Generator().manual_seed(seed))
        assert loss(best + step) > at


def test_alpha_zero_is_a_mean_per_column_and_equal_models_are_kept():
    weights, _, grams = layers(8, 5)
    d = torch.stack([g.diagonal() for g in grams])
    expected = (torch.stack(weights) * d[:, None, :]).sum(0) / d.sum(0)
    torch.testing.assert_close(mk.merge(weights, "regmean", gram=grams, alpha=0.0), expected, rtol=1e-5, atol=1e-6)
    same = mk.merge([weights[0]] * 3, "regmean", gram=grams)
    assert brute.error(same, weights[0]) < 1e-6


def test_in_out_weights_are_known_by_their_grams():
    weights, _, grams = layers(8, 5)
    there = mk.merge(weights, "regmean", gram=grams, alpha=0.9)
    back = mk.merge([w.T.contiguous() for w in weights], "regmean", gram=grams, alpha=0.9)
    assert brute.error(back.T, there) < 1e-6


def test_state_dicts_merge_what_has_no_gram_by_the_mean():
    weights, _, grams = layers(8, 5)
    models = [{"l.weight": w, "l.bias": w[:, 0], "n": torch.tensor([1, 2])} for w in weights]
    report: dict = {}
    found = mk.merge_state_dicts(
        models, "regmean", gram=[{"l.weight": g} for g in grams], weights=[1.0, 1.0, 2.0], report=report
    )
    assert brute.error(found["l.weight"], brute.regmean(weights, grams, [1, 1, 2], 1.0)) < 1e-5
    mean = (weights[0][:, 0] + weights[1][:, 0] + 2 * weights[2][:, 0]) / 4
    torch.testing.assert_close(found["l.bias"], mean)
    assert torch.equal(found["n"], torch.tensor([1, 2]))
    assert report["l.weight"]["route"] == "cholesky" and report["l.bias"]["route"] == "mean"


def test_half_precision_weights_stay():
    weights, _, grams = layers(8, 5)
    found = mk.merge([w.bfloat16() for w in weights], "regmean", gram=grams)
    assert found.dtype == torch.bfloat16
    assert brute.error(found, brute.regmean([w.bfloat16() for w in weights], grams, [1, 1, 1], 1.0)) < 1e-2


def test_singular_grams_are_refused_unless_shrunk():
    weights, _, grams = layers(8, 5, samples=1)
    with pytest.raises(mk.MergeError, match=r"tensor 'l': the sum of the Grams is singular; expected a positive"):
        mk.merge(weights, "regmean", gram=grams, name="l")
    found = mk.merge(weights, "regmean", gram=grams, alpha=0.9)
    assert brute.error(found, brute.regmean(weights, grams, [1, 1, 1], 0.9)) < 1e-5
    ridge = mk.merge(weights, "regmean", gram=grams, ridge=1e-2)
    assert bool(torch.isfinite(ridge).all())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "regmean needs 'gram'"),
        ({"gram": [torch.eye(5)]}, "'gram' has the wrong number of values; expected 2, one per model; got 1"),
        ({"gram": [torch.eye(4)] * 2}, r"gram 0 does not fit the weight; expected \(5, 5\), or \(8, 8\)"),
        ({"gram": [torch.eye(5), torch.eye(8)]}, "gram 1 does not fit the weight"),
        ({"gram": [torch.eye(5), torch.randn(5, 5)]}, "a Gram is not symmetric"),
        ({"gram": [torch.eye(5), -torch.eye(5)]}, "a Gram is not symmetric with a diagonal of at least 0"),
        ({"gram": [torch.eye(5), torch.full((5, 5), torch.nan)]}, "gram 1 holds NaN or Inf at flat index 0"),
        ({"gram": [torch.eye(5), torch.ones(5)]}, "gram 1 is not a matrix"),
        ({"gram": [torch.eye(5)] * 2, "weights": 0.0}, "no weight is above 0"),
        ({"gram": [torch.eye(5)] * 2, "base": torch.zeros(8, 5)}, "regmean subtracts no base"),
        ({"gram": [torch.eye(5)] * 2, "alpha": 1.5}, r"'alpha' is not usable; expected a number in \[0, 1\]"),
    ],
)
def test_bad_input(arguments, words):
    weights = layers(8, 5, 2)[0]
    with pytest.raises(mk.MergeError, match=words):
        mk.merge(weights, "regmean", name="l", **arguments)


def test_grams_of_unknown_tensors_are_refused():
    weights, _, grams = layers(8, 5, 2)
    models = [{"l.weight": w} for w in weights]
    with pytest.raises(mk.MergeError, match="gram 0 names tensors that the models lack: other"):
        mk.merge_state_dicts(models, "regmean", gram=[{"other": g} for g in grams])
    with pytest.raises(mk.MergeError, match=r"gram 1 and gram 0 name different tensors: l\.weight"):
        mk.merge_state_dicts(models, "regmean", gram=[{"l.weight": grams[0]}, {}])
    with pytest.raises(mk.MergeError, match="gram 0 is empty"):
        mk.merge_state_dicts(models, "regmean", gram=[{}, {}])
