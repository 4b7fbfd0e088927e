"""mergekit's integration on a package of its shape: what is served, with which numbers. No mergekit."""

from __future__ import annotations

import threading
import types

import pytest
import torch

import mergekernels
import mergekernels.integrations.mergekit as fast
from mergekernels.errors import ArgumentError, DataError
from mergekernels.integrations.mergekit.options import options
from mergekernels.integrations.mergekit.translate import arithmetic
from mergekit_shape import Kind, group_of, imports, method, per_input, tensors


@pytest.fixture
def shaped(tmp_path, monkeypatch):
    """Imports a mergekit of the shape asked for."""
    yield from imports(tmp_path, monkeypatch)


def test_served_and_restored(shaped):
    package = shaped()
    base, *models = tensors(4)
    group = group_of(package, models, base)
    sce = method(package, "sce")
    original = sce.implementation
    fast.enable()
    got = sce.implementation(group, int8_mask=False, select_topk=0.5)
    assert torch.equal(got, mergekernels.merge(models, "sce", base=base, select_topk=0.5))
    assert fast.stats().served == {"sce": 1}
    fast.disable()
    assert sce.implementation is original
    assert torch.equal(sce.implementation(group), sum([*models, base]))


@pytest.mark.parametrize(
    ("consensus", "sparsification", "ours"),
    [
        (None, None, "task_arithmetic"),
        ("sum", "magnitude", "ties"),
        (None, "random", "dare_linear"),
        ("sum", "random", "dare_ties"),
        (None, "magnitude_outliers", "breadcrumbs"),
        ("sum", "magnitude_outliers", "breadcrumbs_ties"),
        (None, "della_magprune", "della_linear"),
        ("sum", "della_magprune", "della"),
    ],
)
def test_task_arithmetic_in_all_its_forms(shaped, consensus, sparsification, ours):
    package = shaped()
    base, *models = tensors(4, (16, 32))
    made = package.GeneralizedTaskArithmeticMerge(
        consensus and Kind(consensus), sparsification and Kind(sparsification), "named"
    )
    weights = [0.5, -0.25, 1.0]
    parameters = {
        "int8_mask": True,
        "normalize": True,
        "rescale": True,
        "lambda": 0.75,
        "weight": dict(enumerate(weights)),
        **per_input(3, density=0.5),
    }
    expected = {"normalize": True, "scale": 0.75}
    if sparsification is not None:
        expected |= {"density": 0.5, "rescale": True}
    if sparsification == "magnitude_outliers":
        parameters |= per_input(3, gamma=0.125)
        expected["gamma"] = 0.125
    if sparsification == "della_magprune":
        parameters |= per_input(3, epsilon=0.2)
        expected["epsilon"] = 0.2
    with fast.enabled(seed=11):
        got = made.merge_group(group_of(package, models, base), **parameters)
    seed = {"seed": 11} if sparsification in ("random", "della_magprune") else {}
    wanted = mergekernels.merge(models, ours, base=base, weights=weights, name="layer.0", **seed, **expected)
    assert torch.equal(got, wanted)
    assert fast.stats().served == {"named": 1}
    assert torch.equal(made.merge_group(group_of(package, models, base)), sum([*models, base]))


def test_a_vote_without_sparsifier_and_what_has_no_name(shaped):
    package = shaped()
    base, *models = tensors(3)
    group = group_of(package, models, base)
    parameters = {"int8_mask": False, "normalize": True, "rescale": False, "lambda": 1.0, **per_input(2, weight=1.0)}
    parameters |= per_input(2, density=0.25)  # without a sparsifier nobody reads it
    with fast.enabled():
        vote = package.GeneralizedTaskArithmeticMerge(Kind.sum, None, "vote")
        assert torch.equal(
            vote.merge_group(group, **parameters), mergekernels.merge(models, "ties", base=base, weights=1.0)
        )
        count = package.GeneralizedTaskArithmeticMerge(Kind.count, Kind.magnitude, "count")
        assert torch.equal(count.merge_group(group, **parameters), sum([*models, base]))
        trim = package.GeneralizedTaskArithmeticMerge(None, Kind.magnitude, "trim")
        assert torch.equal(trim.merge_group(group, **parameters), sum([*models, base]))
    reason = "a combination of consensus and sparsification that has no name in mergekit"
    assert fast.stats().served == {"vote": 1}
    assert fast.stats().passed_on == {"count": {reason: 1}, "trim": {reason: 1}}


