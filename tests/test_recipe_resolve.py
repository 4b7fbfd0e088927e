"""Recipes against checkpoints: which tensors make which, dtypes, tying, the config, and what does not fit."""

from __future__ import annotations

import random
import subprocess
import sys

import jinja2
import pytest

from mergekernels import methods
from mergekernels.engine.recipe import load_recipe, resolve
from mergekernels.engine.recipe.names import Stack, find_stack, is_embedding_side
from mergekernels.errors import PlanError
from recipe_checkpoints import LLAMA, llama_shapes, save

TIES = """
merge_method: ties
base_model: base
models:
  - {model: a, parameters: {weight: 1}}
  - {model: b, parameters: {weight: 1}}
"""
LINEAR = """
merge_method: linear
models:
  - {model: a, parameters: {weight: 1}}
  - {model: b, parameters: {weight: 1}}
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    for name in ("base", "a", "b"):
        save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def merge_of(text, **options):
    return resolve(load_recipe(text, **options))


def problems_of(text, **options):
    with pytest.raises(PlanError) as caught:
        merge_of(text, **options)
    return [str(p) for p in caught.value.problems]


def by_name(merge):
    return {t.name: t for t in merge.tensors}


def sources(merge):
    """{output name: [(label, input name) of base, then models]}."""

    def where(s):
        return merge.inputs[s.input].label, s.tensor

    return {t.name: [where(s) for s in ([t.base] if t.base else []) + list(t.models)] for t in merge.tensors}


# Inputs, base, order ------------------------------------------------------------------------------------------------


def test_models_and_unlisted_base(here):
    merge = merge_of(TIES)
    assert [c.label for c in merge.inputs] == ["a", "b", "base"]
    assert sources(merge) == {n: [("base", n), ("a", n), ("b", n)] for n in llama_shapes()}
    assert [t.name for t in merge.tensors] == sorted(llama_shapes())
    assert {t.action for t in merge.tensors} == {"merge"}
    assert (merge.method, merge.dialect, merge.nan, merge.donor, merge.tokenizer) == ("ties", "default", "error", 2, 2)


def test_listed_base_is_no_task_vector(here):
    merge = merge_of(TIES.replace("models:\n", "models:\n  - model: ./base\n"))
    assert [c.label for c in merge.inputs] == ["./base", "a", "b"]
    assert sources(merge)["model.norm.weight"] == [(x, "model.norm.weight") for x in ("./base", "a", "b")]
    assert merge.donor == 0


def test_listed_base_of_linear_is_one_more_input(here):
    merge = merge_of(LINEAR + "  - {model: base, parameters: {weight: 3}}\nbase_model: base\n")
    assert sources(merge)["model.norm.weight"] == [(x, "model.norm.weight") for x in ("a", "b", "base")]
    assert merge.tensors[0].base is None
    assert merge.tensors[0].params["weight"] == (1.0, 1.0, 3.0)
    assert merge.donor == 2


def test_donor_without_base_is_the_first_model(here):
    assert merge_of(LINEAR).donor == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TIES.replace("base_model: base\n", ""), "line 2: ties needs a base_model"),
        (TIES.replace("model: b,", "model: a,"), "line 6: model 'a' is listed twice; expected each model once"),
        (TIES.replace("model: b,", "model: ./a,"), "line 6: model 'a' is listed twice; expected each model once"),
        (
            "merge_method: ties\nbase_model: a\nmodels: [{model: a}]\n",
            "line 3: ties cannot merge this number of models beside the base; expected 1 to 64 in each slice; got 0",
        ),
        (
            LINEAR.replace("linear", "passthrough").replace("parameters: {weight: 1}", ""),
            "line 3: passthrough cannot merge this number of models; expected exactly 1 in each slice; got 2",
        ),
        (
            "merge_method: passthrough\nbase_model: base\nmodels: [{model: a}]\n",
            "line 3: passthrough cannot merge this number of models; expected exactly 1 in each slice; got 2",
        ),
        (
            LINEAR.replace("linear", "tiess"),
            f"line 2: this version has no merge method 'tiess'; expected one of {', '.join(methods())}. "
            "Did you mean 'ties'?",
        ),
        (
            LINEAR.replace("linear", "wanda_ties"),
            f"line 2: this version has no merge method 'wanda_ties'; expected one of {', '.join(methods())}",
        ),
        (LINEAR + "dialect: papr\n", "line 6: linear has no dialect 'papr'; expected one of default"),
        (LINEAR + "dialect: mergekit\n", "line 6: linear has no dialect 'mergekit'; expected one of default"),
        (
            LINEAR + "layers: model.layer.*\n",
            "line 6: no tensor is in the stack 'model.layer.*'. Did you mean 'model.layers.*'?",
        ),
        (
            LINEAR.replace("model: b", "model: bb"),
            "line 5: model 'bb' does not exist; expected a folder, a safetensors file",
        ),
        (
            LINEAR.replace("model: b", "model: org/b"),
            "line 5: model 'org/b' is neither a local folder nor in the hub cache. Download",
        ),
        (LINEAR.replace("model: b", "model: b@main"), "line 5: a local folder has no revisions; got 'b@main'"),
        (LINEAR.replace("model: b", "model: 'b+c'"), "line 5: adapter 'c' does not exist; expected a folder"),
        (LINEAR.replace("model: b", "model: b@c@d"), "line 5: model reference with several '@'"),
    ],
)
def test_models_that_do_not_work(here, monkeypatch, text, message):
    monkeypatch.setenv("HF_HUB_CACHE", str(here / "hub"))
    (problem, *rest) = problems_of(text)
    assert problem.startswith(message)
    assert rest == []


def test_references(here, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(here / "hub"))
    commit = "0123456789" * 4
    snapshot = save(here / "hub" / "models--org--b" / "snapshots" / commit)
    (here / "hub" / "models--org--b" / "refs").mkdir()
    (here / "hub" / "models--org--b" / "refs" / "v1").write_text(commit)
    save(here / "odd+name@x")
    for reference, label, path in [
        ("org/b@v1", "org/b@v1", snapshot),
        (f"org/b@{commit}", f"org/b@{commit}", snapshot),
        ("{path: org/b, revision: v1}", "org/b@v1", snapshot),
        ("{model: {path: org/b, revision: v1}}", "org/b@v1", snapshot),
        ("odd+name@x", "odd+name@x", here / "odd+name@x"),
        ("{path: odd+name@x}", "odd+name@x", here / "odd+name@x"),
        ("b/model.safetensors", "b/model.safetensors", here / "b" / "model.safetensors"),
        (str(here / "b"), str(here / "b"), here / "b"),
    ]:
        merge = merge_of(LINEAR.replace("model: b", f"model: {reference}"))
        assert (merge.inputs[1].label, merge.inputs[1].path.absolute()) == (label, path)


def test_relative_paths_count_from_here_then_from_the_recipe(here, monkeypatch):
    folder = here / "recipes"
    folder.mkdir()
    save(folder / "b")
    save(folder / "c")
    (folder / "r.yml").write_text(LINEAR.replace("model: a", "model: c"))
    merge = resolve(load_recipe(folder / "r.yml"))
    assert [c.path.absolute() for c in merge.inputs] == [folder / "c", here / "b"]
    assert merge.recipe_file == str(folder / "r.yml")


def test_warnings_of_checkpoints_are_kept(here):
    save(here / "b", shards=2)
    merge = merge_of(LINEAR)
    assert [w.split(": ")[-1] for w in merge.warnings] == ["ignored, the index beside it decides"]


# Layer stacks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "prefix"),
    [
        (["model.layers.0.w", "model.layers.1.w"], "model.layers."),
        (["h.0.w", "h.1.w"], "h."),
        (["0.weight", "1.weight"], ""),
        (["net.0.weight", "net.2.weight"], None),
        (["net.1.weight", "net.2.weight"], None),
        (["weight"], None),
        ([f"layers.{i}.experts.{j}.w" for i in range(2) for j in range(8)], "layers."),
        ([f"vision.{i}.w" for i in range(3)] + [f"text.{i}.w" for i in range(4)], "text."),
        ([f"a.{i}.w" for i in range(3)] + [f"b.{i}.{n}" for i in range(3) for n in "xy"], "b."),
        ([f"b.{i}.w" for i in range(3)] + [f"a.{i}.w" for i in range(3)], "a."),
        (["a.0.w", "a.01.w", "b.0"], "a."),
        (["w.0", "w.1"], "w."),
    ],
)
def test_find_stack(names, prefix):
    stack = find_stack(names)
    assert (None if stack is None else stack.prefix) == prefix


def test_stack_patterns():
    stack = Stack.of_pattern("blocks.*.layers")
    assert stack.split("blocks.3.layers.0.w") == (3, ".layers.0.w")
    assert stack.split("blocks.3.other.w") is None
    assert stack.split("blocks.x.layers.w") is None
    assert stack.join(5, ".layers.0.w") == "blocks.5.layers.0.w"
    assert Stack.of_pattern("model.layers.*").split("model.layers.12.w") == (12, ".w")
    assert Stack("").split("0.weight") == (0, ".weight")
    assert Stack("h.").split("h.01.w") is None


def test_which_side_of_the_stack():
    first = [
        "model.embed_tokens.weight",
        "transformer.wte.weight",
        "wpe.weight",
        "tok_embeddings.weight",
        "pos_embed",
        "gpt_neox.embed_in.weight",
    ]
    last = [
        "model.norm.weight",
        "lm_head.weight",
        "embed_out.weight",
        "unembed.weight",
        "ln_f.bias",
        "score.weight",
        "output.weight",
    ]
    assert [n for n in first if not is_embedding_side(n)] == []
    assert [n for n in last if is_embedding_side(n)] == []


def test_gradients_outside_the_stack_are_mentioned(here):
    merge = merge_of(LINEAR.replace("b, parameters: {weight: 1}", "b, parameters: {weight: [1, 2]}"))
    assert merge.warnings == (
        "line 5: tensors outside the layer stack, 'model.embed_tokens.weight' for one, "
        "take the first value of the gradient for 'weight'",
    )


def test_named_stack_decides_gradients(here):
    shapes = {f"vision.blocks.{i}.w": (2,) for i in range(4)} | {f"model.layers.{i}.w": (2,) for i in range(3)}
    save(here / "a", shapes, config=None)
    text = "merge_method: linear\nmodels: [{model: a, parameters: {weight: [1, 2]}}]\n"
    longest = by_name(merge_of(text))
    named = by_name(merge_of(text + "layers: model.layers.*\n"))
    assert [longest[f"vision.blocks.{i}.w"].params["weight"][0] for i in range(4)] == pytest.approx(
        [1, 4 / 3, 5 / 3, 2]
    )
    assert [longest[f"model.layers.{i}.w"].params["weight"][0] for i in range(3)] == [1, 1, 1]
    assert [named[f"vision.blocks.{i}.w"].params["weight"][0] for i in range(4)] == [1, 1, 1, 1]
    assert [named[f"model.layers.{i}.w"].params["weight"][0] for i in range(3)] == [1, 1.5, 2]


def test_no_stack_at_all(here):
    save(here / "a", {"w": (2, 2), "s": ()}, config=None)
    merge = merge_of("merge_method: linear\nmodels: [{model: a, parameters: {weight: [1, 2]}}]\n")
    assert {t.name: t.params["weight"] for t in merge.tensors} == {"s": (1.0,), "w": (1.0,)}
    (problem,) = problems_of("merge_method: passthrough\nslices:\n- sources: [{model: a, layer_range: [0, 1]}]\n")
    assert problem.startswith("line 2: slices need a layer stack, and no tensor name has one")


def test_layers_with_a_gap(here):
    shapes = {n: s for n, s in llama_shapes().items() if "layers.1." not in n}
    save(here / "b", shapes)
    found = problems_of(LINEAR)
    assert any("the layer stack 'model.layers.*' has no layer 1" in p for p in found)


def test_different_depths(here):
    save(here / "b", llama_shapes(2), config=LLAMA | {"num_hidden_layers": 2})
    assert problems_of(LINEAR) == [
        "line 3: the models have different numbers of layers; expected equal numbers; got a: 3, b: 2"
    ]


# Slices -------------------------------------------------------------------------------------------------------------

STACKED = """
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [1, 3]}]
  - sources: [{model: b, layer_range: [0, 2]}]
  - sources: [{model: a, layer_range: [2, 3]}]
