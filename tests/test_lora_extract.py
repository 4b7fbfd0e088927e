"""Adapters taken out of fine-tuned checkpoints: against the best approximation, round trips, what is left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import engine_cases as cases
import lora_folders as adapters
from cli_process import call
from mergekernels.adapters.apply import apply_adapters
from mergekernels.adapters.extract import extract_adapter
from mergekernels.errors import ArgumentError, DataError, MergeError, OutputError, PlanError
from mergekernels.formats.adapters import read_adapter


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, a dense tune, and a tune of rank 4 in one module that leaves the other alone; float32."""
    path = tmp_path_factory.mktemp("extract")
    base, tuned = cases.state_dicts(dtype=torch.float32)[:2]
    cases.save(path / "base", base, files=2)
    cases.save(path / "tuned", tuned)
    name = "model.layers.0.mlp.weight"
    exact = adapters.delta("model.layers.0.mlp", seed=1)
    wide = {n: t.double() if t.is_floating_point() else t for n, t in base.items()}
    cases.save(path / "low", wide | {name: wide[name] + exact})
    return path


def dense(root: Path, name: str) -> torch.Tensor:
    base, tuned = cases.state_dicts(dtype=torch.float32)[:2]
    return (tuned[name] - base[name]).double()


def products(folder: Path) -> dict[str, torch.Tensor]:
    """Weight -> delta as the weight is stored, float64."""
    found = {}
    for module in read_adapter(folder).modules.values():
        f = module.factors()
        found[module.site.weight] = module.site.to_weight(f.b.double() @ f.a.double())
    return found


@pytest.mark.parametrize("spread", ["b", "sqrt"])
def test_best_approximation(root: Path, tmp_path: Path, spread: str) -> None:
    report = extract_adapter(root / "base", root / "tuned", tmp_path / "a", rank=9, spread=spread)  # type: ignore[arg-type]
    found = products(tmp_path / "a")
    weights = ["model.embed_tokens.weight", "model.layers.0.mlp.weight", "model.layers.1.mlp.weight"]
    assert sorted(found) == weights
    for name in weights:
        d = dense(root, name)
        s = torch.linalg.svdvals(d)
        best = float(s[9:].square().sum().sqrt())
        error = float((d - found[name]).norm())
        assert error <= (1 + 1e-4) * best + 1e-6 * float(d.norm()), name
        module = report.modules[name.removesuffix(".weight")]
        assert module.rank == 9
        # An error of up to (1 + 1e-4) of the best one keeps that much less.
        kept = float(s[:9].square().sum() / s.square().sum())
        assert kept - 2.1e-4 * (1 - kept) <= module.kept_energy <= kept + 1e-6
        assert module.error == pytest.approx(best / float(s.norm()), rel=1e-3)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (9, 9, False)
    assert config["base_model_name_or_path"] == str(root / "base")
    assert "differ and are not in the adapter" in report.warnings[0]
    assert "model.norm.weight" in report.left_out
    with safe_open(tmp_path / "a" / "adapter_model.safetensors", "pt") as file:
        told = json.loads(file.metadata()["mergekernels.modules"])
    assert told["model.layers.0.mlp"]["rank"] == 9


def test_a_low_rank_tune_comes_back(root: Path, tmp_path: Path) -> None:
    report = extract_adapter(root / "base", root / "low", tmp_path / "a", energy=1.0)
    assert list(report.modules) == ["model.layers.0.mlp"]
    assert report.modules["model.layers.0.mlp"].rank == 4
    assert set(report.unchanged) == {"model.layers.1.mlp", "model.embed_tokens"}
    exact = adapters.delta("model.layers.0.mlp", seed=1)
    found = products(tmp_path / "a")["model.layers.0.mlp.weight"]
    assert float((found - exact).norm() / exact.norm()) < 1e-6
    apply_adapters(root / "base", [tmp_path / "a"], tmp_path / "again")
    merged = {k: v for f in (tmp_path / "again").glob("*.safetensors") for k, v in load_file(f).items()}
    wanted = load_file(root / "low" / "model.safetensors")
    for name, value in wanted.items():
        if value.is_floating_point():
            assert torch.allclose(merged[name].double(), value, rtol=2e-7, atol=1e-9), name


def test_energy_decides_the_rank_by_module(root: Path, tmp_path: Path) -> None:
    report = extract_adapter(root / "base", root / "tuned", tmp_path / "a", energy=0.5)
    for module, found in report.modules.items():
        s = torch.linalg.svdvals(dense(root, f"{module}.weight")).square()
        share = torch.cumsum(s, 0) / s.sum()
        assert found.rank == int((share < 0.5 * (1 - 1e-9)).sum()) + 1, module
        assert found.kept_energy >= 0.5 * (1 - 1e-6)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert len(config["rank_pattern"]) == 2


