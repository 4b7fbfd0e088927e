"""The key `then`, a base that is the first input, companions, and the parameters of all methods in mergekit's words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import engine_cases as cases
import mergekernels as mk
from mergekernels import _methods
from mergekernels._methods.protocol import Coeffs, MethodInfo, Param, Spec
from mergekernels._methods.task_arithmetic import TaskArithmetic
from mergekernels.engine.recipe import load_recipe, resolve
from mergekernels.engine.specs import Specs, method_of
from mergekernels.errors import MergeError, PlanError
from mergekernels.ops.program import Program
from recipe_checkpoints import llama_shapes, save
from test_engine_rounds import read

LINES = "merge_method: task_arithmetic\nbase_model: base\nmodels: [{model: m1, parameters: {weight: 1}}]\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("base", "m1", "m2", "m3"):
        save(tmp_path / name)
    return tmp_path


def problems_of(text: str) -> list[str]:
    with pytest.raises(MergeError) as caught:
        resolve(load_recipe(text, collect=True))
    error = caught.value
    return [str(p) for p in error.problems] if isinstance(error, PlanError) else [str(error)]


def test_then_is_resolved_and_numbers_blocks(here: Path) -> None:
    merge = resolve(load_recipe(LINES + "then: [{lines: {alpha: 0.2}}]\n"))
    assert merge.then == (("lines", {"alpha": 0.2}),)
    assert method_of(merge).info.name == "task_arithmetic + lines"
    blocks = {t.name: t.block for t in merge.tensors}
    assert blocks["model.layers.2.mlp.gate_proj.weight"] == (2, 3)
    assert blocks["lm_head.weight"] is None
    assert {t.params["lines.alpha"] for t in merge.tensors} == {0.2}


def test_blocks_by_the_pattern_of_lines_and_by_the_layers_of_the_recipe(here: Path) -> None:
    pattern = r"'layers\.([01])\.'"
    merge = resolve(load_recipe(LINES + f"then:\n- lines: {{alpha: 0.2, blocks: {pattern}}}\n"))
    assert {t.block for t in merge.tensors} == {None, (0, 2), (1, 2)}
    merge = resolve(load_recipe(LINES + "layers: model.layers.*\nthen: [{lines: {alpha: 0.2}}]\n"))
    assert {t.block for t in merge.tensors} == {None, (0, 3), (1, 3), (2, 3)}


@pytest.mark.parametrize(
    ("then", "message"),
    [
        ("[{line: {alpha: 1}}]", "line 4: unknown modifier; expected lines; got 'line'. Did you mean 'lines'?"),
        ("[{lines: {alfa: 1}}]", "line 4: lines has no parameter 'alfa'; expected one of alpha, beta, blocks"),
        ("[{lines: {alpha: x}}]", "line 4: parameter 'alpha': wrong type; expected a finite number; got 'x'"),
        ("[{lines: {alpha: [0, 1]}}]", "line 4: parameter 'alpha' of lines varies with the tensor; expected one value"),
        ("[{lines: {alpha: 1}}, {lines: {alpha: 1}}]", "line 4: the modifier 'lines' is there twice; expected once"),
        ("[lines]", "line 4: 'then.0' has a wrong value; expected one modifier with its parameters"),
        ("{lines: {alpha: 1}}", "line 4: 'then' has a wrong value; expected a list; got a mapping"),
        ("[{lines: 3}]", "line 4: 'then.0.lines' has a wrong value; expected a mapping of parameters; got 3"),
        ("[{lines: {}}]", "line 3: tensor 'model.embed_tokens.weight': lines needs alpha"),
    ],
)
def test_what_is_wrong_with_then_names_its_line(here: Path, then: str, message: str) -> None:
    (problem, *rest) = problems_of(LINES + f"then: {then}\n")
    assert problem.startswith(message)
    assert not rest


def test_then_needs_a_task_vector(here: Path) -> None:
    text = "merge_method: linear\nmodels: [{model: m1, parameters: {weight: 1}}]\nthen: [{lines: {alpha: 1}}]\n"
    assert problems_of(text)[0].startswith("line 3: lines scales a task vector, and linear makes none")


@pytest.mark.parametrize("lines", [{"alpha": 0.25}, {"beta": 0.5}])
def test_lines_out_of_core_equals_the_call_and_is_recorded(tmp_path: Path, lines: dict[str, float]) -> None:
    cases.family(tmp_path)
    path = cases.recipe(tmp_path, "task_arithmetic", parameters={"weight": 0.5}, then=[{"lines": lines}])
    plain = cases.recipe(tmp_path, "task_arithmetic", name="plain.yml", parameters={"weight": 0.5})
    plan = cases.plan_of(path, tmp_path / "o", backend="reference")
    assert plan.hash != cases.plan_of(plain, tmp_path / "o").hash
    cases.run_of(path, tmp_path / "out", backend="reference", tile=4096)
    manifest = json.loads((tmp_path / "out/merge_manifest.json").read_text())
    assert manifest["then"] == [{"lines": lines}]
    assert plan.to_dict()["then"] == [{"lines": lines}]
    base, *tuned = cases.state_dicts()
    expected = mk.merge_state_dicts(
        tuned, "task_arithmetic", base=base, weights=0.5, backend="reference", then=[("lines", lines)]
    )
    for name, tensor in read(tmp_path / "out").items():
        assert torch.equal(tensor, expected[name]), name
    assert mk.verify(tmp_path / "out", recompute=3).ok


BY_TENSOR: dict[str, tuple[dict[str, Any], int]] = {
    # method: parameters, reads of the checkpoint where nothing overflows
    "ties": ({"weight": 0.8, "density": 0.3}, 3),
    "breadcrumbs": ({"weight": 1.0, "density": 0.5, "gamma": 0.05}, 3),
    "model_stock": ({"filter_wise": True}, 3),
    "della": ({"weight": 0.7, "density": 0.5, "epsilon": 0.2}, 3),
    "dare_linear": ({"weight": 1.0, "density": 0.5, "rescale": False}, 2),
}
BUDGETS: list[dict[str, Any]] = [
    {"tile": 4096, "threads": 3},
    {"memory": 9_000_000},
    {"memory": 4_000_000, "threads": 1},
]


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and three fine-tunes of few tensors, some of more than one tile."""
    root = tmp_path_factory.mktemp("trio")
    for i, state in enumerate(trio_states()):
        cases.save(root / ("base" if i == 0 else f"tuned{i}"), state)
    return root


