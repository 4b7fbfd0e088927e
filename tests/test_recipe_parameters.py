"""Which value a parameter has for a tensor: levels, filters, gradients, and what is refused or without effect."""

from __future__ import annotations

import pytest
import yaml

from mergekernels._methods.protocol import MethodInfo, Param
from mergekernels.engine.recipe import load_recipe, resolve
from mergekernels.engine.recipe.settings import compile_level, find
from mergekernels.engine.recipe.source import Document
from mergekernels.errors import PlanError
from recipe_checkpoints import llama_shapes, save

VALUES = {"m0": 100.0, "m1": 1.0, "m2": 2.0}
"""The value that every element of a model has in the comparisons with mergekit 0.1.5."""


@pytest.fixture
def models(tmp_path, monkeypatch):
    for name in VALUES:
        save(tmp_path / name, dtype="F32")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def merged(text):
    """The recipe with the values above: {short tensor name: value}, by the methods' formulas."""
    merge = resolve(load_recipe(text))
    result = {}
    for tensor in merge.tensors:
        xs = [VALUES[merge.inputs[s.input].label] for s in tensor.models]
        params = tensor.params
        if merge.method == "linear":
            total = sum(w * x for w, x in zip(params["weight"], xs, strict=True))
            y = total / sum(params["weight"]) if params["normalize"] else total
        elif merge.method == "passthrough":
            (scale,) = params["scale"]
            y = xs[0] * (1 if scale is None else scale)
        else:
            base = VALUES[merge.inputs[tensor.base.input].label]
            deltas = sum(w * (x - base) for w, x in zip(params["weight"], xs, strict=True))
            y = base + params["lambda"] * deltas
        short = tensor.name.removeprefix("model.").removesuffix(".weight")
        result[short.replace("layers.", "").replace("self_attn.", "").replace("mlp.", "")] = round(y, 5)
    return {k: v for k, v in result.items() if "input_layernorm" not in k}


# What mergekit 0.1.5 wrote for these recipes, models as above (float32, constant tensors).
MERGEKIT = {
    "gradients, filters, a number as text": (
        """
merge_method: linear
models:
  - model: m1
    parameters:
      weight:
        - {filter: q_proj, value: [0, 0.5, 4]}
        - {filter: gate, value: 1e-3}
        - value: [1, 3]
  - {model: m2, parameters: {weight: 1}}
parameters: {normalize: [true, false]}
""",
        {"lm_head": 1.5, "embed_tokens": 1.5, "norm": 1.5, "0.gate_proj": 1.999, "0.q_proj": 2.0, "1.gate_proj": 1.999}
        | {"1.q_proj": 1.66667, "2.gate_proj": 2.001, "2.q_proj": 6.0},
    ),
    "levels, scopes, names of input and output, single-layer slice": (
        """
merge_method: task_arithmetic
base_model: m0
slices:
  - sources:
      - {model: m0, layer_range: [0, 2], parameters: {weight: 7}}
      - {model: m1, layer_range: [0, 2], parameters: {weight: [{filter: q_proj, value: 0.5}]}}
    parameters: {weight: [{filter: gate, value: 0.25}], lambda: 2}
  - sources:
      - {model: m0, layer_range: [2, 3]}
      - {model: m2, layer_range: [1, 2], parameters: {lambda: 5, weight: [{filter: 'layers.1', value: 3}]}}
parameters: {weight: 1, lambda: [{filter: 'layers.2', value: [0.5, 0.75]}]}
""",
        {"lm_head": 2.0, "embed_tokens": -98.0, "norm": 2.0, "0.gate_proj": 50.5, "0.q_proj": 1.0, "1.gate_proj": 50.5}
        | {"1.q_proj": 1.0, "2.gate_proj": -120.5, "2.q_proj": -120.5},
    ),
    "depth stack": (
        """
merge_method: passthrough
slices:
  - sources: [{model: m1, layer_range: [0, 2]}]
  - sources: [{model: m2, layer_range: [1, 3], parameters: {scale: [{filter: q_proj, value: [0, 2]}]}}]
""",
        {"lm_head": 2.0, "embed_tokens": 1.0, "norm": 2.0, "0.gate_proj": 1.0, "0.q_proj": 1.0, "1.gate_proj": 1.0}
        | {"1.q_proj": 1.0, "2.gate_proj": 2.0, "2.q_proj": 0.0, "3.gate_proj": 2.0, "3.q_proj": 4.0},
    ),
    "an unlisted base of linear is one more input": (
        """
merge_method: linear
base_model: m0
models: [{model: m1, parameters: {weight: 1}}, {model: m2, parameters: {weight: 1}}]
parameters: {weight: 2}
""",
        dict.fromkeys(["lm_head", "embed_tokens", "norm"], 50.75)
        | {f"{i}.{n}": 50.75 for i in range(3) for n in ("gate_proj", "q_proj")},
    ),
    "but not under slices": (
        """
merge_method: linear
base_model: m0
slices:
  - sources:
      - {model: m1, layer_range: [0, 3], parameters: {weight: 1}}
      - {model: m2, layer_range: [0, 3], parameters: {weight: 1}}
""",
        dict.fromkeys(["lm_head", "embed_tokens", "norm"], 1.5)
        | {f"{i}.{n}": 1.5 for i in range(3) for n in ("gate_proj", "q_proj")},
    ),
    "passthrough of the base itself": (
        "merge_method: passthrough\nbase_model: m1\nmodels: [{model: m1}]\n",
        dict.fromkeys(["lm_head", "embed_tokens", "norm"], 1.0)
        | {f"{i}.{n}": 1.0 for i in range(3) for n in ("gate_proj", "q_proj")},
    ),
}


