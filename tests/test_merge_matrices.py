"""merge() and merge_state_dicts() with methods over matrices: what is a matrix, shards, dtypes, reports, errors."""

from __future__ import annotations

import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

import mergekernels as mk
import spectral_brute as brute

METHODS = {
    "tsv_m": {},
    "iso_c": {},
    "iso_cts": {"common_space_fraction": 0.5},
    "opcm": {},
    "star": {},
    "low_rank": {"rank": 3},
}


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def family(*shape: int, count: int = 3, dtype=torch.float32) -> tuple[torch.Tensor, list[torch.Tensor]]:
    base = noise(*shape, seed=0).to(dtype)
    return base, [(base.float() + 0.1 * noise(*shape, seed=t + 1)).to(dtype) for t in range(count)]


@pytest.mark.parametrize("method", list(METHODS))
def test_result_is_base_and_scaled_delta(method):
    base, models = family(24, 18)
    once = mk.merge(models, method, base=base, **METHODS[method])
    twice = mk.merge(models, method, base=base, scale=2.0, **METHODS[method])
    assert once.shape == base.shape and once.dtype == base.dtype
    torch.testing.assert_close(twice - base, 2.0 * (once - base), rtol=1e-5, atol=1e-5)
    assert torch.equal(mk.merge(models, method, base=base, scale=0.0, **METHODS[method]), base)
    # Equal models leave the base as it is.
    assert torch.equal(mk.merge([base] * 3, method, base=base, **METHODS[method]), base)


def test_formula_through_merge():
    base, models = family(24, 18)
    deltas = [m - base for m in models]
    found = mk.merge(models, "tsv_m", base=base, scale=0.5)
    assert brute.error(found - base, 0.5 * brute.tsv_m(deltas)) < 1e-4
    weighted = mk.merge(models, "tsv_m", base=base, weights=[1.0, 0.0, 2.0])
    exact = brute.tsv_m([deltas[0], torch.zeros(24, 18), 2.0 * deltas[2]])
    assert brute.error(weighted - base, exact) < 1e-4


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize(("dim", "cuts"), [(0, [5, 1, 18]), (1, [7, 11])])
def test_shards(method, dim, cuts):
    base, models = family(24, 18)
    whole = mk.merge(models, method, base=base, **METHODS[method])
    shards = [list(m.split(cuts, dim)) for m in models]
    found = mk.merge(shards, method, base=list(base.split(cuts, dim)), shard_dim=dim, **METHODS[method])
    assert [f.shape[dim] for f in found] == cuts
    assert torch.equal(torch.cat(found, dim), whole)
    sd = mk.merge_state_dicts(
        [{"w": s} for s in shards], method, base={"w": base.split(cuts, dim)}, shard_dim=dim, **METHODS[method]
    )
    assert torch.equal(torch.cat(sd["w"], dim), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    base, models = family(24, 18, dtype=dtype)
    found = mk.merge(models, "iso_c", base=base)
    assert found.dtype == dtype
    exact = brute.iso_c([m.double() - base.double() for m in models])
    bound = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float64: 1e-7}[dtype]
    assert brute.error(found.double() - base.double(), exact) < bound
    wide = mk.merge(models, "iso_c", base=base, out_dtype=torch.float32)
    assert wide.dtype == torch.float32
    assert torch.equal(wide.to(dtype), found) or dtype == torch.float64
    mixed = mk.merge([models[0].float(), *models[1:]], "iso_c", base=base)
    assert mixed.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_out_and_inputs_are_left_alone():
    base, models = family(12, 10)
    copies = [m.clone() for m in models]
    out = torch.empty(12, 10)
    assert mk.merge(models, "tsv_m", base=base, out=out) is out
    assert torch.equal(out, mk.merge(models, "tsv_m", base=base))
    assert all(torch.equal(m, c) for m, c in zip(models, copies, strict=True))
    with pytest.raises(mk.MergeError, match="out does not fit the result"):
        mk.merge(models, "tsv_m", base=base, out=torch.empty(12, 9))


def test_more_than_two_dimensions():
    base, models = family(8, 3, 2, 2)
    found = mk.merge(models, "tsv_m", base=base)
    flat = mk.merge([m.reshape(8, 12) for m in models], "tsv_m", base=base.reshape(8, 12))
    assert torch.equal(found, flat.reshape(8, 3, 2, 2))
    mean = mk.merge(models, "tsv_m", base=base, conv="mean")
    torch.testing.assert_close(mean, torch.stack(models).mean(0))