def trio_states() -> list[dict[str, torch.Tensor]]:
    names = ("model.embed_tokens.weight", "model.layers.0.mlp.weight", "model.layers.1.mlp.weight", "model.norm.weight")
    base, *tuned = cases.state_dicts()
    small = {name: base[name][:100] for name in names}
    return [small, *({name: t[name][:100].clone() for name in names} for t in tuned)]


@pytest.mark.parametrize("method", BY_TENSOR)
def test_lines_after_a_method_that_sees_each_tensor_by_itself(trio: Path, tmp_path: Path, method: str) -> None:
    params, reads = BY_TENSOR[method]
    then = {"lines": {"beta": 0.4}}
    path = cases.recipe(trio, method, name=f"{method}.yml", parameters=params, then=[then])
    base, *tuned = trio_states()
    words = {"weights" if name == "weight" else name: value for name, value in params.items()}
    expected = mk.merge_state_dicts(tuned, method, base=base, then=[then], **words)
    for i, options in enumerate(BUDGETS):
        plan = cases.plan_of(path, tmp_path / f"out{i}", **options)
        dry = plan.to_dict()
        assert (dry["scope"], dry["passes"]["reads"]) == ("model", reads)
        report = cases.run_of(path, tmp_path / f"out{i}", **options)
        assert report.peak_tensor_memory <= min(plan.budget.limit, dry["peak_memory"])
        if method in ("ties", "breadcrumbs"):  # a sample before, a second sweep where candidates do not fit
            assert report.bytes_read >= plan.bytes_read
        else:
            assert report.bytes_read == plan.bytes_read
        for name, tensor in read(tmp_path / f"out{i}").items():
            assert torch.equal(tensor, expected[name]), name
    if method in ("ties", "model_stock"):
        assert mk.verify(tmp_path / "out0", recompute=1).ok