@pytest.mark.parametrize("case", MERGEKIT)
def test_as_mergekit(models, case):
    text, expected = MERGEKIT[case]
    assert merged(text) == expected


INFO = MethodInfo(
    name="fake",
    purpose="",
    formula="",
    params=(
        Param("w", "float", "weight", per_model=True),
        Param("d", "float", "density", per_model=True, default=1.0, low=0.0, high=1.0),
        Param("low", "float", "", default=1.0, low=2.0),
        Param("flag", "bool", "", default=False),
        Param("count", "int", "", default=1, low=1),
        Param("mode", "str", "", default="a", choices=("a", "b", "c")),
    ),
    base="optional",
    passes="",
    source="",
)


def compiled(parameters, lenient=False):
    """(settings, messages of problems, warnings) of a mapping or of YAML lines."""
    problems, warnings = [], []
    document = Document({})
    if isinstance(parameters, str):
        document = load_recipe(f"merge_method: x\nmodels: [{{model: a}}]\nparameters:\n{parameters}").document
        parameters = document.data["parameters"]
    settings = compile_level(document, (), parameters, INFO, lenient=lenient, problems=problems, warnings=warnings)
    return settings, [str(p) for p in problems], warnings


@pytest.mark.parametrize(
    ("name", "value", "t", "expected"),
    [
        ("w", 3, 0.7, 3.0),
        ("w", -0.5, 0.0, -0.5),
        ("w", "1e-3", 0.0, 0.001),
        ("w", "-2.5E+1", 0.0, -25.0),
        ("w", [4], 0.9, 4.0),
        ("w", [0, 0.5, 1], 0.25, 0.25),
        ("w", [0, 0.5, 1], 0.5, 0.5),
        ("w", [0, 1, 0], 0.75, 0.5),
        ("w", [0, 1, 0], 1.0, 0.0),
        ("w", [0, 1], 1 / 3, (1 - 1 / 3) * 0.0 + 1 / 3 * 1.0),
        ("w", ["1e0", 3], 0.5, 2.0),
        ("flag", True, 0.0, True),
        ("flag", 1, 0.0, True),
        ("flag", 0.0, 0.0, False),
        ("flag", [True, False, True], 0.49, True),
        ("flag", [True, False, True], 0.5, False),
        ("flag", [True, False, True], 1.0, True),
        ("count", 3, 0.0, 3),
        ("count", "2", 0.0, 2),
        ("count", [1, 5], 0.9, 1),
        ("mode", "b", 0.0, "b"),
        ("mode", ["a", "b", "c"], 0.99, "b"),
        ("d", {"filter": "proj", "value": 0.5}, 0.0, 0.5),
        ("d", {"value": [0, 1]}, 0.5, 0.5),
        ("d", {"filter": "mlp", "value": 0.5}, 0.0, None),
        ("d", [{"filter": "mlp", "value": 0}, {"filter": "q_proj", "value": 0.25}, {"value": 1}], 0.0, 0.25),
        ("d", [{"filter": "mlp", "value": 0}, {"filter": "*", "value": 0.75}, {"value": 1}], 0.0, 0.75),
        ("d", [{"filter": None, "value": 0.125}, {"filter": "q_proj", "value": 1}], 0.0, 0.125),
        ("d", [{"filter": "q_proj", "value": [1, 0]}], 0.25, 0.75),
        ("d", [{"filter": "Q_PROJ", "value": 1}], 0.0, None),
        ("d", [], 0.0, None),
    ],
)
def test_values(name, value, t, expected):
    settings, problems, _ = compiled({name: value})
    assert problems == []
    found = find([settings[name]], "model.layers.1.self_attn.q_proj.weight", t)
    assert found == expected
    assert type(found) is type(expected)


