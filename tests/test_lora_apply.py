"""Adapters folded into their base: against float64, one rounding, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import engine_cases as cases
import lora_folders as adapters
from cli_process import call
from mergekernels.adapters.apply import apply_adapters
from mergekernels.engine.verify import verify
from mergekernels.errors import ArgumentError, InputError, MergeError


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("apply")
    cases.save(path / "base", cases.state_dicts(dtype=torch.bfloat16)[0], files=2)
    adapters.save_adapter(path / "one", seed=1, dtype=torch.bfloat16)
    adapters.save_adapter(path / "two", seed=2, rank=7, alpha=3.5, modules=(*adapters.MODULES, "model.embed_tokens"))
    return path


def load(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def wanted(weights: tuple[float, float]) -> dict[str, torch.Tensor]:
    result = {}
    for name, value in cases.state_dicts(dtype=torch.bfloat16)[0].items():
        module = name.removesuffix(".weight")
        total = value.double() if value.is_floating_point() else value
        if module in adapters.MODULES:
            total = total + weights[0] * adapters.delta(module, seed=1, dtype=torch.bfloat16)
        if module in (*adapters.MODULES, "model.embed_tokens"):
            total = total + weights[1] * adapters.delta(module, seed=2, rank=7, alpha=3.5)
        result[name] = total
    return result


def test_one_pass_and_one_rounding(root: Path, tmp_path: Path) -> None:
    report = apply_adapters(root / "base", [root / "one", root / "two"], tmp_path / "out", weights=[1.0, -0.5])
    merged = load(tmp_path / "out")
    base = cases.state_dicts(dtype=torch.bfloat16)[0]
    assert set(merged) == set(base)
    for name, exact in wanted((1.0, -0.5)).items():
        assert merged[name].dtype is base[name].dtype
        if not exact.is_floating_point() or not exact.numel():
            assert torch.equal(merged[name], base[name])
            continue
        rounded = exact.to(torch.float32).to(torch.bfloat16)
        # The float32 sum before the rounding may fall on the other side of a tie, which is rare; never two steps away.
        differ = merged[name] != rounded
        assert float(differ.double().mean()) < 1e-3, name
        assert ((merged[name].double() - exact).abs() <= 2.0**-8 * exact.abs() * 1.01 + 1e-12).all(), name
    stored = sum(f.stat().st_size for f in (root / "base").glob("*.safetensors"))
    # The base once; its integer buffer is compared with that of each model.
    assert report.bytes_read <= stored + 2 * base["model.position_ids"].nbytes
    assert verify(tmp_path / "out").ok
    again = apply_adapters(root / "base", [root / "one", root / "two"], tmp_path / "out", weights=[1.0, -0.5])
    assert again.already_done


def test_weights_cancel(root: Path, tmp_path: Path) -> None:
    link = tmp_path / "same"
    link.symlink_to(root / "one")
    apply_adapters(root / "base", [root / "one", link], tmp_path / "out", weights=[0.7, -0.7], memory="50MB")
    merged, base = load(tmp_path / "out"), cases.state_dicts(dtype=torch.bfloat16)[0]
    assert all(torch.equal(merged[n], base[n]) for n in base)


def test_replaced_tensors_keep_the_dtype_of_the_base(root: Path, tmp_path: Path) -> None:
    norm = torch.linspace(-1, 1, 64)
    adapters.save_adapter(tmp_path / "norm", seed=1, extras={"model.norm.weight": norm})
    apply_adapters(root / "base", [tmp_path / "norm"], tmp_path / "out")
    merged = load(tmp_path / "out")
    assert merged["model.norm.weight"].dtype is torch.bfloat16
    assert torch.allclose(merged["model.norm.weight"].float(), norm, rtol=2.0**-8, atol=1e-6)
    adapters.save_adapter(tmp_path / "norm2", seed=2, extras={"model.norm.weight": norm})
    with pytest.raises(InputError, match="two adapters replace") as caught:
        apply_adapters(root / "base", [tmp_path / "norm", tmp_path / "norm2"], tmp_path / "o")
    assert caught.value.tensor == "model.norm.weight"


def test_refused_before_anything_is_written(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="one number, or 2"):
        apply_adapters(root / "base", [root / "one", root / "two"], tmp_path / "o", weights=[1.0])
    with pytest.raises(ArgumentError, match="1 to 64"):
        apply_adapters(root / "base", [], tmp_path / "o")
    with pytest.raises(ArgumentError, match="lora merge cat"):
        apply_adapters(root / "base", [root / "one"] * 65, tmp_path / "o")
    with pytest.raises(MergeError, match="does not exist"):
        apply_adapters(root / "base", [root / "none"], tmp_path / "o")
    with pytest.raises(MergeError, match="does not exist"):
        apply_adapters(root / "nobase", [root / "one"], tmp_path / "o")
    with pytest.raises(MergeError, match="number"):
        apply_adapters(root / "base", [root / "one"], tmp_path / "o", weights="much")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_the_command(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = call("lora", "apply", root / "base", root / "one", root / "two", "-o", out, "--weights", "1,-0.5", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])["result"]
    apply_adapters(root / "base", [root / "one", root / "two"], tmp_path / "other", weights=[1.0, -0.5])
    manifest = json.loads((tmp_path / "other" / "merge_manifest.json").read_text())
    assert report["checkpoint_sha256"] == manifest["checkpoint_sha256"]
    wrong = call("lora", "apply", root / "base", root / "one", "-o", tmp_path / "x", "--weights", "a")
    assert wrong.returncode == 2
    assert "--weights" in wrong.stderr