def test_parameters_may_change_with_the_tensor_before_lines(trio: Path, tmp_path: Path) -> None:
    density = [{"filter": "mlp", "value": 0.4}, {"filter": "norm", "value": 1.0}, {"value": 0.2}]
    options: dict[str, Any] = {"parameters": {"weight": 1.0, "density": density}}
    path = cases.recipe(trio, "ties", name="varied.yml", then=[{"lines": {"beta": 0.0}}], **options)
    plain = cases.recipe(trio, "ties", name="varied-plain.yml", **options | {"dtype": "float32"})
    cases.run_of(path, tmp_path / "out")
    cases.run_of(plain, tmp_path / "plain")
    base, *tuned = trio_states()
    merged = read(tmp_path / "plain")
    delta = {name: (merged[name] - base[name]).double() for name in base}
    summed = sum(sum(m[name].double() - base[name].double() for m in tuned).abs().sum() for name in base)
    alpha = summed / sum(d.abs().sum() for d in delta.values()) / 3
    for name, tensor in read(tmp_path / "out").items():
        want = (base[name].double() + alpha * delta[name]).bfloat16()
        assert torch.allclose(tensor.float(), want.float(), rtol=2**-7, atol=1e-7), name


@pytest.mark.parametrize("method", ["ties", "task_arithmetic"])
def test_lines_measures_no_slices_of_unlike_numbers_of_models(here: Path, method: str) -> None:
    """Alpha has one number of models in it, and no tensor's is that of the model."""
    models = [{"model": f"m{i}", "parameters": {"weight": 1.0}} for i in (1, 2, 3)]
    slices = [
        {"sources": [{**m, "layer_range": layers} for m in ({"model": "base"}, *models[:count])]}
        for layers, count in (([0, 1], 3), ([1, 3], 2))
    ]
    data = {"merge_method": method, "base_model": "base", "slices": slices}
    path = here / "recipe.yml"
    path.write_text(json.dumps({**data, "then": [{"lines": {"beta": 0.4}}]}))
    with pytest.raises(MergeError, match=r"asked for alike by all tensors.*another number of models"):
        cases.plan_of(path, here / "out")
    path.write_text(json.dumps({**data, "then": [{"lines": {"alpha": 0.2}}]}))
    assert cases.plan_of(path, here / "out").survey.reads >= 1


def test_nan_is_named_before_lines_measures(trio: Path, tmp_path: Path) -> None:
    for method in ("ties", "model_stock"):
        params = BY_TENSOR[method][0]
        for i, state in enumerate(trio_states()):
            if i == 2:
                state["model.layers.0.mlp.weight"][3, 5] = torch.nan
            cases.save(tmp_path / method / ("base" if i == 0 else f"tuned{i}"), state)
        path = cases.recipe(tmp_path / method, method, parameters=params, then=[{"lines": {"beta": 0.4}}])
        with pytest.raises(MergeError, match=r"'model.layers.0.mlp.weight'.*NaN or Inf, the first at flat index 776"):
            cases.run_of(path, tmp_path / method / "out")


class Pair(TaskArithmetic):
    """The base and the models as inputs."""

    info = MethodInfo(
        name="pair", purpose="", formula="", params=(Param("t", "float", "place"),), base="first", passes="", source=""
    )

    def apply(self, spec: Spec, coeffs: Coeffs) -> Program:
        t = spec.params["t"]
        assert not spec.has_base
        return Program((1 - t, *((t,) * (spec.num_models - 1))), (None,) * spec.num_models, base=False)


