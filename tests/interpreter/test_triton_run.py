"""A whole run by the Triton backend under its interpreter: the checkpoint of the cpu backend, byte for byte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton's interpreter is asked for before start: TRITON_INTERPRET=1", allow_module_level=True)

import torch
from safetensors.torch import save_file

import mergekernels as mk

RECIPE = """\
merge_method: ties
base_model: {root}/base
models:
  - model: {root}/a
    parameters: {{weight: 0.5, density: 0.3}}
  - model: {root}/b
    parameters: {{weight: 0.7, density: 0.4}}
dtype: bfloat16
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    rng = torch.Generator().manual_seed(0)
    shapes = {"model.layers.0.up.weight": (64, 48), "model.layers.1.up.weight": (64, 48), "model.norm.weight": (48,)}
    base = {name: torch.randn(shape, generator=rng) * 0.02 for name, shape in shapes.items()}
    for model in ("base", "a", "b"):
        step = 0.0 if model == "base" else 0.002
        folder = tmp_path / model
        folder.mkdir()
        tensors = {n: (x + step * torch.randn(x.shape, generator=rng)).bfloat16() for n, x in base.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2}
        (folder / "config.json").write_text(json.dumps(config))
    path = tmp_path / "recipe.yml"
    path.write_text(RECIPE.format(root=tmp_path))
    return path


def digest(out: Path) -> str:
    return str(json.loads((out / "merge_manifest.json").read_text())["checkpoint_sha256"])


def test_run_by_the_command_line(recipe: Path) -> None:
    mk.run(recipe, recipe.parent / "cpu", backend="cpu")
    out = recipe.parent / "triton"
    command = [sys.executable, "-m", "mergekernels", "run", str(recipe), str(out), "--backend", "triton", "--quiet"]
    done = subprocess.run([*command, "--device", "cpu"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert digest(out) == digest(recipe.parent / "cpu")
    file = "model.safetensors"
    assert (out / file).read_bytes() == (recipe.parent / "cpu" / file).read_bytes()


def test_merge_in_memory_by_name(recipe: Path) -> None:
    rng = torch.Generator().manual_seed(1)
    base = torch.randn(40, 50, generator=rng).bfloat16()
    models = [(base.float() + 0.1 * torch.randn(40, 50, generator=rng)).bfloat16() for _ in range(3)]
    merged = {
        backend: mk.merge(models, "ties", base=base, weights=[1, 1, 0.5], density=0.2, backend=backend)
        for backend in ("triton", "reference", "cpu")
    }
    for backend in ("triton", "cpu"):
        assert torch.equal(merged[backend].view(torch.int16), merged["reference"].view(torch.int16))