def test_levels():
    def level(value):
        return compiled({"w": value})[0]["w"]

    only_mlp, nothing, other = level([{"filter": "mlp", "value": 1}]), level([]), level(2)
    assert find([only_mlp, None, nothing, other, level(3)], "attn", 0.0) == 2.0
    assert find([only_mlp, other], "mlp", 0.0) == 1.0
    assert find([None, only_mlp], "attn", 0.0) is None
    assert find([], "attn", 0.0) is None


@pytest.mark.parametrize(
    ("yaml_line", "message"),
    [
        ("w: true", "line 4: parameter 'w': wrong type; expected a finite number; got True"),
        ("w: x", "line 4: parameter 'w': wrong type; expected a finite number; got 'x'"),
        ("w:", "line 4: parameter 'w': wrong type; expected a finite number; got 'nothing'"),
        ("w: .nan", "line 4: parameter 'w': wrong type; expected a finite number; got nan"),
        ("w: .inf", "line 4: parameter 'w': wrong type; expected a finite number; got inf"),
        ("w: [1, x]", "line 4: parameter 'w': wrong type; expected a finite number; got 'x'"),
        ("w: [[1]]", "line 4: parameter 'w': wrong type; expected a finite number; got [1]"),
        ("d: 20", "line 4: parameter 'd': out of range; expected a number in [0, 1]; got 20"),
        ("d: -1e-9", "line 4: parameter 'd': out of range; expected a number in [0, 1]; got '-1e-9'"),
        ("d: [0.5, 1.5]", "line 4: parameter 'd': out of range; expected a number in [0, 1]; got 1.5"),
        ("low: 1", "line 4: parameter 'low': out of range; expected a number of at least 2; got 1"),
        ("flag: 2", "line 4: parameter 'flag': wrong type; expected true or false; got 2"),
        ("flag: 'true'", "line 4: parameter 'flag': wrong type; expected true or false; got 'true'"),
        ("count: 1.5", "line 4: parameter 'count': wrong type; expected an integer; got 1.5"),
        ("count: 0", "line 4: parameter 'count': out of range; expected a number of at least 1; got 0"),
        ("mode: d", "line 4: parameter 'mode': not a possible value; expected one of a, b, c; got 'd'"),
        (
            "mode: bb",
            "line 4: parameter 'mode': not a possible value; expected one of a, b, c; got 'bb'. Did you mean 'b'?",
        ),
        ("mode: 1", "line 4: parameter 'mode': not a possible value; expected one of a, b, c; got 1"),
        (
            "wieght: 1\n  w: 1",
            "line 4: fake has no parameter 'wieght'; expected one of w, d, low, flag, count, mode",
        ),
        ("d:\n    - {filter: a, value: 0.5}\n    - {filter: b, value: 5}", "line 6: parameter 'd': out of range"),
        (
            "d:\n    - {filter: a, value: 0.5}\n    - {filter: b, vlaue: 1}",
            "line 6: parameter 'd': unknown key 'vlaue' beside",
        ),
        (
            "d:\n    - {filter: a}",
            "line 5: parameter 'd': a filter without a value; expected {filter: ..., value: ...}",
        ),
        (
            "d:\n    - {filter: 1, value: 1}",
            "line 5: parameter 'd': a filter is a part of a tensor's name; expected a string",
        ),
        ("d:\n    - {filter: a, value: []}", "line 5: parameter 'd': an empty list; expected at least one value"),
        ("d: [0.5, {value: 1}]", "line 4: parameter 'd': a list has either numbers or filters"),
        ("d: {a: 1}", "line 4: parameter 'd': unknown key 'a' beside a filter"),
    ],
)
def test_wrong_values(yaml_line, message):
    (problem,) = compiled(f"  {yaml_line}\n")[1]
    assert problem.startswith(message)