@pytest.mark.parametrize(
    "models",
    [
        "models: [{model: m1}, {model: m2}]",
        "models: [{model: m1}, {model: base}, {model: m2}]",
        "slices: [{sources: [{model: m1, layer_range: [0, 3]}, {model: m2, layer_range: [0, 3]}, "
        "{model: base, layer_range: [0, 3]}]}]",
    ],
)
def test_a_base_that_is_the_first_input(here: Path, monkeypatch: pytest.MonkeyPatch, models: str) -> None:
    monkeypatch.setitem(_methods._METHODS, "pair", Pair())
    merge = resolve(load_recipe(f"merge_method: pair\nbase_model: base\n{models}\nparameters: {{t: 0.5}}\n"))
    labels = {tuple(merge.inputs[s.input].label for s in t.models) for t in merge.tensors}
    assert labels == {("base", "m1", "m2")}
    assert all(t.base is None for t in merge.tensors)
    specs = Specs(merge, method_of(merge))
    assert all(specs.spec(i).num_models == 3 for i in specs.members)
    assert problems_of(f"merge_method: pair\n{models.replace('{model: base},', '')}\nparameters: {{t: 0.5}}\n")[
        0
    ].startswith("line 1: pair needs a base_model")


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("kind", ["models", "slices"])
def test_two_models_of_slerp(here: Path, listed: bool, kind: str) -> None:
    entries = ["m1", "base"] if listed or kind == "slices" else ["m1"]
    if kind == "models":
        text = f"models: [{', '.join(f'{{model: {m}}}' for m in entries)}]\n"
    else:
        text = f"slices: [{{sources: [{', '.join(f'{{model: {m}, layer_range: [0, 3]}}' for m in entries)}]}}]\n"
    t = "parameters: {t: [{filter: self_attn, value: [0, 0.5, 1]}, {value: 0.25}]}\n"
    merge = resolve(load_recipe("merge_method: slerp\nbase_model: base\n" + text + t))
    found = {name: p["t"] for name, p in ((x.name, x.params) for x in merge.tensors)}
    assert found["model.layers.1.self_attn.q_proj.weight"] == 0.5
    assert found["model.layers.1.mlp.gate_proj.weight"] == 0.25
    assert {merge.inputs[x.models[0].input].label for x in merge.tensors} == {"base"}


class Weighted(TaskArithmetic):
    """Importances beside the models."""

    info = MethodInfo(
        name="weighted",
        purpose="",
        formula="",
        params=(),
        base="input",
        passes="",
        source="",
        companions="importance",
    )

    def apply(self, spec: Spec, coeffs: Coeffs) -> Program:
        models = spec.num_models
        return Program((1.0,) * models, (None,) * models, base=False, merge="importance", epsilon=1e-6)


IMPORTANCE = """merge_method: weighted
models:
- model: m1
  parameters: {importance: f1}
- model: m2
  parameters: {importance: f2}
"""


def test_companions_follow_the_models(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_methods._METHODS, "weighted", Weighted())
    for name in ("f1", "f2"):
        save(here / name, dtype="F32", config=None)
    merge = resolve(load_recipe(IMPORTANCE + "dtype: bfloat16\n"))
    for tensor in merge.tensors:
        assert [merge.inputs[s.input].label for s in tensor.models] == ["m1", "m2", "f1", "f2"]
        assert tensor.companions == 2 and tensor.dtype.name == "BF16"
    specs = Specs(merge, method_of(merge))
    assert specs.spec(0).num_models == 2


def test_companions_that_do_not_fit_are_named(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_methods._METHODS, "weighted", Weighted())
    shapes = llama_shapes()
    del shapes["lm_head.weight"]
    shapes["model.norm.weight"] = (5,)
    save(here / "f1", dtype="F32")
    assert problems_of(IMPORTANCE)[0].startswith("line 6: model 'f2' does not exist")
    missing = IMPORTANCE.replace("  parameters: {importance: f2}\n", "")
    assert problems_of(missing)[0].startswith("line 5: required parameter 'importance' of 'm2' is missing")
    save(here / "f2", shapes, dtype="F32", config=None)
    found = problems_of(IMPORTANCE)
    assert any("1 tensor missing that other inputs have: 'lm_head.weight'" in p and "f2" in p for p in found)
    assert any("importance and model differ in shape" in p and "'f2': [5]" in p for p in found)


def test_importances_out_of_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_methods._METHODS, "weighted", Weighted())
    cases.family(tmp_path, models=2)
    _, *tuned = cases.state_dicts(2)
    importances = []
    for i in range(2):
        state = {n: t.float().abs() + i for n, t in tuned[i].items() if t.is_floating_point()}
        state["model.position_ids"] = tuned[0]["model.position_ids"]
        cases.save(tmp_path / f"f{i}", state)
        importances.append(state)
    data: dict[str, Any] = {
        "merge_method": "weighted",
        "models": [
            {"model": str(tmp_path / f"tuned{i + 1}"), "parameters": {"importance": str(tmp_path / f"f{i}")}}
            for i in range(2)
        ],
    }
    (tmp_path / "w.yml").write_text(json.dumps(data))
    digests = set()
    for i, options in enumerate(({"tile": 4096}, {"threads": 3}, {"memory": 9_000_000})):
        report = cases.run_of(tmp_path / "w.yml", tmp_path / f"o{i}", backend="reference", **options)
        digests.add(report.checkpoint_sha256)
    assert len(digests) == 1
    expected = mk.merge_state_dicts(
        tuned, "weighted", importance=importances, backend="reference", out_dtype=torch.bfloat16
    )
    for name, tensor in read(tmp_path / "o0").items():
        assert torch.equal(tensor, expected[name]), name