"""


def test_depth_stack(here):
    merge = merge_of(STACKED)
    found = sources(merge)
    order = [("a", 1), ("a", 2), ("b", 0), ("b", 1), ("a", 2)]
    for i, (label, layer) in enumerate(order):
        rest = "self_attn.q_proj.weight"
        assert found[f"model.layers.{i}.{rest}"] == [(label, f"model.layers.{layer}.{rest}")]
    assert len(found) == 3 + 5 * 3
    assert found["model.embed_tokens.weight"] == [("a", "model.embed_tokens.weight")]
    assert found["lm_head.weight"] == [("a", "lm_head.weight")]
    assert merge.config == {"torch_dtype": "bfloat16", "num_hidden_layers": 5}


def test_random_depth_stacks(here):
    """Every layer of every slice comes out once, in order, under the next number."""
    rng = random.Random(11)
    suffixes = [n.removeprefix("model.layers.0.") for n in llama_shapes(1) if "layers" in n]
    for _ in range(40):
        ranges = []
        for _ in range(rng.randrange(1, 6)):
            first = rng.randrange(3)
            ranges.append((rng.choice("ab"), first, rng.randrange(first + 1, 4)))
        slices = [{"sources": [{"model": m, "layer_range": [i, j]}]} for m, i, j in ranges]
        merge = resolve(load_recipe({"merge_method": "passthrough", "slices": slices}))
        layers = [(m, n) for m, i, j in ranges for n in range(i, j)]
        expected = {
            f"model.layers.{at}.{s}": [(m, f"model.layers.{n}.{s}")]
            for at, (m, n) in enumerate(layers)
            for s in suffixes
        }
        expected["model.embed_tokens.weight"] = [(ranges[0][0], "model.embed_tokens.weight")]
        for name in ("model.norm.weight", "lm_head.weight"):
            expected[name] = [(ranges[-1][0], name)]
        assert sources(merge) == expected
        assert merge.config.get("num_hidden_layers", 3) == len(layers)


def test_slices_of_merged_layers(here):
    text = """
