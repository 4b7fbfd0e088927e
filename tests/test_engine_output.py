"""Recipes whose output is an adapter: against float64 truncations, and beside `merge_adapters`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import engine_cases as cases
import lora_folders as adapters
from matrix_methods import Flat, plain_iso, registered
from mergekernels.adapters.merge import merge_adapters
from mergekernels.engine.run import plan, run
from mergekernels.errors import InputError, MergeError, OutputError
from mergekernels.formats.adapters import read_adapter

MLPS = ("model.layers.0.mlp", "model.layers.1.mlp")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapters.save_family(tmp_path_factory.mktemp("family"))


def recipe(root: Path, method: str, models: list[str], **top: object) -> Path:
    path = root / f"o-{abs(hash((method, repr(models), repr(top))))}.yml"
    entries = [{"model": m} for m in models]
    data = {"merge_method": method, "base_model": str(root / "base"), "models": entries, **top}
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not None}))
    return path


def both(root: Path) -> list[str]:
    return [f"{root}/base+{root}/lora1", f"{root}/base+{root}/lora2"]


def deltas() -> dict[str, list[torch.Tensor]]:
    """Module -> task vectors as matrices (out, in), float64."""
    found = {}
    for module in (*MLPS, "model.embed_tokens"):
        one = adapters.delta(module, seed=1)
        two = adapters.delta(module, seed=2, rank=7, alpha=3.5)
        if module.endswith("embed_tokens"):
            one, two = torch.zeros_like(two).T, two.T
        found[module] = [one, two]
    return found


def products(folder: Path) -> dict[str, torch.Tensor]:
    return {name: (f := m.factors()).b.double() @ f.a.double() for name, m in read_adapter(folder).modules.items()}


def best_error(matrix: torch.Tensor, rank: int) -> float:
    return float(torch.linalg.svdvals(matrix)[rank:].square().sum().sqrt())


@pytest.mark.parametrize("rank", [3, 11])
def test_sum_of_adapters(root: Path, tmp_path: Path, rank: int) -> None:
    top = {"parameters": {"weight": 0.5, "lambda": 2.0}, "output": {"kind": "adapter", "rank": rank}}
    report = run(recipe(root, "task_arithmetic", both(root), **top), tmp_path / "out", threads=2, memory="60MB")
    found = products(tmp_path / "out")
    assert set(found) == {*MLPS, "model.embed_tokens"}
    for module, (one, two) in deltas().items():
        total = one + two
        error = float((found[module] - total).norm())
        assert error <= 1.0001 * best_error(total, rank) + 1e-6 * float(total.norm()), module
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(root / "base")
    assert report.peak_tensor_memory <= report.memory
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as file:
        told = json.loads(file.metadata()["mergekernels.modules"])
        assert file.metadata()["mergekernels.plan_hash"] == report.plan_hash
    kept = 1.0 - (best_error(sum(deltas()[MLPS[0]]), rank) / float(sum(deltas()[MLPS[0]]).norm())) ** 2
    assert told[MLPS[0]]["kept_energy"] == pytest.approx(kept, rel=1e-5)
    assert not [p for p in tmp_path.iterdir() if p.name != "out"]


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_dense_rules_are_truncated(root: Path, tmp_path: Path, scope: str) -> None:
    """ties of an adapter and a full model: the merged task vector of the checkpoint, cut."""
    models = [f"{root}/base+{root}/lora1", f"{root}/tuned1"]
    params = {"weight": 0.8, "density": 0.4, "scope": scope, "tie_policy": "index"}
    run(recipe(root, "ties", models, parameters=params, out_dtype="float64"), tmp_path / "full")
    run(
        recipe(root, "ties", models, parameters=params, output={"kind": "adapter", "rank": 20, "spread": "sqrt"}),
        tmp_path / "out",
    )
    full = load_file(tmp_path / "full" / "model.safetensors")
    base = cases.state_dicts(dtype=torch.float32)[0]
    found = products(tmp_path / "out")
    for module in (*MLPS, "model.embed_tokens"):
        total = full[f"{module}.weight"].double() - base[f"{module}.weight"].double()
        total = total.T if module.endswith("embed_tokens") else total
        error = float((found[module] - total).norm())
        # The checkpoint's sum with the base is rounded to float32.
        rounding = 2.0**-24 * float(base[f"{module}.weight"].double().norm())
        assert error <= 1.0002 * best_error(total, 20) + rounding + 1e-6 * float(total.norm()), module
    sides = read_adapter(tmp_path / "out").modules[MLPS[0]].factors()
    assert float(sides.b.norm()) == pytest.approx(float(sides.a.norm()), rel=1e-4)


def test_matrices_keep_their_factors(root: Path, tmp_path: Path) -> None:
    with registered(Flat()):
        top = {"parameters": {"lambda": 0.5}, "output": {"kind": "adapter", "energy": 1.0}}
        run(recipe(root, "test_flat", both(root), **top), tmp_path / "out")
    for module, pair in deltas().items():
        wanted = 0.5 * plain_iso(sum(pair))
        error = float((products(tmp_path / "out")[module] - wanted).norm() / wanted.norm())
        assert error < 2e-6, module


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("core_space", {"inner": "ties"}),
        ("core_space", {"inner": "tsv_m"}),
        ("knots", {"inner": "ties"}),
        ("cat", {}),
        ("tsv_m", {}),
    ],
)
def test_beside_merge_adapters(root: Path, tmp_path: Path, method: str, params: dict[str, object]) -> None:
    paths = [root / "lora1", root / "lora2"]
    wanted = merge_adapters(paths, method, base=root / "base", rank=11, **params)
    run(recipe(root, method, both(root), parameters=params, output={"kind": "adapter", "rank": 11}), tmp_path / "out")
    found = products(tmp_path / "out")
    wanted.save(tmp_path / "wanted")
    other = products(tmp_path / "wanted")
    assert set(found) == set(other)
    for module, product in other.items():
        assert float((found[module] - product).norm()) <= 1e-5 * float(product.norm()), module


def test_same_bytes_again_and_replaced(root: Path, tmp_path: Path) -> None:
    top = {"parameters": {"weight": 1.0}, "output": {"kind": "adapter", "rank": 4}}
    path = recipe(root, "task_arithmetic", both(root), **top)
    first = run(path, tmp_path / "a", threads=1)
    second = run(path, tmp_path / "b", threads=1, memory="40MB")
    assert first.checkpoint_sha256 == second.checkpoint_sha256
    with pytest.raises(OutputError):
        run(path, tmp_path / "a")
    other = recipe(root, "task_arithmetic", both(root), **(top | {"output": {"kind": "adapter", "rank": 5}}))
    third = run(other, tmp_path / "a", overwrite=True, threads=1)
    assert third.checkpoint_sha256 != first.checkpoint_sha256
    assert third.plan_hash != first.plan_hash
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["r"] == 5
    with pytest.raises(MergeError, match="touch an input"):
        run(path, root / "lora1", overwrite=True)
    assert (root / "lora1" / "adapter_model.safetensors").exists()


def test_refused_with_lines(root: Path, tmp_path: Path) -> None:
    def problem(method: str, output: str, models: str = "", base: bool = True) -> str:
        listed = models or f"[{{model: {root}/base+{root}/lora1}}]"
        text = f"merge_method: {method}\nmodels: {listed}\noutput: {output}\nparameters: {{weight: 1}}\n"
        path = tmp_path / "r.yml"
        path.write_text(text + (f"base_model: {root}/base\n" if base else ""))
        with pytest.raises(MergeError) as caught:
            plan(path)
        return str(caught.value)

    assert "r.yml:3: 'output' rank is not usable" in problem("task_arithmetic", "{kind: adapter, rank: 0}").replace(
        "'output': ", "'output' "
    )
    assert "an adapter has a rank or an energy" in problem("task_arithmetic", "{kind: adapter}")
    assert "has no known kind" in problem("task_arithmetic", "{kind: lora, rank: 4}")
    assert "unknown key 'rnak'" in problem("task_arithmetic", "{kind: adapter, rnak: 4}")
    assert "linear makes none" in problem("linear", "{kind: adapter, rank: 4}")
    assert "needs a base_model" in problem("linear", "{kind: adapter, rank: 4}", base=False)
    full = f"[{{model: {root}/base+{root}/lora1}}, {{model: {root}/tuned1}}]"
    assert "every model must be base+adapter" in problem("cat", "{kind: adapter, rank: 4}", full)
    assert "cat merges adapters to an adapter; expected output: {kind: adapter" in problem("cat", "{kind: checkpoint}")
    assert "no merge method 'cta'" in problem("cta", "{kind: checkpoint}")
    assert "looks at the models themselves" in problem("arcee_fusion", "{kind: adapter, rank: 4}").replace(
        "has no parameter 'weight'", "looks at the models themselves"
    )


def test_zero_everywhere(root: Path, tmp_path: Path) -> None:
    top = {"parameters": {"weight": 0.0}, "output": {"kind": "adapter", "rank": 4}}
    with pytest.raises(InputError, match="zero in every module"):
        run(recipe(root, "task_arithmetic", both(root), **top), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_config_has_what_all_adapters_agree_on(root: Path, tmp_path: Path) -> None:
    """task_type and auto_mapping of the inputs; a revision only with its own base."""
    fields = {"task_type": "CAUSAL_LM", "auto_mapping": {"base_model_class": "X"}, "revision": "v1"}
    for seed in (1, 2):
        adapters.save_adapter(tmp_path / f"l{seed}", seed=seed, modules=MLPS[:1], **fields)
    models = [f"{root}/base+{tmp_path}/l{seed}" for seed in (1, 2)]
    top = {"parameters": {"weight": 1.0}, "output": {"kind": "adapter", "rank": 2}}
    run(recipe(root, "task_arithmetic", models, **top), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["task_type"], config["auto_mapping"]) == ("CAUSAL_LM", {"base_model_class": "X"})
    assert config["revision"] is None
    other = adapters.save_adapter(tmp_path / "l3", seed=3, modules=MLPS[:1], task_type="SEQ_CLS")
    run(recipe(root, "task_arithmetic", [*models, f"{root}/base+{other}"], **top), tmp_path / "mixed")
    config = json.loads((tmp_path / "mixed" / "adapter_config.json").read_text())
    assert (config["task_type"], config["auto_mapping"]) == (None, None)


def test_the_base_of_the_hub_cache_has_its_revision(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    commit = "0123456789" * 4
    folder = tmp_path / "cache" / "models--org--name"
    shutil.copytree(root / "base", folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "v1").write_text(commit)
    data = {
        "merge_method": "task_arithmetic",
        "base_model": "org/name@v1",
        "models": [{"model": {"model": "org/name@v1", "lora": str(root / "lora1")}}],
        "parameters": {"weight": 1.0},
        "output": {"kind": "adapter", "rank": 2},
    }
    (tmp_path / "r.yml").write_text(json.dumps(data))
    run(tmp_path / "r.yml", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/name", "v1")


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("tsv_m", {}),
        ("iso_c", {}),
        ("iso_cts", {"common_space_fraction": 0.5}),
        ("star", {}),
        ("low_rank", {"rank": 3}),
        ("knots", {"inner": "ties"}),
        ("core_space", {"inner": "ties"}),
    ],
)
def test_methods_over_matrices_can_be_modified(
    root: Path, tmp_path: Path, method: str, params: dict[str, object]
) -> None:
    """lines: 0.2 in the first block and outside the blocks, 1 in the last."""
    top = {"parameters": params, "output": {"kind": "adapter", "rank": 11}}
    run(recipe(root, method, both(root), **top), tmp_path / "plain")
    run(recipe(root, method, both(root), **top, then=[{"lines": {"alpha": 0.2}}]), tmp_path / "scaled")
    plain, scaled = products(tmp_path / "plain"), products(tmp_path / "scaled")
    assert set(plain) == {*MLPS, "model.embed_tokens"} == set(scaled)
    for module, product in plain.items():
        wanted = product * (1.0 if module == MLPS[1] else 0.2)
        assert float((scaled[module] - wanted).norm()) <= 1e-5 * float(wanted.norm()), module
