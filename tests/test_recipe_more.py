"""Recipes: what a plan's hash depends on, tied heads, buffers under an additive method, all problems in one go."""

from __future__ import annotations

import json
import os
from pathlib import Path

from engine_cases import family
from mergekernels.engine.run import plan, run
from mergekernels.engine.verify import MANIFEST_NAME, verify

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
