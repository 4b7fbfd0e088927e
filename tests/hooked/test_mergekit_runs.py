"""mergekit-yaml from a recipe to a checkpoint: hooked, unhooked, and beside `mergekernels run`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mergekernels
import mergekernels.integrations.mergekit as fast

pytestmark = pytest.mark.peer

OPTIONS = ["--allow-crimes", "--no-copy-tokenizer", "--no-write-model-card", "--quiet", "--random-seed", "7"]
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 160,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
TASK = ("ties", "dare_ties", "dare_linear", "della", "della_linear", "breadcrumbs", "breadcrumbs_ties")
RECIPES = {
    "linear": (False, 3, "weight: [1.0, 0.5]"),
    "slerp": (True, 1, "t: 0.4"),
    "nuslerp": (True, 2, "weight: 0.7"),
    "multislerp": (True, 3, "weight: 0.5"),
    "karcher": (False, 3, ""),
    "sce": (True, 3, "select_topk: 0.3"),
    "ram": (True, 3, "epsilon: 0.0005"),
    "model_stock": (True, 3, ""),
    "nearswap": (True, 1, "t: 0.001"),
    "task_arithmetic": (True, 3, "weight: [0.2, 0.8]"),
    **{name: (True, 3, "weight: 0.6, density: 0.4") for name in TASK},
}


def shapes() -> dict[str, tuple[int, ...]]:
    h, kv, mlp, vocabulary = 64, 32, 96, 160
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, h)}
    for i in range(2):
        p = f"model.layers.{i}."
        found |= {p + f"self_attn.{n}_proj.weight": (kv if n in "kv" else h, h) for n in "qkvo"}
        found |= {p + "mlp.gate_proj.weight": (mlp, h), p + "mlp.up_proj.weight": (mlp, h)}
        found |= {p + "mlp.down_proj.weight": (h, mlp)}
        found |= {p + "input_layernorm.weight": (h,), p + "post_attention_layernorm.weight": (h,)}
    return found | {"model.norm.weight": (h,), "lm_head.weight": (vocabulary, h)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and three fine-tunes, in float32."""
    pytest.importorskip("mergekit.merge_methods", reason="needs mergekit 0.1.5 in this environment")
    root = tmp_path_factory.mktemp("runs")
    generator = torch.Generator().manual_seed(3)
    base = {n: torch.randn(s, generator=generator) * 0.05 for n, s in shapes().items()}
    for i in range(4):
        tensors = {n: t + (torch.randn(t.shape, generator=generator) * 0.002 if i else 0.0) for n, t in base.items()}
        place = root / ("base" if i == 0 else f"tuned{i}")
        place.mkdir()
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
        (place / "config.json").write_text(json.dumps(CONFIG))
    return root


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    fast.reset_stats()
    yield
    fast.disable()


def recipe(root: Path, method: str, dtypes: str = "dtype: float32\nout_dtype: bfloat16") -> Path:
    has_base, count, parameters = RECIPES[method]
    lines = [f"merge_method: {method}", "models:", *(f"  - model: {root / f'tuned{i + 1}'}" for i in range(count))]
    if has_base:
        lines.append(f"base_model: {root / 'base'}")
    path = root / f"{method}.yml"
    path.write_text("\n".join([*lines, f"parameters: {{{parameters}}}", dtypes]) + "\n")
    return path


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def mergekit_yaml(path: Path, out: Path) -> dict[str, torch.Tensor]:
    from mergekit.scripts.run_yaml import main

    shutil.rmtree(out, ignore_errors=True)
    main.main(args=[str(path), str(out), *OPTIONS], standalone_mode=False)
    return loaded(out)


@pytest.mark.parametrize("dtypes", ["dtype: float32\nout_dtype: bfloat16", "dtype: bfloat16"], ids=["wide", "narrow"])
@pytest.mark.parametrize("method", list(RECIPES))
def test_the_same_bits_as_our_own_run(folder: Path, method: str, dtypes: str) -> None:
    """float32 arithmetic with one rounding is what `mergekernels run` does, so the hooked tool has to give its bits.

    Read as bfloat16, magnitudes are often equal; where only some can be kept both choose by the words of seed 0.
    """
    path = recipe(folder, method, dtypes)
    with fast.enabled():
        hooked = mergekit_yaml(path, folder / "hooked")
    assert fast.stats().served == {method: len(shapes())}
    assert not fast.stats().passed_on
    shutil.rmtree(folder / "ours", ignore_errors=True)
    mergekernels.run(path, folder / "ours", seed=7 if method.startswith(("dare", "della")) else 0)
    ours = loaded(folder / "ours")
    assert set(hooked) == set(ours) == set(shapes())
    for name, tensor in ours.items():
        assert tensor.dtype == hooked[name].dtype == torch.bfloat16
        assert torch.equal(tensor, hooked[name]), name