def test_batches(shaped):
    package = shaped()
    a, b = tensors(2, (5, 4, 8))
    batch = package.TensorBatch((a, b), base_index=0)
    linear, slerp = (method(package, name) for name in ("linear", "slerp"))
    weights = torch.tensor([[0.25, 0.75], [1.0, 0.5], [2.0, 2.0], [0.0, 1.0], [-1.0, 2.0]])
    t = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    with fast.enabled():
        for normalize in (True, False):
            got = linear.implementation(batch, weights, normalize)
            same = linear.implementation(batch, weight=weights[:1].expand(5, 2), normalize=normalize)
            for g in range(5):
                pair = [a[g], b[g]]
                expected = mergekernels.merge(pair, "linear", weights=weights[g], normalize=normalize)
                assert torch.equal(got[g], expected)
                expected = mergekernels.merge(pair, "linear", weights=[0.25, 0.75], normalize=normalize)
                assert torch.equal(same[g], expected)
        got = slerp.implementation(batch, t)
        same = slerp.implementation(batch, t=torch.full((5,), 0.3))
        for g in range(5):
            assert torch.equal(got[g], mergekernels.merge([b[g]], "slerp", base=a[g], t=float(t[g])))
            assert torch.equal(same[g], mergekernels.merge([b[g]], "slerp", base=a[g], t=float(torch.tensor(0.3))))
        other = package.TensorBatch((b, a), base_index=1)
        assert torch.equal(slerp.implementation(other, t), got)
        empty = package.TensorBatch((a[:, :0], b[:, :0]), base_index=0)
        assert slerp.implementation(empty, t).shape == (5, 0, 8)
        # Only one angle for all would make these two outputs depend on each other.
        assert not torch.equal(got[2], mergekernels.merge([b], "slerp", base=a, t=0.5)[2])
    assert fast.stats().passed_on == {}


@pytest.mark.parametrize("name", ["arcee_fusion", "ramplus_tl", "ram", "nearswap"])
def test_sixteen_bits_where_mergekit_widens(shaped, name):
    package = shaped()
    base, model, other = tensors(3, (8, 16), torch.bfloat16)
    models = [model] if name in ("arcee_fusion", "nearswap") else [model, other]
    parameters = {"t": 0.5} if name == "nearswap" else {}
    with fast.enabled():
        got = method(package, name).implementation(group_of(package, models, base), **parameters)
    wide = name in ("arcee_fusion", "ramplus_tl")
    assert got.dtype is (torch.float32 if wide else torch.bfloat16)
    assert torch.equal(got, mergekernels.merge(models, name, base=base, out_dtype=got.dtype, **parameters))


def test_masks_by_seed_name_and_place(shaped):
    package = shaped()
    base, *models = tensors(3, (64, 64))
    dare = package.GeneralizedTaskArithmeticMerge(Kind.sum, Kind.random, "dare_ties")
    parameters = {"int8_mask": False, "normalize": False, "rescale": True, "lambda": 1.0}
    parameters |= per_input(2, weight=1.0, density=0.5)

    def merged(name):
        return dare.merge_group(group_of(package, models, base, name), **parameters)

    with fast.enabled():
        torch.manual_seed(3)
        first = merged("a")
        expected = mergekernels.merge(
            models, "dare_ties", base=base, weights=1.0, density=0.5, name="a", seed=3, normalize=False
        )
        assert torch.equal(first, expected)
        assert torch.equal(merged("a"), first)
        assert not torch.equal(merged("b"), first)
        before = torch.get_rng_state()
        assert torch.equal(before, torch.get_rng_state())
        # Without a name the seed comes from the generator: other masks each time, the same ones after the same seed.
        one, two = merged(None), merged(None)
        assert not torch.equal(one, two)
        torch.manual_seed(3)
        assert torch.equal(merged(None), one)
        torch.manual_seed(4)
        assert not torch.equal(merged("a"), first)
    with fast.enabled(seed=3):
        assert torch.equal(merged("a"), first)


