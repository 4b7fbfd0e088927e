"""The engine against the in-memory calls, and the same bytes whatever the threads, memory, tiles, shards and
backend.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import engine_cases as cases
import mergekernels as mk
from mergekernels.engine.digests import checkpoint_sha256
from mergekernels.engine.manifest import manifest_digest

METHODS = {
    "linear": {"parameters": {"weight": [0.5, 1.0]}},
    "task_arithmetic": {"parameters": {"weight": 0.6, "lambda": 0.9}},
    "ties": cases.TIES,
    "ties-index": {"parameters": {"weight": 1.0, "density": 0.1, "tie_policy": "index"}},
    "ties-all": {"parameters": {"weight": -1.0, "density": 0.9, "tie_policy": "all"}},
    "ties-model": {"parameters": {"weight": 0.5, "density": 0.3, "scope": "model"}},
    "ties-paper": {"parameters": {"weight": 1.0, "density": 0.2}, "dialect": "paper"},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("family")
    cases.family(path)
    for name, top in METHODS.items():
        cases.recipe(path, name.split("-")[0], name=f"{name}.yml", **top)
    return path


def load(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as f:
            tensors |= {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    return tensors


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.view(torch.int16) if t.dtype is torch.bfloat16 else t


@pytest.mark.parametrize("name", METHODS)
def test_equals_the_in_memory_call(root: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    cases.run_of(root / f"{name}.yml", out, tile=4096)
    base, *tuned = cases.state_dicts()
    floats = [n for n, t in base.items() if t.is_floating_point()]
    top = METHODS[name]
    params = dict(top["parameters"])
    weight = params.pop("weight")
    options = {"weights": weight, "dialect": top.get("dialect", "default"), "backend": "reference"}
    if "lambda" in params:
        params["scale"] = params.pop("lambda")
    merged = load(out)
    assert set(merged) == set(base)
    assert torch.equal(merged["model.position_ids"], base["model.position_ids"])
    method = name.split("-")[0]
    if isinstance(weight, list):  # a gradient over the layers; tensors outside of them take its first value
        for n in floats:
            w = weight[1] if ".layers.1." in n else weight[0]
            expected = mk.merge([t[n] for t in tuned], method, name=n, **(options | {"weights": w}), **params)
            assert torch.equal(bits(merged[n]), bits(expected)), n
        return
    models = [{n: t[n] for n in floats} for t in tuned]
    keep = {"base": {n: base[n] for n in floats}} if method != "linear" else {}
    expected = mk.merge_state_dicts(models, method, **keep, **options, **params)
    for n in floats:
        assert torch.equal(bits(merged[n]), bits(expected[n])), n


@pytest.mark.parametrize("name", METHODS)
def test_same_bytes_for_threads_memory_tiles_and_backend(root: Path, tmp_path: Path, name: str) -> None:
    path = root / f"{name}.yml"
    reference = tmp_path / "first"
    report = cases.run_of(path, reference)
    expected = cases.published(reference)
    variants = [
        {"threads": 1},
        {"threads": 3, "tile": 4096},
        {"threads": 8, "tile": 8192},
        {"threads": 2, "memory": 900_000 if "linear" in name else 1_500_000},
        {"backend": "reference", "tile": 1 << 20},
    ]
    for i, options in enumerate(variants):
        out = tmp_path / str(i)
        assert cases.run_of(path, out, **options).checkpoint_sha256 == report.checkpoint_sha256, options
        assert cases.published(out) == expected, options
    for shard_size in (1, 50_000, 10**9):
        out = tmp_path / f"shard{shard_size}"
        assert cases.run_of(path, out, shard_size=shard_size).checkpoint_sha256 == report.checkpoint_sha256
        assert (out / "model.safetensors").exists() == (shard_size == 10**9)
    assert cases.beside(tmp_path / "first") == []


def test_published_folder(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = cases.run_of(root / "ties.yml", out)
    manifest = json.loads((out / "merge_manifest.json").read_bytes())
    assert manifest["format"] == "mergekernels.manifest/1"
    assert manifest_digest((out / "merge_manifest.json").read_bytes()) == manifest["manifest_sha256"]
    assert manifest["checkpoint_sha256"] == report.checkpoint_sha256
    names = {f["name"] for f in manifest["files"] + manifest["small_files"]} | {"merge_manifest.json"}
    assert names == set(cases.published(out))
    assert {"README.md", "config.json", "generation_config.json", "tokenizer.json", "merge_recipe.yaml"} <= names
    for small in manifest["small_files"]:
        data = (out / small["name"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (small["size"], small["sha256"])
    merged = load(out)
    records = []
    for t in manifest["tensors"]:
        raw = bits(merged[t["name"]]).numpy().tobytes()
        assert hashlib.sha256(raw).hexdigest() == t["sha256"], t["name"]
        records.append((t["name"], t["dtype"], tuple(t["shape"]), t["sha256"]))
    assert checkpoint_sha256(records) == report.checkpoint_sha256
    index = json.loads((out / "model.safetensors.index.json").read_bytes())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in merged.values())
    assert index["weight_map"] == {t["name"]: t["file"] for t in manifest["tensors"]}
    for file in manifest["files"]:
        part = {n: merged[n] for n in file["tensors"]}
        save_file(part, tmp_path / "again.safetensors", {"format": "pt"})
        assert (tmp_path / "again.safetensors").read_bytes() == (out / file["name"]).read_bytes()
    config = json.loads((out / "config.json").read_bytes())
    assert config["hidden_size"] == 64
    assert "bfloat16" in (config.get("dtype"), config.get("torch_dtype"))


def test_statistics_in_the_manifest(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    cases.run_of(root / "ties.yml", out, tile=4096)
    manifest = json.loads((out / "merge_manifest.json").read_bytes())
    base, *tuned = cases.state_dicts()
    by_name = {t["name"]: t["statistics"] for t in manifest["tensors"]}
    name = "model.layers.1.mlp.weight"
    deltas = [t[name].double() - base[name].double() for t in tuned]
    assert by_name[name]["density"] == pytest.approx([0.3] * 3)
    assert by_name[name]["norms"] == pytest.approx([float(d.norm()) for d in deltas], rel=1e-12)
    assert 0 < by_name[name]["sign_conflicts"] < 0.3
    assert by_name["model.position_ids"] == {}


def test_plan_prints_what_run_does(root: Path, tmp_path: Path) -> None:
    data = cases.plan_of(root / "ties.yml", tmp_path / "out").to_dict()
    json.dumps(data)
    assert data["state"] == "absent"
    assert data["passes"] == {"reads": 2, "sampled": True, "writes": 1}
    assert data["output"]["merged"] == 8
    assert data["output"]["buffers"] == 1
    assert data["time"]["assumed"] is True
    report = cases.run_of(root / "ties.yml", tmp_path / "out")
    assert report.plan_hash == data["plan_hash"]
    again = cases.plan_of(root / "ties.yml", tmp_path / "out").to_dict()
    assert again["state"] == "done"
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
    assert report.peak_tensor_memory <= data["peak_memory"]
    sizes = sum(p.stat().st_size for p in (tmp_path / "out").iterdir())
    assert report.bytes_written == sizes


def test_plan_hash_covers_inputs_seed_and_layout_only(root: Path, tmp_path: Path) -> None:
    def digest(**options: object) -> str:
        return cases.plan_of(root / "ties.yml", tmp_path / "out", **options).hash

    first = digest()
    assert first == digest(threads=7, memory="1GiB", backend="reference", tile=4096)
    assert first != digest(shard_size=7)
    (root / "tuned1" / "tokenizer.json").touch()
    assert first == digest()


def test_threads_from_the_environment(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGEKERNELS_NUM_THREADS", "5")
    assert cases.plan_of(root / "ties.yml", tmp_path / "o", threads=None).budget.threads == 5
    monkeypatch.setenv("MERGEKERNELS_NUM_THREADS", "0")
    with pytest.raises(mk.MergeError, match="MERGEKERNELS_NUM_THREADS from 1 to 1024; got '0'"):
        cases.plan_of(root / "ties.yml", tmp_path / "o", threads=None)


def test_chat_template_replaces_all_others(root: Path, tmp_path: Path) -> None:
    path = cases.recipe(root, "linear", name="chat.yml", parameters={"weight": 1.0}, chat_template="{{ messages }}")
    out = tmp_path / "out"
    cases.run_of(path, out)
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    assert json.loads((out / "tokenizer_config.json").read_text()) == {"unk_token": "<unk>"}
