"""Recipes with methods over matrices: against float64, whatever the budget, resumed, refused in time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import engine_cases as cases
import mergekernels.engine.matrixjob as matrixjob
from matrix_methods import ByNorm, Flat, plain_iso, registered
from mergekernels._methods.matrix_table import matrix_names
from mergekernels.engine.driver import execute
from mergekernels.errors import ArgumentError, DataError, InputError, MergeError, PlanError


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("family")
    cases.family(path, dtype=torch.float32)
    return path


@pytest.fixture
def flat() -> Iterator[Flat]:
    method = Flat()
    with registered(method, ByNorm()):
        yield method


def load(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def recipe(root: Path, method: str = "test_flat", **top: object) -> Path:
    return cases.recipe(root, method, name=f"{method}-{abs(hash(json.dumps(top, sort_keys=True)))}.yml", **top)


def manifest(out: Path) -> dict[str, dict[str, object]]:
    data = json.loads((out / "merge_manifest.json").read_text())
    return {t["name"]: t["statistics"] for t in data["tensors"]}


def expected(weight: float, scale: float) -> dict[str, torch.Tensor]:
    base, *tuned = cases.state_dicts(dtype=torch.float32)
    result = {}
    for name, b in base.items():
        if not b.is_floating_point() or not b.numel():
            result[name] = b
            continue
        deltas = [(t[name] - b).double() * weight for t in tuned]
        if b.ndim > 1:
            total = torch.stack(deltas).sum(0)
            delta = plain_iso(total.reshape(b.shape[0], -1)).reshape(b.shape)
        else:
            delta = torch.stack(deltas).mean(0)
        result[name] = b.double() + scale * delta
    return result


def close(merged: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], base: dict[str, torch.Tensor]) -> None:
    assert set(merged) == set(wanted)
    for name, w in wanted.items():
        if not w.is_floating_point():
            assert torch.equal(merged[name], w)
            continue
        assert merged[name].shape == w.shape
        error = (merged[name].double() - w.double()).norm()
        # The deltas come from float32 and go back into it: an ulp of the weights, not of the deltas.
        bound = 1e-6 * (w.double() - base[name].double()).norm() + 2.0**-24 * w.double().norm()
        assert error <= bound, (name, float(error), float(bound))


@pytest.mark.parametrize("note", ["none", "factors"])
def test_equals_float64(root: Path, tmp_path: Path, flat: Flat, note: str) -> None:
    top = {"dtype": "float32", "parameters": {"weight": 0.5, "lambda": 1.5, "note": note}}
    report = cases.run_of(recipe(root, **top), tmp_path / "out", tile=4096)
    close(load(tmp_path / "out"), expected(0.5, 1.5), cases.state_dicts(dtype=torch.float32)[0])
    assert {name for name, _ in flat.seen} == {n for n, s in cases.SHAPES.items() if len(s) > 1 and 0 not in s}
    found = manifest(tmp_path / "out")
    mlp = found["model.layers.0.mlp.weight"]
    assert (mlp["rank"], mlp["residual"], mlp["route"]) == (130, None, "svd")
    base, *tuned = cases.state_dicts(dtype=torch.float32)
    norms = [float((t["model.layers.0.mlp.weight"] - base["model.layers.0.mlp.weight"]).norm()) for t in tuned]
    assert mlp["norms"] == pytest.approx(norms, rel=1e-5)
    assert found["model.norm.weight"]["route"] == "mean"
    assert report.peak_tensor_memory <= report.memory


def test_gradients_filters_and_modifiers(root: Path, tmp_path: Path, flat: Flat) -> None:
    weights = [{"filter": "norm", "value": 2.0}, {"value": [0.5, 1.0]}]
    top = {
        "dtype": "float32",
        "parameters": {"weight": weights, "lambda": 0.5},
        "then": [{"lines": {"alpha": 0.4, "beta": 0.6}}],
    }
    cases.run_of(recipe(root, **top), tmp_path / "out")
    merged, base = load(tmp_path / "out"), cases.state_dicts(dtype=torch.float32)[0]
    # lines: 0.4 outside the blocks and in the first, 1.0 in the last.
    pairs = {
        "model.layers.0.mlp.weight": (0.5, 0.2),
        "model.layers.1.mlp.weight": (1.0, 0.5),
        "model.layers.1.norm.weight": (2.0, 0.5),
        "model.embed_tokens.weight": (0.5, 0.2),
    }
    for name, (weight, scale) in pairs.items():
        one = expected(weight, scale)
        close({name: merged[name]}, {name: one[name]}, base)


def test_bfloat16_is_rounded_once(root: Path, tmp_path: Path, flat: Flat) -> None:
    top = {"dtype": "float32", "out_dtype": "bfloat16"}
    cases.run_of(recipe(root, **top), tmp_path / "out")
    wide = recipe(root, dtype="float32")
    cases.run_of(wide, tmp_path / "wide")
    merged, exact = load(tmp_path / "out"), load(tmp_path / "wide")
    for name, value in exact.items():
        assert torch.equal(merged[name], value.to(torch.bfloat16) if value.is_floating_point() else value), name


def test_same_bytes_again_and_whatever_the_budget(root: Path, tmp_path: Path, flat: Flat) -> None:
    path = recipe(root)
    first = cases.run_of(path, tmp_path / "a", threads=1)
    second = cases.run_of(path, tmp_path / "b", threads=1, memory="30MB", tile=4096)
    third = cases.run_of(path, tmp_path / "c", threads=1, shard_size=10**9)
    assert first.checkpoint_sha256 == second.checkpoint_sha256 == third.checkpoint_sha256
    assert first.plan_hash == second.plan_hash != third.plan_hash


def test_measured_over_the_model(root: Path, tmp_path: Path, flat: Flat) -> None:
    cases.run_of(recipe(root, "test_norm", dtype="float32"), tmp_path / "out")
    merged = load(tmp_path / "out")
    base, *tuned = cases.state_dicts(dtype=torch.float32)
    names = [n for n, s in cases.SHAPES.items() if len(s) > 1 and 0 not in s]
    tops = [max(float((t[n] - base[n]).double().norm()) for n in names) for t in tuned]
    for name in names:
        delta = sum((t[name] - base[name]).double() / top for t, top in zip(tuned, tops, strict=True))
        close({name: merged[name]}, {name: base[name].double() + delta}, base)


def test_a_small_budget_is_refused_with_what_would_do(root: Path, tmp_path: Path, flat: Flat) -> None:
    with pytest.raises(ArgumentError, match="the largest tensor whole") as caught:
        cases.plan_of(recipe(root), tmp_path / "out", memory="4MB")
    error = caught.value
    assert error.code == "memory.too-small"
    assert error.tensor == "model.layers.1.mlp.weight"
    assert error.expected is not None
    needed = int(error.expected.split("(")[1].split()[0])
    with pytest.raises(ArgumentError):
        cases.plan_of(recipe(root), tmp_path / "out", memory=needed - 1)
    report = cases.run_of(recipe(root), tmp_path / "out", memory=needed)
    assert report.peak_tensor_memory <= needed


def test_the_plan_knows_the_kind_of_device(root: Path, tmp_path: Path, flat: Flat) -> None:
    plan = cases.plan_of(recipe(root), tmp_path / "out")
    data = plan.to_dict()
    assert data["computed"] == {"tier": "T2", "by": "torch-cpu"}
    from mergekernels.engine.identity import plan_hash

    assert plan.hash == plan_hash(plan.merge, plan.files, plan.small, "torch-cpu")
    assert plan.hash != plan_hash(plan.merge, plan.files, plan.small, "torch-cuda")
    plain = cases.plan_of(
        cases.recipe(root, "task_arithmetic", name="ta.yml", parameters={"weight": 1}), tmp_path / "o"
    )
    assert plain.to_dict()["computed"] is None


def test_resumes_after_an_error(root: Path, tmp_path: Path, flat: Flat, monkeypatch: pytest.MonkeyPatch) -> None:
    path = recipe(root, parameters={"note": "loud"})
    cases.run_of(path, tmp_path / "whole", threads=1)
    calls = []
    run = matrixjob.MatrixJob._merge

    def failing(self: matrixjob.MatrixJob) -> None:
        calls.append(self.name)
        if self.name == "model.layers.1.mlp.weight":
            raise MergeError("stopped")
        run(self)

    monkeypatch.setattr(matrixjob.MatrixJob, "_merge", failing)
    with pytest.raises(MergeError, match="stopped"):
        cases.run_of(path, tmp_path / "out", threads=1)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(matrixjob.MatrixJob, "_merge", run)
    report = cases.run_of(path, tmp_path / "out", threads=1)
    assert report.resumed_units > 0
    assert cases.published(tmp_path / "out") == cases.published(tmp_path / "whole")
    assert (
        "tensor 'model.embed_tokens.weight': it was loud"
        in json.loads((tmp_path / "out" / "merge_manifest.json").read_text())["warnings"]
    )


def test_nan_names_tensor_and_input(root: Path, tmp_path: Path, flat: Flat) -> None:
    from safetensors.torch import save_file

    folder = tmp_path / "bad"
    for p in ("base", "tuned1", "tuned2"):
        cases.save(folder / p, cases.state_dicts(dtype=torch.float32)[("base", "tuned1", "tuned2").index(p)])
    for where, label in (("tuned2", "tuned2"), ("base", "base")):
        tensors = load_file(folder / where / "model.safetensors")
        tensors["model.layers.0.mlp.weight"][3, 5] = float("nan")
        save_file(tensors, folder / where / "model.safetensors", {"format": "pt"})
        with pytest.raises(DataError, match="first at flat index 776") as caught:
            cases.run_of(recipe(folder, dtype="float32"), tmp_path / "out", overwrite=True)
        assert label in str(caught.value)
        assert caught.value.tensor == "model.layers.0.mlp.weight"


def test_refused_with_lines(root: Path, tmp_path: Path, flat: Flat) -> None:
    def problems(text: str) -> str:
        path = root / "wrong.yml"
        path.write_text(text)
        with pytest.raises(MergeError) as caught:
            cases.plan_of(path, tmp_path / "out")
        return str(caught.value)

    models = f"models: [{{model: {root}/tuned1}}, {{model: {root}/tuned2}}]\n"
    base = f"base_model: {root}/base\n"
    assert "wrong.yml:1: this version has no merge method 'test_fla'" in problems("merge_method: test_fla\n" + models)
    assert "Did you mean 'test_flat'" in problems("merge_method: test_fla\n" + models)
    assert "test_flat needs a base_model" in problems("merge_method: test_flat\n" + models)
    text = problems("merge_method: test_flat\n" + base + models + "parameters:\n  wieght: 1\n")
    assert "wrong.yml:5: test_flat has no parameter 'wieght'" in text
    assert "bad luck" in problems("merge_method: test_flat\n" + base + models + "parameters: {weight: 13}\n")
    assert "nan must be error" in problems("merge_method: test_flat\nnan: propagate\n" + base + models)
    text = problems("merge_method: test_flat\n" + base + models + "then: [{lines: {beta: 0.5}}]\n")
    assert "which test_flat + lines cannot give" in text


SLOW = ("lore",)
"""Methods of many rounds; the others show that the engine runs whatever is in the table."""


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in matrix_names("models")]
)
def test_published_methods_merge(root: Path, tmp_path: Path, name: str) -> None:
    """Every method of models in the table runs in a recipe with its defaults, twice with the same bytes."""
    path = recipe(root, name, parameters={"rank": 3} if name == "low_rank" else {})
    try:
        plan = cases.plan_of(path, tmp_path / "one")
    except PlanError as error:
        assert "required parameter" in str(error) or "which recipes cannot name" in str(error), error
        return
    execute(plan, overwrite=False, progress=None, io=cases.FaultyIo(-1, 0), start=0.0)
    first = json.loads((tmp_path / "one" / "merge_manifest.json").read_text())
    assert cases.run_of(path, tmp_path / "two").checkpoint_sha256 == first["checkpoint_sha256"]


@pytest.mark.parametrize("method", ["iso_c", "tsv_m"])
def test_equals_the_library_call(root: Path, tmp_path: Path, method: str) -> None:
    import mergekernels as mk

    params = {"exclude": "*embed*, *layers.1*", "lambda": 0.7}
    cases.run_of(recipe(root, method, dtype="float32", parameters=params), tmp_path / "out")
    base, *tuned = cases.state_dicts(dtype=torch.float32)
    floats = [n for n, t in base.items() if t.is_floating_point() and t.numel()]
    wanted = mk.merge_state_dicts(
        [{n: t[n] for n in floats} for t in tuned],
        method,
        base={n: base[n] for n in floats},
        exclude=params["exclude"],
        scale=0.7,
    )
    merged = load(tmp_path / "out")
    close({n: merged[n] for n in floats}, {n: wanted[n] for n in floats}, base)
    routes = {n: s.get("route") for n, s in manifest(tmp_path / "out").items()}
    assert routes["model.embed_tokens.weight"] == routes["model.layers.1.mlp.weight"] == "mean"
    assert routes["model.layers.0.mlp.weight"] != "mean"


def test_verify_reads_digests_and_does_not_recompute(root: Path, tmp_path: Path, flat: Flat) -> None:
    from mergekernels.engine.verify import verify

    cases.run_of(recipe(root), tmp_path / "out")
    assert verify(tmp_path / "out").ok
    with pytest.raises(InputError, match="tier T2"):
        verify(tmp_path / "out", recompute=2)