def test_unknown_parameters():
    assert compiled({"dd": 1})[1] == [
        "fake has no parameter 'dd'; expected one of w, d, low, flag, count, mode. Did you mean 'd'?"
    ]
    settings, problems, warnings = compiled({"dd": 1, "d": 1}, lenient=True)
    assert list(settings) == ["d"]
    assert problems == []
    assert warnings[0].startswith("fake has no parameter 'dd'")


TIES = """
merge_method: ties
base_model: m0
models:
  - model: m1
    parameters: {weight: 1, density: 0.5}
  - model: m2
    parameters: {weight: 2}
"""


def test_complete_parameters_with_defaults(models):
    merge = resolve(load_recipe(TIES))
    assert merge.warnings == ()
    for tensor in merge.tensors:
        assert tensor.params["weight"] == (1.0, 2.0)
        assert tensor.params["density"] == (0.5, 1.0)
        assert tensor.params["lambda"] == 1.0
        assert tensor.params["normalize"] is True
        assert tensor.params["scope"] is None


def test_scope_and_tie_policy_are_parameters(models):
    merge = resolve(
        load_recipe(
            TIES
            + "dialect: paper\nparameters: {scope: tensor, tie_policy: index, weight: 1}\n".replace("paper", "default")
        )
    )
    assert {(t.params["scope"], t.params["tie_policy"]) for t in merge.tensors} == {("tensor", "index")}


def problems_of(text, **options):
    with pytest.raises(PlanError) as caught:
        resolve(load_recipe(text, **options))
    return [str(p) for p in caught.value.problems]


def test_missing_required_parameter(models):
    text = TIES.replace("parameters: {weight: 2}", "parameters: {weight: [{filter: mlp, value: 1}]}")
    assert problems_of(text) == [
        "line 7: required parameter 'weight' of 'm2' is missing for tensor 'model.embed_tokens.weight'; "
        "expected weight of each task vector, applied before the vote. "
        "Give it under the model, or under the top-level parameters for all (ties)"
    ]


def test_missing_weight_of_an_unlisted_base_of_linear(models):
    (problem,) = problems_of("merge_method: linear\nbase_model: m0\nmodels: [{model: m1, parameters: {weight: 1}}]\n")
    assert problem.startswith(
        "line 2: required parameter 'weight' of 'm0' is missing for tensor 'model.embed_tokens.weight'"
    )


def test_weight_may_be_absent_where_the_dialect_says_so(models):
    text = "merge_method: ties\ndialect: paper\nbase_model: m0\nmodels: [{model: m1}, {model: m2}]\n"
    assert resolve(load_recipe(text)).tensors[0].params["weight"] == (1.0, 1.0)


def test_combinations_are_checked_once(models):
    entries = "[{model: m1, parameters: {weight: [1, 2]}}, {model: m2, parameters: {weight: -1}}]"
    text = f"merge_method: linear\nmodels: {entries}\n"
    (problem,) = problems_of(text)
    assert "the weights sum to zero, and normalize divides by their sum" in problem
    text = TIES.replace("merge_method: ties", "merge_method: ties\ndialect: paper")
    (problem,) = problems_of(text)
    assert "the paper's dialect has no weights" in problem