def base_of(method: str) -> str:
    return "" if method in ("linear", "karcher", "passthrough") else "base_model: base\n"


MERGEKIT: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    # method: models beside the base, parameters of a model, parameters of all
    "linear": (2, {"weight": 0.5}, {"normalize": False}),
    "slerp": (1, {}, {"t": 0.5}),
    "nuslerp": (2, {"weight": 0.5}, {"nuslerp_flatten": False, "nuslerp_row_wise": True}),
    "passthrough": (1, {"scale": 0.5}, {}),
    "task_arithmetic": (2, {"weight": 0.5}, {"lambda": 0.9, "normalize": True, "int8_mask": True}),
    "ties": (2, {"weight": 0.5, "density": 0.5}, {"lambda": 0.9, "normalize": True, "int8_mask": True}),
    "dare_ties": (2, {"weight": 0.5, "density": 0.5}, {"lambda": 0.9, "normalize": True, "rescale": False}),
    "dare_linear": (2, {"weight": 0.5, "density": 0.5}, {"lambda": 0.9, "rescale": True, "int8_mask": True}),
    "breadcrumbs": (2, {"weight": 0.5, "density": 0.5, "gamma": 0.1}, {"lambda": 0.9, "normalize": True}),
    "breadcrumbs_ties": (2, {"weight": 0.5, "density": 0.5, "gamma": 0.1}, {"lambda": 0.9, "rescale": True}),
    "della": (2, {"weight": 0.5, "density": 0.5, "epsilon": 0.1}, {"lambda": 0.9, "normalize": True}),
    "della_linear": (2, {"weight": 0.5, "density": 0.5, "epsilon": 0.1}, {"lambda": 0.9, "rescale": True}),
    "model_stock": (2, {}, {"filter_wise": True}),
    "nearswap": (1, {}, {"t": 0.01}),
    "arcee_fusion": (1, {}, {}),
    "karcher": (2, {}, {"max_iter": 5, "tol": 0.001}),
    "multislerp": (2, {"weight": 0.5}, {"normalize_weights": False, "eps": 0.001}),
    "sce": (2, {}, {"select_topk": 0.5, "int8_mask": False}),
    "ram": (2, {}, {"epsilon": 0.001}),
    "ramplus_tl": (2, {}, {"epsilon": 0.001, "r": 0.2, "alpha": 0.3}),
}


@pytest.mark.parametrize("method", MERGEKIT)
def test_the_parameters_of_mergekit(here: Path, method: str) -> None:
    models, own, common = MERGEKIT[method]
    data: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": f"m{i + 1}", "parameters": own} for i in range(models)],
        "parameters": common,
    }
    if base_of(method):
        data["base_model"] = "base"
    merge = resolve(load_recipe(data))
    assert merge.warnings == ()
    for tensor in merge.tensors:
        for name, value in common.items():
            assert tensor.params[name] == value or set(tensor.params[name]) == {value}
        for name, value in own.items():
            assert tensor.params[name] == (value,) * models
    varied = [n for n, v in (own | common).items() if isinstance(v, float) and n not in ("tol", "eps")]
    for name in varied:
        spread = [{"filter": "mlp", "value": [0.2, 0.25, 0.3]}, {"value": (own | common)[name]}]
        again = {**data, "parameters": {**common}}
        again["models"] = [{"model": m["model"], "parameters": dict(own)} for m in data["models"]]
        (again["models"][0]["parameters"] if name in own else again["parameters"])[name] = spread
        found = {t.name: t.params[name] for t in resolve(load_recipe(again)).tensors}
        value = found["model.layers.1.mlp.gate_proj.weight"]
        assert (value[0] if isinstance(value, tuple) else value) == 0.25, name