def test_patterns_and_saved_modules(root: Path, tmp_path: Path) -> None:
    report = extract_adapter(
        root / "base", root / "tuned", tmp_path / "a", rank=2, include=["*.mlp"], exclude=["*.1.*"], save_rest=True
    )
    assert list(report.modules) == ["model.layers.0.mlp"]
    tuned = cases.state_dicts(dtype=torch.float32)[1]
    read = read_adapter(tmp_path / "a")
    assert "model.norm.weight" in report.saved
    assert "model.embed_tokens.weight" in report.saved
    for name in report.saved:
        assert torch.equal(read.extras[name](), tuned[name]), name
    # Its module holds the adapted one.
    assert report.left_out == ("model.scalar",)


def test_orientation_of_conv1d_and_embeddings(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    base = {
        "h.0.attn.c_attn.weight": torch.randn(24, 40, generator=generator),
        "wte.weight": torch.randn(50, 24, generator=generator),
        "h.0.conv.weight": torch.randn(8, 4, 3, 3, generator=generator),
    }
    tuned = {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in base.items()}
    for name, tensors in (("base", base), ("tuned", tuned)):
        cases.save(tmp_path / name, tensors)
        (tmp_path / name / "config.json").write_text('{"model_type": "gpt2"}')
    extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "a", rank=3)
    read = read_adapter(tmp_path / "a", base=tmp_path / "base")
    assert {m.site.module: m.site.kind for m in read.modules.values()} == {
        "h.0.attn.c_attn": "fan_in_fan_out",
        "wte": "embedding",
        "h.0.conv": "conv",
    }
    for name, product in products(tmp_path / "a").items():
        d = (tuned[name] - base[name]).double()
        assert product.shape == d.shape
        best = torch.linalg.svdvals(d.reshape(d.shape[0], -1))[3:].square().sum().sqrt()
        assert float((d - product).norm()) <= 1.0002 * float(best), name


def test_refused_before_anything_is_read(root: Path, tmp_path: Path) -> None:
    base, tuned, out = root / "base", root / "tuned", tmp_path / "a"
    for arguments, message in (
        ({}, "neither rank nor energy"),
        ({"rank": 0}, "rank is not usable"),
        ({"rank": 2, "device": "meta"}, "device is not usable"),
        ({"rank": 4, "energy": 0.5}, "both given"),
        ({"energy": 1.5}, "energy is not usable"),
        ({"rank": 65}, "below the rank.*at most 64"),
        ({"rank": 4, "spread": "c"}, "spread"),
        ({"rank": 4, "out_dtype": "int8"}, "out_dtype"),
        ({"rank": 4, "memory": "1MB"}, "memory budget"),
    ):
        with pytest.raises(ArgumentError, match=message):
            extract_adapter(base, tuned, out, **arguments)  # type: ignore[arg-type]
    with pytest.raises(MergeError, match="names no module"):
        extract_adapter(base, tuned, out, rank=4, include=["*.q_proj"])
    with pytest.raises(MergeError, match="does not exist"):
        extract_adapter(base, root / "none", out, rank=4)
    with pytest.raises(ArgumentError, match="do not differ"):
        extract_adapter(base, base, out, rank=4)
    assert not out.exists()
    out.mkdir()
    (out / "x").write_text("")
    with pytest.raises(OutputError):
        extract_adapter(base, tuned, out, rank=4)


def test_unlike_checkpoints_are_listed(root: Path, tmp_path: Path) -> None:
    tensors = cases.state_dicts(dtype=torch.float32)[1]
    tensors["model.embed_tokens.weight"] = torch.zeros(601, 64)
    del tensors["model.norm.weight"]
    cases.save(tmp_path / "other", tensors)
    with pytest.raises(PlanError) as caught:
        extract_adapter(root / "base", tmp_path / "other", tmp_path / "a", rank=4)
    assert "1 tensors missing that the other checkpoint has: 'model.norm.weight'" in str(caught.value)
    assert "[601, 64]" in str(caught.value)


def test_nan_is_named(root: Path, tmp_path: Path) -> None:
    tensors = cases.state_dicts(dtype=torch.float32)[1]
    tensors["model.layers.1.mlp.weight"][1, 2] = float("inf")
    cases.save(tmp_path / "bad", tensors)
    with pytest.raises(DataError, match="first at flat index 502") as caught:
        extract_adapter(root / "base", tmp_path / "bad", tmp_path / "a", rank=4)
    assert caught.value.tensor == "model.layers.1.mlp.weight"
    assert not (tmp_path / "a").exists()


def test_the_command(root: Path, tmp_path: Path) -> None:
    done = call("lora", "extract", root / "base", root / "low", "-o", tmp_path / "a", "--rank", "4", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])["result"]
    assert report["modules"]["model.layers.0.mlp"]["rank"] == 4
    text = call("lora", "extract", root / "base", root / "low", "-o", tmp_path / "b", "--energy", "0.9")
    assert "1 module, 2 modules unchanged" in text.stdout
    assert (tmp_path / "b" / "adapter_config.json").exists()
    wrong = call("lora", "extract", root / "base", root / "low", "-o", tmp_path / "c")
    assert wrong.returncode == 2