def test_every_wrong_parameter_is_listed_even_without_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = problems_of(TIES.replace("density: 0.5", "desnity: 0.5").replace("weight: 2", "weight: x"))
    assert [f.split(";")[0] for f in found] == [
        "line 6: ties has no parameter 'desnity'",
        "line 8: parameter 'weight': wrong type",
        "line 5: model 'm1' does not exist",
        "line 7: model 'm2' does not exist",
        "line 3: model 'm0' does not exist",
    ]
    assert "Did you mean 'density'?" in found[0]


def test_without_effect(models):
    text = """
merge_method: ties
base_model: m0
models:
  - model: m0
    parameters: {weight: 3}
  - model: m1
    parameters:
      weight: 1
      lambda: 2
      density:
        - {filter: q_proj, value: 0.5}
        - {filter: w1, value: 0.5}
  - model: m2
parameters:
  weight: [{filter: '*', value: 1}, {filter: mlp, value: 2}]
  lambda: []
"""
    merge = resolve(load_recipe(text))
    assert set(merge.warnings) == {
        "line 17: the empty list for 'lambda' has no effect",
        "line 6: parameter 'weight' of 'm0' has no effect: it is not read from the base model",
        "line 10: parameter 'lambda' of 'm1' has no effect: "
        "it is one value for all models and is not read under a model",
        "line 13: filter 'w1' of parameter 'density' selects no tensor",
        "line 16: filter 'mlp' of parameter 'weight' selects no tensor",
    }
    assert {t.params["weight"] for t in merge.tensors} == {(1.0, 1.0)}
    assert {t.params["lambda"] for t in merge.tensors} == {1.0}


def test_per_input_filters_see_input_names_and_shared_ones_output_names(models):
    text = """
merge_method: linear
slices:
  - sources: [{model: m1, layer_range: [0, 1], parameters: {weight: 1}}]
  - sources: [{model: m2, layer_range: [0, 3], parameters: {weight: [{filter: layers.0, value: 5}, {value: 7}]}}]
parameters: {normalize: [{filter: layers.0, value: true}, {value: false}]}
"""
    merge = resolve(load_recipe(text))
    seen = {t.name: (t.params["weight"][0], t.params["normalize"]) for t in merge.tensors if "norm.weight" in t.name}
    assert seen == {
        "model.layers.0.input_layernorm.weight": (1.0, True),
        "model.layers.1.input_layernorm.weight": (5.0, False),
        "model.layers.2.input_layernorm.weight": (7.0, False),
        "model.layers.3.input_layernorm.weight": (7.0, False),
        "model.norm.weight": (7.0, False),
    }


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_positions_of_layers(tmp_path, monkeypatch, layers):
    save(tmp_path / "m1", llama_shapes(layers))
    monkeypatch.chdir(tmp_path)
    merge = resolve(load_recipe("merge_method: linear\nmodels: [{model: m1, parameters: {weight: [1, 2]}}]\n"))
    weights = {t.name: t.params["weight"][0] for t in merge.tensors if "q_proj" in t.name}
    expected = [1 + i / (layers - 1) for i in range(layers)] if layers > 1 else [2.0]
    assert [weights[f"model.layers.{i}.self_attn.q_proj.weight"] for i in range(layers)] == expected
    rest = {t.name: t.params["weight"][0] for t in merge.tensors if "layers" not in t.name}
    assert set(rest.values()) == {1.0}


def test_recipe_is_kept_for_the_manifest(models):
    merge = resolve(load_recipe(TIES), seed=7)
    assert merge.recipe == yaml.safe_load(TIES)
    assert merge.seed == 7
    assert resolve(load_recipe(TIES + "seed: 9\n")).seed == 9
    assert resolve(load_recipe(TIES)).seed == 0
    with pytest.raises(ValueError, match="seed out of range"):
        resolve(load_recipe(TIES), seed=-1)
