"""Recipes: what a plan's hash depends on, tied heads, buffers under an additive method, all problems in one go."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine_cases import family
from engine_cases import save as save_tensors
from mergekernels.engine.recipe import load_recipe, resolve
from mergekernels.engine.run import plan, run
from mergekernels.engine.verify import MANIFEST_NAME, verify
from mergekernels.errors import DataError, MergeError, PlanError
from recipe_checkpoints import LLAMA, llama_shapes, save

TIES = "merge_method: ties\nbase_model: base\nparameters: {weight: 0.8, density: 0.3}\nmodels:\n"


def relative(root: Path, text: str = TIES, models: int = 2) -> Path:
    """A recipe in `root` that names the family beside it by relative paths."""
    family(root, models=models)
    entries = "".join(f"- {{model: {'./' * (i % 2)}tuned{i}}}\n" for i in range(1, models + 1))
    (root / "r.yml").write_text(text + entries + "chat_template: plain.jinja\n")
    (root / "plain.jinja").write_text("{{ messages }}\n")
    return root / "r.yml"


def test_the_hash_is_the_same_from_every_folder(tmp_path, monkeypatch):
    root = tmp_path / "rf"
    root.mkdir()
    path = relative(root, TIES.replace("weight: 0.8", "weight: [{filter: nothing, value: 1}, {value: 0.8}]"))
    (tmp_path / "link").symlink_to(root)
    found = []
    for folder, name in ((tmp_path, "rf/r.yml"), (root, "r.yml"), (Path("/"), path), (tmp_path, "link/r.yml")):
        monkeypatch.chdir(folder)
        made = plan(name)
        found.append((made.hash, made.warnings))
    assert found[1:] == found[:-1] and any("selects no tensor" in w for w in found[0][1])
    (root / "tuned1" / "model-00001-of-00002.safetensors").touch()
    assert plan(path).hash != found[0][0], "the inputs' times are a part of their identity"


def test_a_copy_of_the_inputs_elsewhere_is_another_plan(tmp_path, monkeypatch):
    hashes = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        relative(tmp_path / name)
        for file in (tmp_path / name).rglob("*.safetensors"):
            os.utime(file, ns=(1, 1))
        monkeypatch.chdir(tmp_path / name)
        hashes.append(plan("r.yml").hash)
    assert hashes[0] != hashes[1]


def test_done_and_recomputed_from_another_folder(tmp_path, monkeypatch):
    root = tmp_path / "rf"
    root.mkdir()
    relative(root)
    monkeypatch.chdir(tmp_path)
    run("rf/r.yml", "out")
    stated = json.loads((tmp_path / "out" / MANIFEST_NAME).read_text())["inputs"]
    assert [i["label"] for i in stated] == ["./tuned1", "tuned2", "base"]
    assert [i["path"] for i in stated] == [str(root.resolve() / n) for n in ("tuned1", "tuned2", "base")]
    monkeypatch.chdir(root)
    assert run("r.yml", "../out").already_done
    monkeypatch.chdir("/")
    report = verify(tmp_path / "out", recompute=100)
    assert report.ok and len(report.recomputed) == report.tensors


def test_links_to_one_model_stay_two_inputs(tmp_path, monkeypatch):
    relative(tmp_path)
    (tmp_path / "again").symlink_to("tuned1")
    (tmp_path / "l.yml").write_text(
        "merge_method: linear\nmodels:\n"
        "- {model: tuned1, parameters: {weight: 0.25}}\n- {model: again, parameters: {weight: 0.5}}\n"
    )
    monkeypatch.chdir(tmp_path)
    run("l.yml", "out")
    monkeypatch.chdir("/")
    assert verify(tmp_path / "out", recompute=3).ok


def models(root: Path, **configs: dict[str, object]) -> None:
    """Small checkpoints: name -> config; the head is stored where the config has the key "head"."""
    for name, config in configs.items():
        head = bool(config.pop("head", False))
        save(root / name, llama_shapes(head=head), config=LLAMA | config)


LINEAR = "merge_method: linear\nparameters: {weight: 0.5}\nmodels: [{model: a}, {model: b}]\n"


def test_a_head_that_the_config_does_not_tie_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    models(tmp_path, a={"tie_word_embeddings": False}, b={"tie_word_embeddings": False, "head": True})
    with pytest.raises(PlanError) as caught:
        resolve(load_recipe(LINEAR))
    (problem,) = caught.value.problems
    assert (problem.code, problem.file, problem.exit_code) == ("input.missing-tensor", "a", 3)
    assert "'lm_head.weight'" in str(problem)


@pytest.mark.parametrize("config", [{}, {"tie_word_embeddings": True}])
def test_an_embedding_that_stands_for_a_head_is_said(tmp_path, monkeypatch, config):
    monkeypatch.chdir(tmp_path)
    models(tmp_path, a=config, b={"head": True})
    merge = resolve(load_recipe(LINEAR))
    assert merge.warnings == ("a: 'model.embed_tokens.weight' stands for 'lm_head.weight'",)
    models(tmp_path, b=config)
    assert resolve(load_recipe(LINEAR)).warnings == ()


@pytest.mark.parametrize("listed", [True, False])
def test_the_base_decides_integer_buffers_of_linear(tmp_path, monkeypatch, listed):
    for i, name in enumerate(("base", "tuned1", "tuned2")):
        save_tensors(tmp_path / name, {"w": torch.ones(3) * i, "steps": torch.arange(5) + i})
    text = "merge_method: linear\nparameters: {weight: 0.5, normalize: false}\nmodels:\n- {model: tuned1}\n"
    text += "- {model: base}\n" * listed + "- {model: tuned2}\n"
    (tmp_path / "r.yml").write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="Name a base_model"):
        run("r.yml", "out", overwrite=True)
    (tmp_path / "r.yml").write_text(text + "base_model: base\n")
    report = run("r.yml", "out", overwrite=True)
    assert any("the base's are taken" in w for w in report.warnings)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found["steps"].equal(torch.arange(5))
    assert found["w"].equal(torch.full((3,), 1.5)), "the base is an input of linear as before"
    assert verify(tmp_path / "out", recompute=2).ok


def problems_of(text: str) -> list[MergeError]:
    """What `run` and `plan` list for a recipe."""
    with pytest.raises(MergeError) as caught:
        resolve(load_recipe(text, collect=True))
    return caught.value.problems if isinstance(caught.value, PlanError) else [caught.value]


def codes_of(text: str) -> list[str]:
    return sorted(p.code for p in problems_of(text))


def test_problems_of_all_kinds_come_in_one_go(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    models(tmp_path, a={})
    text = (
        "merge_method: TIES\nbase_model: nowhere\nmodels: [{model: a, wieght: 1}, {model: gone}, {}]\n"
        "dtype: int8\nseed: -1\nsede: 1\ndialect: 5\nchat_template: nothing\ntokenizer_source: union\n"
    )
    found = problems_of(text)
    assert sorted(p.code for p in found) == sorted(
        ["recipe.unknown-key"] * 2
        + ["recipe.missing-key"]
        + ["recipe.value"] * 4  # dtype, seed, dialect, chat_template
        + ["recipe.method", "recipe.planned", "model.missing", "model.missing"]
    )
    (method,) = [p for p in found if p.code == "recipe.method"]
    assert method.hint == "Did you mean 'ties'?"


def test_parameters_and_tensors_that_are_wrong_come_in_one_go(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "base"):
        save(tmp_path / name, llama_shapes(vocabulary=9 if name == "b" else 8))
    text = (
        "merge_method: ties\nbase_model: base\nsede: 1\ndialect: none\nmodels:\n"
        "- {model: a, parameters: {weight: [x, 1, y], density: [2, 0.5]}}\n- {model: b, parameters: {wieght: 1}}\n"
        "tokenizer_source: c\n"
    )
    found = problems_of(text)
    assert {p.code for p in found} == {
        "recipe.unknown-key",
        "recipe.value",
        "recipe.parameter",
        "recipe.unknown-parameter",
        "input.mismatch",
    }
    assert sum(p.code == "recipe.parameter" for p in found) == 3
    assert not any("'weight'" in str(p) and "missing" in str(p) for p in found), "it follows from 'wieght'"


def test_a_fault_does_not_bring_others_along(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    models(tmp_path, a={}, b={})
    text = "merge_method: ties\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1, density: 1}\n"
    assert codes_of(text + "base_model: gone\ntokenizer_source: base\n") == ["model.missing"]
    assert codes_of(text + "base_model: 3\ntokenizer_source: base\n") == ["recipe.value"]
    assert codes_of(text) == ["recipe.missing-base"]
    assert codes_of(text + "base_model: a\nseed: x\n") == ["recipe.value"]
    assert codes_of("merge_method: ties\n") == ["recipe.value"]
    assert codes_of("models: [{model: a}]\n") == ["recipe.missing-key"]


def test_a_model_without_layers_is_an_input_that_does_not_fit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "a")
    save(tmp_path / "b", {"model.norm.weight": (4,)})
    (problem,) = problems_of(LINEAR)
    assert (problem.code, problem.exit_code, problem.got) == ("input.layers", 3, "a: 3, b: 0")


@pytest.mark.parametrize(
    "text",
    [
        LINEAR.replace("linear", "L" * 500),
        LINEAR.replace("model: a", "model: " + "a" * 500),
        LINEAR + "k" * 500 + ": 1\n",
        LINEAR + "dialect: " + "d" * 500 + "\n",
        LINEAR + "chat_template: " + "c" * 500 + "\n",
        LINEAR + "tokenizer_source: " + "t" * 500 + "\n",
        LINEAR + "dtype: " + "f" * 500 + "\n",
        LINEAR.replace("weight: 0.5", "weight: " + "w" * 500),
        LINEAR.replace("weight: 0.5", "q" * 500 + ": 0.5, weight: 1"),
    ],
)
def test_long_values_are_cut(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    models(tmp_path, a={}, b={})
    for problem in problems_of(text):
        assert not re.search(r"(\w)\1{80}", str(problem)), str(problem)