def test_experts_are_one_matrix_each():
    base, models = family(4, 10, 6)
    report: dict = {}
    found = mk.merge(models, "iso_c", base=base, name="layers.0.experts.up", report=report)
    for e in range(4):
        one = mk.merge([m[e] for m in models], "iso_c", base=base[e])
        torch.testing.assert_close(found[e], one)
    assert sorted(report) == [f"layers.0.experts.up[{e}]" for e in range(4)]
    flat = mk.merge(models, "iso_c", base=base, name="layers.0.experts.up", experts="")
    assert not torch.allclose(flat, found)


def test_state_dict():
    def model(t):
        base, models = family(12, 10)
        x = base if t is None else models[t]
        return {
            "b.weight": x,
            "b.bias": x[:, 0].clone(),
            "a.text_projection.weight": x[:6].clone(),
            "scalar": x[0, 0].clone(),
            "ids": torch.arange(3),
            "empty": torch.zeros(0, 4),
        }

    models = [model(t) for t in range(3)]
    report: dict = {}
    found = mk.merge_state_dicts(
        models, "tsv_m", base=model(None), report=report, exclude=["*text_projection*", "nothing"], scale=1.0
    )
    assert list(found) == list(models[0])
    assert torch.equal(
        found["b.weight"], mk.merge([m["b.weight"] for m in models], "tsv_m", base=model(None)["b.weight"])
    )
    for name in ("b.bias", "a.text_projection.weight", "scalar"):
        torch.testing.assert_close(found[name], torch.stack([m[name] for m in models]).mean(0), rtol=1e-5, atol=1e-6)
    assert torch.equal(found["ids"], torch.arange(3)) and found["empty"].shape == (0, 4)
    assert report["b.weight"]["k"] == [3, 3, 3] and report["b.weight"]["rank"] == 9


def test_saved_and_reloaded_gives_the_same(tmp_path):
    base, models = family(16, 12, dtype=torch.bfloat16)
    for i, m in enumerate([base, *models]):
        save_file({"w": m}, tmp_path / f"{i}.safetensors")
    read = [load_file(tmp_path / f"{i}.safetensors") for i in range(4)]
    here = mk.merge_state_dicts([{"w": m} for m in models], "star", base={"w": base})
    again = mk.merge_state_dicts(read[1:], "star", base=read[0])
    assert torch.equal(here["w"], again["w"])


def test_integer_buffers_follow_the_base(caplog):
    base, models = family(6, 5)
    states = [{"w": m, "n": torch.tensor([i])} for i, m in enumerate(models)]
    with caplog.at_level(logging.WARNING, "mergekernels"):
        found = mk.merge_state_dicts(states, "iso_c", base={"w": base, "n": torch.tensor([7])})
    assert found["n"].item() == 7 and "integer values differ" in caplog.text


def test_threads_are_set_and_restored():
    base, models = family(12, 10)
    before = torch.get_num_threads()
    mk.merge(models, "iso_c", base=base, threads=1)
    assert torch.get_num_threads() == before
    with pytest.raises(mk.MergeError, match="threads must be at least 1"):
        mk.merge(models, "iso_c", base=base, threads=0)