def test_densities_as_mergekit_reads_them():

    def densities(kind, *values):
        group = types.SimpleNamespace(
            base=types.SimpleNamespace(tensor=None),
            non_base=[types.SimpleNamespace(id=i, tensor=None) for i in range(len(values))],
            metadata=types.SimpleNamespace(name=None),
        )
        weight = dict.fromkeys(range(len(values)), 1.0)
        parameters = {"normalize": True, "rescale": False, "lambda": 1.0, "weight": weight}
        made = types.SimpleNamespace(consensus_method=Kind.sum, sparsification_method=kind)
        return arithmetic(made, group, parameters | {"density": dict(enumerate(values))}).arguments["density"]

    assert densities(Kind.magnitude, 1.5, -0.5, 0.25) == [1.0, 0.0, 0.25]
    assert densities(Kind.della_magprune, 1.5, -0.5, 0.25) == [1.0, 0.0, 0.25]
    assert densities(Kind.random, 1.5, -0.5, 0.25) == [1.0, -0.5, 0.25]  # what mergekit refuses stays refusable
    assert densities(Kind.magnitude_outliers, 1.5, -0.5, 0.25) == [1.0, -0.5, 0.25]


def test_nan_and_infinity(shaped):
    package = shaped()
    base, *models = tensors(3, (4, 8))
    models[0][1, 2] = float("nan")
    models[1][3, 4] = float("inf")
    group = group_of(package, models, base, "layers.7.w")
    with fast.enabled():
        got = method(package, "nuslerp").implementation(group, {0: 1.0, 1: 1.0}, nuslerp_flatten=False)
        wanted = mergekernels.merge(models, "nuslerp", base=base, weights=1.0, nuslerp_flatten=False, nan="propagate")
        assert torch.equal(torch.isnan(got), torch.isnan(wanted))
        assert torch.equal(got.nan_to_num(), wanted.nan_to_num())
        assert torch.isnan(got[1]).all()
        assert torch.isfinite(got[[0, 2]]).all()
    with fast.enabled(nan="error"), pytest.raises(DataError, match=r"tensor 'layers\.7\.w': .* holds NaN or Inf"):
        method(package, "sce").implementation(group)
    assert "sce" not in fast.stats().served


def test_inputs_are_borrowed(shaped):
    package = shaped()
    wide = tensors(3, (16, 32))
    base, *models = (t[::2, 1::3] for t in wide)
    before = [t.clone() for t in wide]
    with fast.enabled():
        got = method(package, "sce").implementation(group_of(package, models, base), select_topk=0.5)
    assert torch.equal(
        got, mergekernels.merge([m.contiguous() for m in models], "sce", base=base.contiguous(), select_topk=0.5)
    )
    assert all(map(torch.equal, wide, before))


@pytest.mark.parametrize(
    ("given", "name"),
    [({"seed": -1}, "seed"), ({"nan": "ignore"}, "nan"), ({"backend": "tpu"}, "backend"), ({"threads": 0}, "threads")],
)
def test_options_are_checked_before_anything_happens(given, name):
    with pytest.raises(ArgumentError, match=name):
        fast.enable(**given)


def test_threads_of_the_caller(shaped):
    """Two threads at once give what one gives."""
    package = shaped()
    base, *models = tensors(4, (64, 256))
    group = group_of(package, models, base)
    sce = method(package, "sce")
    results = {}

    def work(number):
        results[number] = [sce.implementation(group, select_topk=0.1 * (i % 9 + 1)) for i in range(18)]

    with fast.enabled():
        workers = [threading.Thread(target=work, args=(number,)) for number in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        work("alone")
    assert all(all(map(torch.equal, results[n], results["alone"])) for n in range(2))
    assert fast.stats().served == {"sce": 54}


def test_options_that_are_equal_are_equal():
    assert options(None, "propagate", None, None) == options(None, "propagate", None, None)
    assert options(1, "error", "cpu", 2) != options(1, "propagate", "cpu", 2)