merge_method: task_arithmetic
base_model: base
slices:
  - sources:
      - {model: a, layer_range: [0, 2], parameters: {weight: 1}}
      - {model: base, layer_range: [0, 2]}
  - sources:
      - {model: base, layer_range: [1, 2]}
      - {model: b, layer_range: [2, 3], parameters: {weight: 1}}
"""
    found = sources(merge_of(text))
    q = "model.layers.{}.self_attn.q_proj.weight"
    assert found[q.format(0)] == [("base", q.format(0)), ("a", q.format(0))]
    assert found[q.format(2)] == [("base", q.format(1)), ("b", q.format(2))]
    assert found["model.embed_tokens.weight"] == [(x, "model.embed_tokens.weight") for x in ("base", "a")]
    assert found["model.norm.weight"] == [(x, "model.norm.weight") for x in ("base", "b")]


def test_a_slice_may_have_its_own_base(here):
    text = """
merge_method: task_arithmetic
slices:
  - base_model: a
    sources: [{model: a, layer_range: [0, 1]}, {model: b, layer_range: [0, 1], parameters: {weight: 1}}]
  - base_model: b
    sources: [{model: a, layer_range: [1, 3], parameters: {weight: 1}}, {model: b, layer_range: [1, 3]}]
"""
    merge = merge_of(text)
    bases = {t.name: merge.inputs[t.base.input].label for t in merge.tensors if "norm.weight" in t.name}
    assert bases["model.layers.0.input_layernorm.weight"] == "a"
    assert bases["model.layers.1.input_layernorm.weight"] == "b"
    assert bases["model.norm.weight"] == "b"
    assert merge.config == {"torch_dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "[0, 2]",
            "[0, 4]",
            "line 5: layer_range past the last layer; "
            "expected an end of at most 3, the number of layers of 'b'; got [0, 4]",
        ),
        (
            "{model: b, layer_range: [0, 2]}",
            "{model: b, layer_range: [0, 2]}, {model: a, layer_range: [0, 3]}",
            "line 5: the sources of a slice must have equally many layers; got [2, 3]",
        ),
        (
            "{model: b, layer_range: [0, 2]}",
            "{model: b, layer_range: [0, 2]}, {model: a, layer_range: [0, 2]}",
            "line 5: passthrough cannot merge this number of models; expected exactly 1 in each slice; got 2",
        ),
    ],
)
def test_slices_that_do_not_work(here, old, new, message):
    assert problems_of(STACKED.replace(old, new))[0] == message


def test_base_must_be_in_every_slice(here):
    text = "merge_method: ties\nbase_model: base\nslices:\n- sources: [{model: a, layer_range: [0, 3]}]\n"
    assert problems_of(text) == ["line 4: base_model 'base' must be listed among the sources of every slice"]


def test_per_layer_lists_of_the_config_are_restacked(here):
    kinds = ["full", "sliding", "linear"]
    for name in ("a", "b"):
        save(here / name, config=LLAMA | {"layer_types": kinds, "other": [1, 2, 3]})
    assert merge_of(STACKED).config["layer_types"] == ["sliding", "linear", "full", "sliding", "linear"]
    assert "other" not in merge_of(STACKED).config


def test_number_of_layers_under_other_keys(here):
    for key in ("n_layer", "num_layers", "n_layers"):
        for name in ("a", "b"):
            save(here / name, config={key: 3, "dtype": "bfloat16"})
        assert merge_of(STACKED).config == {key: 5, "dtype": "bfloat16"}
    for name in ("a", "b"):
        save(here / name, config={"text_config": {"num_hidden_layers": 3, "x": 1}})
    assert merge_of(STACKED).config == {"torch_dtype": "bfloat16", "text_config": {"num_hidden_layers": 5, "x": 1}}


# Tensors that differ ------------------------------------------------------------------------------------------------


def test_missing_tensors_are_listed_per_input(here):
    save(here / "a", {n: s for n, s in llama_shapes().items() if n != "model.norm.weight"})
    save(here / "b", llama_shapes() | {"extra.weight": (3,)})
    found = problems_of(TIES)
    assert found == [
        "a: 2 tensors missing that other inputs have: 'extra.weight', 'model.norm.weight'",
        "base: 1 tensor missing that other inputs have: 'extra.weight'",
    ]


def test_a_long_list_of_missing_tensors_is_cut(here):
    save(here / "b", llama_shapes() | {f"x{i}": (1,) for i in range(50)})
    (problem,) = problems_of(LINEAR)
    assert problem.startswith("a: 50 tensors missing that other inputs have: 'x0', ")
    assert problem.endswith("'x26' and 30 more")


def test_missing_in_a_layer(here):
    shapes = {n: s for n, s in llama_shapes().items() if n != "model.layers.2.mlp.gate_proj.weight"}
    save(here / "b", shapes)
    assert problems_of(LINEAR) == ["b: 1 tensor missing that other inputs have: 'model.layers.2.mlp.gate_proj.weight'"]


def test_shapes(here):
    save(here / "b", llama_shapes() | {"model.norm.weight": (5,)})
    assert problems_of(TIES) == [
        "tensor 'model.norm.weight': shapes differ; expected equal shapes; got 'a': [4], 'b': [5], 'base': [4]"
    ]


def test_many_different_shapes_are_counted(here):
    save(here / "a", {f"w{i:02}": (2,) for i in range(50)})
    save(here / "b", {f"w{i:02}": (3,) for i in range(50)})
    found = problems_of(LINEAR)
    assert len(found) == 21
    assert found[-1] == "shapes differ in 30 more tensors"


def test_vocabulary(here):
    save(here / "b", llama_shapes(vocabulary=9))
    found = problems_of(LINEAR)
    assert found == [
        f"tensor '{n}': vocabulary sizes differ; expected equal sizes; got 'a': [8, 4], 'b': [9, 4]. "
        "Bring the models to one vocabulary first; building one (tokenizer:) is planned"
        for n in ("model.embed_tokens.weight", "lm_head.weight")
    ]


def test_problems_of_all_kinds_come_together(here):
    save(here / "a", llama_shapes() | {"model.norm.weight": (5,), "extra": (1,)})
    found = problems_of(LINEAR.replace("{model: b, parameters: {weight: 1}}", "model: b"))
    assert len(found) == 3
    assert "shapes differ" in found[0] or "required parameter" in found[0]
    assert any("required parameter 'weight' of 'b' is missing" in p for p in found)
    assert any("'extra'" in p for p in found)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "C64"])
def test_dtypes_that_cannot_be_merged(here, dtype):
    save(here / "b", llama_shapes() | {"model.norm.weight": (dtype, (4,))})
    (problem,) = problems_of(LINEAR)
    assert problem.startswith(
        f"b: dtype {dtype} cannot be merged: 'model.norm.weight'; expected BF16, F16, F32, F64, or integers"
    )


@pytest.mark.parametrize("config", [{"quant_method": "fp8"}, {"bits": 4}])
def test_quantised_checkpoints(here, config):
    save(here / "b", config=LLAMA | {"quantization_config": config})
    (problem,) = problems_of(LINEAR)
    kind = config.get("quant_method", "quantization_config in config.json")
    assert problem.startswith(
        f"b: quantised checkpoint ({kind}); expected float16, bfloat16, float32 or float64 weights"
    )


@pytest.mark.parametrize("dtype", ["I64", "U8", "BOOL"])
def test_integer_buffers(here, dtype):
    for name in ("base", "a", "b"):
        save(here / name, llama_shapes() | {"steps": (dtype, (2,))})
    tensor = by_name(merge_of(TIES + "dtype: float32\n"))["steps"]
    assert (tensor.action, tensor.dtype.name, tensor.cast, dict(tensor.params)) == ("buffer", dtype, None, {})
    assert len(tensor.models) == 2
    assert tensor.base is not None


def test_integers_must_agree_in_dtype(here):
    save(here / "a", llama_shapes() | {"steps": ("I64", (2,))})
    for other in ("I32", "F32"):
        save(here / "b", llama_shapes() | {"steps": (other, (2,))})
        (problem,) = problems_of(LINEAR)
        assert problem.startswith(
            "tensor 'steps': dtypes do not go together; expected all floating, or one and the same"
        )


def test_optional_buffers_are_copied(here):
    inv = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save(here / "b", llama_shapes() | {inv: ("F32", (2,))})
    merge = merge_of(TIES)
    tensor = by_name(merge)[inv]
    assert (tensor.action, tensor.dtype.name, tensor.base) == ("copy", "F32", None)
    assert [merge.inputs[s.input].label for s in tensor.models] == ["b"]
    assert merge.warnings == (f"'{inv}': optional, missing in 'a', 'base'; copied from 'b'",)
    save(here / "base", llama_shapes() | {inv: ("F32", (2,))})
    merge = merge_of(TIES)
    assert merge.inputs[by_name(merge)[inv].models[0].input].label == "base"


def test_attention_biases_are_optional_only_as_masks(here):
    mask, bias = "model.layers.0.attn.bias", "model.layers.1.attn.bias"
    save(here / "b", llama_shapes() | {mask: ("U8", (1, 1, 4, 4)), bias: (4,)})
    assert problems_of(LINEAR) == [f"a: 1 tensor missing that other inputs have: '{bias}'"]


# Tied heads ---------------------------------------------------------------------------------------------------------

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
TIED = LLAMA | {"tie_word_embeddings": True}
UNTIED = LLAMA | {"tie_word_embeddings": False}


def tied_merge(here, a, b):
    """The merge of two models, each given as (has a head, config)."""
    for name, (head, config) in {"a": a, "b": b}.items():
        save(here / name, llama_shapes(head=head), config=config)
    return merge_of(LINEAR)


def test_all_tied(here):
    for config in (TIED, LLAMA):
        merge = tied_merge(here, (False, config), (False, config))
        assert HEAD not in by_name(merge)
        assert "tie_word_embeddings" not in merge.config


@pytest.mark.parametrize("tied_config", [TIED, LLAMA])
@pytest.mark.parametrize("tied_first", [True, False])
def test_one_ties_and_the_other_does_not(here, tied_config, tied_first):
    pair = [(False, tied_config), (True, UNTIED)]
    merge = tied_merge(here, *(pair if tied_first else pair[::-1]))
    expected = [("a", EMBEDDING), ("b", HEAD)] if tied_first else [("a", HEAD), ("b", EMBEDDING)]
    assert sources(merge)[HEAD] == expected
    assert sources(merge)[EMBEDDING] == [("a", EMBEDDING), ("b", EMBEDDING)]
    assert dict(merge.aliases) == {}
    if tied_first:
        assert merge.config["tie_word_embeddings"] is False
    else:
        assert "tie_word_embeddings" not in merge.config


def test_a_stored_head_that_the_config_ties(here):
    merge = tied_merge(here, (True, TIED), (False, TIED))
    assert HEAD not in by_name(merge)
    assert dict(merge.aliases) == {HEAD: EMBEDDING}
    assert merge.warnings == (f"a: '{HEAD}' is stored, but the config ties it to '{EMBEDDING}', which is used",)


def test_no_head_and_no_embedding_that_could_be_one(here):
    save(here / "a", {"shared.weight": (5, 3), "output.weight": (2, 5)}, config=None)
    save(here / "b", {"shared.weight": (5, 3)}, config=None)
    assert problems_of(LINEAR) == ["b: 1 tensor missing that other inputs have: 'output.weight'"]


def test_untied(here):
    merge = tied_merge(here, (True, UNTIED), (True, LLAMA))
    assert sources(merge)[HEAD] == [("a", HEAD), ("b", HEAD)]
    assert "tie_word_embeddings" not in merge.config


# Dtypes, config, tokenizer, chat template ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "keys", "dtype", "cast"),
    [
        (("BF16", "BF16"), "", "bfloat16", None),
        (("BF16", "F16"), "", "float32", None),
        (("BF16", "F64"), "", "float64", None),
        (("F32", "F32"), "out_dtype: bfloat16", "bfloat16", None),
        (("BF16", "BF16"), "dtype: float32", "float32", "float32"),
        (("BF16", "F32"), "dtype: float32", "float32", "float32"),
        (("F32", "F32"), "dtype: float32", "float32", None),
        (("BF16", "BF16"), "dtype: float32\nout_dtype: float16", "float16", "float32"),
        (("F64", "BF16"), "out_dtype: float64", "float64", None),
    ],
)
def test_dtypes(here, inputs, keys, dtype, cast):
    for name, stored in zip(("a", "b"), inputs, strict=True):
        save(here / name, dtype=stored)
    merge = merge_of(LINEAR + keys + "\n")
    assert {t.dtype.torch for t in merge.tensors} == {dtype}
    assert {t.cast and t.cast.torch for t in merge.tensors} == {cast}
    assert merge.config == {"torch_dtype": dtype}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, {"torch_dtype": "float16"}),
        ({"dtype": "bfloat16"}, {"dtype": "float16"}),
        ({"torch_dtype": "x", "dtype": "y"}, {"torch_dtype": "float16", "dtype": "float16"}),
        (None, {"torch_dtype": "float16"}),
    ],
)
def test_dtype_in_the_config(here, config, expected):
    (here / "a" / "config.json").unlink()
    save(here / "a", config=config)
    assert merge_of(LINEAR + "out_dtype: float16\n").config == expected


def test_config_has_the_dtype_of_most_weights(here):
    for name in ("a", "b"):
        save(here / name, llama_shapes() | {"model.norm.weight": ("F32", (4,))})
    assert merge_of(LINEAR).config == {"torch_dtype": "bfloat16"}


def test_tokenizer_source(here):
    assert merge_of(TIES + "tokenizer_source: base\n").tokenizer == 2
    assert merge_of(TIES + "tokenizer_source: b\n").tokenizer == 1
    assert merge_of(TIES + "tokenizer_source: {path: ./a}\n").tokenizer == 0
    assert problems_of(LINEAR + "tokenizer_source: base\n") == ["line 6: 'tokenizer_source: base' without a base_model"]
    assert problems_of(LINEAR + "tokenizer_source: union\n") == [
        "line 6: 'tokenizer_source: union' is not supported: building a vocabulary is planned; "
        "expected base, or a model of the recipe"
    ]
    assert problems_of(LINEAR + "tokenizer_source: ./base\n") == [
        "line 6: tokenizer_source is not a model of the recipe; expected base, or one of a, b; got './base'"
    ]


def test_other_tokenizers_are_mentioned(here):
    for name, text in {"a": "1", "b": "2"}.items():
        (here / name / "tokenizer.json").write_text(text)
    (warning,) = merge_of(LINEAR + "tokenizer_source: a\n").warnings
    assert (
        warning == "'b' has another tokenizer.json than 'a', which is copied; rows of embeddings are merged by position"
    )
    (here / "b" / "tokenizer.json").write_text("1")
    assert merge_of(LINEAR + "tokenizer_source: a\n").warnings == ()


def test_chat_template(here):
    (here / "t.jinja").write_text("{{ x }}")
    assert merge_of(LINEAR).chat_template is None
    assert merge_of(LINEAR + "chat_template: t.jinja\n").chat_template == "{{ x }}"
    assert merge_of(LINEAR + "chat_template: '{{ y }}'\n").chat_template == "{{ y }}"
    assert merge_of(LINEAR + "chat_template: |\n  a\n  b\n").chat_template == "a\nb\n"
    assert problems_of(LINEAR + "chat_template: chatlm\n") == [
        "line 6: not a chat template; expected auto, a file, Jinja text, "
        "or one of alpaca, chatml, exaone, llama3, mistral; got 'chatlm'. Did you mean 'chatml'?"
    ]
    long = "x" * 5000
    assert "cannot read the chat template" in problems_of(LINEAR + f"chat_template: {long}\n")[0]


def test_the_commonest_chat_template(here):
    auto = TIES + "chat_template: auto\n"
    merge = merge_of(auto)
    assert merge.chat_template is None
    assert merge.warnings == ("'chat_template: auto': no input has a chat template",)
    (here / "a" / "tokenizer_config.json").write_text('{"chat_template": "one"}')
    assert merge_of(auto).chat_template == "one"
    (here / "b" / "chat_template.jinja").write_text(" two\n")
    assert merge_of(auto).chat_template == "one"
    named = '[{"name": "tool", "template": "x"}, {"name": "default", "template": "two"}]'
    (here / "base" / "tokenizer_config.json").write_text(f'{{"chat_template": {named}}}')
    assert merge_of(auto).chat_template == "two"
    (here / "base" / "tokenizer_config.json").write_text("[")
    assert merge_of(auto).chat_template == "one"


CHAT = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "U"},
    {"role": "assistant", "content": "A"},
    {"role": "user", "content": "V"},
]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("alpaca", "S\n\n### Instruction:\nU\n\n### Response:\nA</s>\n\n### Instruction:\nV\n\n### Response:\n"),
        (
            "chatml",
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
            "<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\n",
        ),
        ("exaone", "[|system|]S[|endofturn|]\n[|user|]U\n[|assistant|]A[|endofturn|]\n[|user|]V\n[|assistant|]"),
        (
            "llama3",
            "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nU"
            "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|><|start_header_id|>user"
            "<|end_header_id|>\n\nV<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        ("mistral", "<s>[INST] S\n\nU [/INST] A</s>[INST] V [/INST]"),
    ],
)
def test_named_chat_templates(here, name, expected):
    template = merge_of(LINEAR + f"chat_template: {name}\n").chat_template
    render = jinja2.Environment().from_string(template).render
    assert render(messages=CHAT, bos_token="<s>", eos_token="</s>", add_generation_prompt=True) == expected


def test_odd_references_give_errors(here):
    for path in ("x" * 5000, "~nobody/x", "a/b/c/d", "/nonexistent/x"):
        assert "does not exist" in problems_of(LINEAR.replace("model: b", f"model: {path}"))[0]


def test_empty_inputs(here):
    for name in ("a", "b"):
        save(here / name, {})
    assert problems_of(LINEAR) == ["the inputs have no tensors"]


def test_lenient(here):
    text = LINEAR + "parameters: {desnity: 3}\nmerge_metod: x\n"
    merge = merge_of(text, lenient=True)
    assert len(merge.warnings) == 2
    assert merge.warnings[0].startswith("line 7: unknown key 'merge_metod'")
    assert merge.warnings[1].startswith("line 6: linear has no parameter 'desnity'")


def test_large_checkpoint_resolves_quickly(here):
    import time

    shapes = {f"model.layers.{i}.mlp.experts.{j}.{n}": (2, 2) for i in range(40) for j in range(100) for n in "abc"}
    for name in ("base", "a", "b"):
        save(here / name, shapes, shards=3)
        (here / name / "model.safetensors").unlink()
    start = time.process_time()
    merge = merge_of(TIES)
    assert len(merge.tensors) == 12_000
    assert time.process_time() - start < 10


def test_imports_stay_light(here):
    code = (
        "import sys\n"
        "from mergekernels.engine.recipe import load_recipe, resolve\n"
        "import mergekernels.formats.checkpoint, mergekernels.formats.hub\n"
        "assert not {'yaml', 'pydantic', 'torch', 'numpy', 'triton', 'safetensors'} & set(sys.modules)\n"
        f"resolve(load_recipe({TIES!r}))\n"
        "assert not {'torch', 'numpy', 'triton', 'safetensors', 'huggingface_hub'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=here)


def test_the_public_names_stay_functions():
    import mergekernels.engine.recipe as room

    assert callable(room.resolve)
    assert callable(room.load_recipe)


def test_a_dialect_of_another_method_is_one_problem(here):
    for name in ("fusionbench", "papr"):
        with pytest.raises(PlanError) as caught:
            merge_of(TIES + f"dialect: {name}\n")
        assert [p.code for p in caught.value.problems] == ["recipe.value"]
        assert f"ties has no dialect '{name}'; expected one of default, paper, peft" in str(caught.value.problems[0])