def bad(model: int, value: float) -> list[torch.Tensor]:
    models = family(6, 5)[1]
    models[model][2, 1] = value
    return models


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"base": None}, "tsv_m needs a base"),
        ({"tensors": bad(1, torch.nan)}, "tensor 'w': model 1 holds NaN or Inf at flat index 11 "),
        ({"tensors": bad(0, torch.inf)}, "tensor 'w': model 0 holds NaN or Inf at flat index 11 "),
        ({"base": torch.full((6, 5), torch.nan)}, "tensor 'w': the base holds NaN or Inf at flat index 0 "),
        (
            {"tensors": [torch.full((6, 5), 3e38)], "base": torch.full((6, 5), -3e38)},
            "the difference of model 0 and the",
        ),
        ({"scale": 1e38, "base": 1e3 * torch.ones(6, 5)}, "the result overflows its dtype"),
        ({"tensors": [torch.zeros(5, 6)]}, "shape of the base differs"),
        ({"nan": "propagate"}, "tsv_m decomposes matrices.*expected nan='error'"),
        ({"backend": "cpu"}, "tsv_m has no kernels of a backend"),
        ({"then": [("lines", {"alpha": 0.2})]}, "tsv_m takes no modifiers"),
        ({"density": 0.2}, "tsv_m has no parameter 'density'"),
        ({"dims": "r"}, "'dims' is not usable; expected one of q, rank"),
        ({"dialect": "paper"}, "tsv_m has no dialect 'paper'"),
        ({"weights": [1.0]}, r"'weights' has the wrong number of values; expected one value, or 3"),
        ({"tensors": []}, "tsv_m cannot merge this many models"),
        ({"tensors": torch.zeros(3, 6, 5)}, "the models are not a list of tensors"),
        ({"tensors": [torch.zeros(6, 5, dtype=torch.int64)] * 3}, "a dtype that cannot be merged"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_input(arguments, words):
    base, models = family(6, 5)
    given = {"tensors": models, "base": base, "name": "w", **arguments}
    with pytest.raises(mk.MergeError, match=words):
        mk.merge(given.pop("tensors"), "tsv_m", **given)


def test_all_shapes_are_looked_at_before_anything_is_merged():
    base, models = family(2, 9)

    class Counting(dict):
        def __getitem__(self, name):
            read.append(name)
            return super().__getitem__(name)

    read: list[str] = []
    states = [Counting({"a": family(9, 9)[1][i], "x": m, "y": m.T.contiguous()}) for i, m in enumerate(models)]
    with pytest.raises(mk.MergeError, match=r"2 problems found") as caught:
        mk.merge_state_dicts(states, "tsv_m", base={"a": family(9, 9)[0], "x": base, "y": base.T.contiguous()})
    assert "tensor 'x': tsv_m: k = floor(q / T) is 0" in str(caught.value) and "tensor 'y'" in str(caught.value)
    assert read == []


def test_names_and_kinds_must_agree():
    base, models = family(6, 5)
    with pytest.raises(mk.MergeError, match="model 1 lacks w"):
        mk.merge_state_dicts([{"w": models[0]}, {}], "iso_c", base={"w": base})
    with pytest.raises(mk.MergeError, match="tensor 'w': some inputs hold floats, others integers"):
        mk.merge_state_dicts([{"w": torch.zeros(6, 5, dtype=torch.int32)}], "iso_c", base={"w": base})


def test_unknown_methods_are_told_of_all():
    with pytest.raises(mk.MergeError, match=r"tsv_m.*Did you mean 'tsv_m'\?"):
        mk.merge([torch.zeros(2, 2)], "tsvm")


@pytest.mark.parametrize("method", ["knots", "lore"])
def test_other_methods_over_matrices_run(method):
    base, models = family(12, 10)
    found = mk.merge(models, method, base=base, name="w")
    assert bool(torch.isfinite(found).all()) and not torch.equal(found, base)


def adapter(seed: int, m: int, n: int, r: int = 2):
    g = torch.Generator().manual_seed(seed)
    key = "base_model.model.layers.0.q_proj"
    tensors = {
        f"{key}.lora_A.weight": torch.randn(r, n, generator=g),
        f"{key}.lora_B.weight": torch.randn(m, r, generator=g),
    }
    return tensors, {"peft_type": "LORA", "r": r, "lora_alpha": r, "target_modules": ["q_proj"]}


@pytest.mark.parametrize("method", ["tsv_m", "iso_c", "star"])
def test_adapters_are_merged_as_their_products(method):
    adapters = [adapter(t, 32, 24) for t in range(3)]
    key = "base_model.model.layers.0.q_proj"
    deltas = [a[f"{key}.lora_B.weight"].double() @ a[f"{key}.lora_A.weight"].double() for a, _ in adapters]
    found = mk.merge_adapters(adapters, method)
    made = found.state_dict[f"{key}.lora_B.weight"].double() @ found.state_dict[f"{key}.lora_A.weight"].double()
    exact = {"tsv_m": brute.tsv_m, "iso_c": brute.iso_c, "star": lambda d: brute.star(d, 40.0)}[method](deltas)
    assert brute.error(made, exact) < 1e-5


@pytest.mark.parametrize(
    ("method", "arguments", "words"),
    [
        ("tsv_m", {}, r"tensor 'layers.0.q_proj': tsv_m: k = floor\(q / T\) is 0"),
        ("iso_cts", {"common_space_fraction": 0.1}, "iso_cts: the common space has a negative size"),
    ],
)
def test_adapters_of_impossible_sizes_are_refused(method, arguments, words):
    with pytest.raises(mk.MergeError, match=words):
        mk.merge_adapters([adapter(t, 4, 9) for t in range(7)], method, **arguments)