@pytest.mark.parametrize("method", [m for m in RECIPES if not m.startswith(("dare", "della"))])
def test_the_same_result_as_unhooked(folder: Path, method: str) -> None:
    path = recipe(folder, method, "dtype: float32")
    theirs = mergekit_yaml(path, folder / "theirs")
    with fast.enabled():
        hooked = mergekit_yaml(path, folder / "hooked")
    again = mergekit_yaml(path, folder / "theirs")
    for name, tensor in theirs.items():
        assert torch.equal(tensor, again[name])
        off = (tensor - hooked[name]).abs() > 4e-6 * tensor.abs().max()
        # Of magnitudes that are equal at a cut either may be kept: float32 deltas of such weights tie now and then.
        assert int(off.sum()) <= (4 if method.startswith("breadcrumbs") else 0), name


def environment(folder: Path, variable: str) -> dict[str, str]:
    """With our line where a new process finds it, as after an installation."""
    site = folder / "site"
    site.mkdir(exist_ok=True)
    line = (Path(mergekernels.__file__).resolve().parent.parent / "mergekernels_mergekit.pth").read_text()
    ours = os.environ["MERGEKERNELS_SITE"]
    (site / "sitecustomize.py").write_text(f"import site\nsite.addsitedir({ours!r})\n{line}")
    return {**os.environ, "PYTHONPATH": str(site), "MERGEKERNELS_MERGEKIT": variable, "OMP_NUM_THREADS": "1"}


def command(folder: Path, variable: str, path: Path, out: str) -> tuple[dict[str, torch.Tensor], str]:
    tool = Path(sys.executable).parent / "mergekit-yaml"
    run = subprocess.run(
        [str(tool), str(path), str(folder / out), *OPTIONS],
        capture_output=True,
        text=True,
        env=environment(folder, variable),
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    return loaded(folder / out), run.stderr


def test_the_unchanged_command(folder: Path) -> None:
    """MERGEKERNELS_MERGEKIT in the environment of mergekit-yaml as it was installed."""
    path = recipe(folder, "dare_ties")
    with fast.enabled():
        hooked = mergekit_yaml(path, folder / "hooked")
    found, said = command(folder, "report", path, "by_variable")
    assert all(torch.equal(found[name], tensor) for name, tensor in hooked.items())
    assert f"mergekernels: mergekit: {len(hooked)} calls served by mergekernels, 0 by the tool itself" in said


def test_a_recipe_of_slices_with_optional_parameters(folder: Path) -> None:
    """Layers of several models stacked, each with its own method parameters, a gradient and a filter."""
    path = folder / "slices.yml"
    path.write_text(
        f"""merge_method: ties
base_model: {folder / "base"}
dtype: float32
slices:
  - sources:
      - {{model: {folder / "tuned1"}, layer_range: [0, 1], parameters: {{weight: 0.5, density: 0.5}}}}
      - {{model: {folder / "tuned2"}, layer_range: [0, 1], parameters: {{weight: 1.0, density: 0.9}}}}
      - {{model: {folder / "base"}, layer_range: [0, 1]}}
  - sources:
      - model: {folder / "tuned3"}
        layer_range: [0, 2]
        parameters: {{weight: [{{filter: mlp, value: [0.1, 0.9]}}, {{value: 0.4}}], density: 0.25}}
      - {{model: {folder / "base"}, layer_range: [0, 2]}}
"""
    )
    theirs = mergekit_yaml(path, folder / "theirs")
    with fast.enabled():
        hooked = mergekit_yaml(path, folder / "hooked")
    assert set(theirs) == set(hooked)
    assert "model.layers.2.mlp.up_proj.weight" in hooked
    for name, tensor in theirs.items():
        assert float((tensor - hooked[name]).norm() / tensor.norm()) <= 1e-6, name
    assert fast.stats().served == {"ties": len(hooked)}


def test_the_raw_pytorch_command(folder: Path, tmp_path: Path) -> None:
    """mergekit-pytorch merges arbitrary state dicts through the same methods."""
    from mergekit.scripts.merge_raw_pytorch import main

    names: dict[str, Any] = {}
    for name in ("base", "tuned1", "tuned2"):
        names[name] = tmp_path / f"{name}.safetensors"
        save_file(loaded(folder / name), names[name])
    path = tmp_path / "raw.yml"
    path.write_text(
        f"merge_method: ties\nbase_model: {names['base']}\ndtype: float32\nparameters: {{density: 0.5, weight: 1.0}}\n"
        f"models: [{{model: {names['tuned1']}}}, {{model: {names['tuned2']}}}]\n"
    )

    def run(out: Path) -> dict[str, torch.Tensor]:
        main.main(args=[str(path), str(out), "--quiet"], standalone_mode=False)
        return loaded(out)

    theirs = run(tmp_path / "theirs")
    with fast.enabled():
        hooked = run(tmp_path / "hooked")
    assert fast.stats().served == {"ties": len(theirs)}
    assert all(torch.allclose(theirs[n], hooked[n], rtol=1e-6, atol=1e-8) for n in theirs)
