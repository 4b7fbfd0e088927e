"""Adapters from PEFT folders and mappings: names, scales, sites, laziness."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import torch

from adapter_files import delta, draw, linear_pair, peft_folder
from mergekernels.adapters.model import Adapter, Factors, Site
from mergekernels.errors import InputError, OutputError
from mergekernels.formats.adapters import read_adapter, write_peft

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.11.self_attn.v_proj"
TWO = {**linear_pair(Q, 8, 2, 6, seed=1), **linear_pair(V, 4, 2, 6, seed=2)}


def product(adapter: Adapter, module: str) -> torch.Tensor:
    factors = adapter.modules[module].factors()
    return factors.b.double() @ factors.a.double()


def test_a_plain_folder(tmp_path: Path) -> None:
    adapter = read_adapter(peft_folder(tmp_path / "a", TWO))
    assert list(adapter.modules) == sorted([Q, V])
    assert (adapter.base, adapter.form, adapter.label) == ("org/base", "peft", str(tmp_path / "a"))
    module = adapter.modules[Q]
    assert module.site == Site(Q, "linear", (8, 6))
    assert (module.rank, module.alpha, module.scale, module.dtype) == (2, 6.0, 3.0, "F32")
    torch.testing.assert_close(product(adapter, Q), 3.0 * delta(TWO, Q), rtol=1e-6, atol=1e-6)
    b, a = module.load()
    assert torch.equal(b, TWO[f"base_model.model.{Q}.lora_B.weight"])
    assert torch.equal(a, TWO[f"base_model.model.{Q}.lora_A.weight"])
    assert len(adapter.sha256) == 64


SPELLINGS = {
    "disk": "base_model.model.{}",
    "bare": "{}",
    "dcp": "model_state.model.base_model.model.{}",
    "ddp": "module.base_model.model.{}",
    "fsdp": "_fsdp_wrapped_module.base_model.model._fsdp_wrapped_module.{}",
    "compiled": "_orig_mod.base_model.model.{}",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", ["", "default", "lora_A"])
def test_every_spelling_of_a_name(spelling: str, name: str) -> None:
    a, b, ea, eb = draw(2, 6), draw(8, 2), draw(2, 30), draw(6, 2)
    path, dot = SPELLINGS[spelling], f".{name}" if name else ""
    tensors = {
        f"{path.format(Q)}.lora_A{dot}.weight": a,
        f"{path.format(Q)}.lora_B{dot}.weight": b,
        f"{path.format('model.embed_tokens')}.lora_embedding_A{dot}": ea,
        f"{path.format('model.embed_tokens')}.lora_embedding_B{dot}": eb,
    }
    adapter = read_adapter(tensors, config={"lora_alpha": 2})
    assert list(adapter.modules) == ["model.embed_tokens", Q]
    assert adapter.modules["model.embed_tokens"].site == Site("model.embed_tokens", "embedding", (30, 6))
    assert torch.equal(product(adapter, Q), b.double() @ a.double())
    assert torch.equal(product(adapter, "model.embed_tokens"), eb.double() @ ea.double())


@pytest.mark.parametrize(
    ("fields", "scales"),
    [
        ({}, (3.0, 3.0)),
        ({"use_rslora": True}, (6 / sqrt(2), 6 / sqrt(2))),
        ({"alpha_pattern": {"q_proj": 1}}, (0.5, 3.0)),
        ({"alpha_pattern": {"layers.1.self_attn.v_proj": 1}}, (3.0, 3.0)),
        ({"alpha_pattern": {r"layers\.\d+\.self_attn\..*": 1, "q_proj": 9}}, (0.5, 0.5)),
        ({"alpha_pattern": {"proj": 1, "v_pro": 1, "^layers.0.self_attn.q_proj": 1}}, (3.0, 3.0)),
        ({"alpha_pattern": {"^model.layers.0.self_attn.q_proj": 1, V: 8}}, (0.5, 4.0)),
        ({"r": 9, "rank_pattern": {"q_proj": 2, "v_proj": 2}}, (3.0, 3.0)),
        ({"r": ..., "lora_alpha": 0.5}, (0.25, 0.25)),
    ],
)
def test_scales_follow_the_config(tmp_path: Path, fields: dict[str, Any], scales: tuple[float, float]) -> None:
    adapter = read_adapter(peft_folder(tmp_path / "a", TWO, **fields))
    assert (adapter.modules[Q].scale, adapter.modules[V].scale) == pytest.approx(scales, rel=1e-15)
    torch.testing.assert_close(product(adapter, Q), scales[0] * delta(TWO, Q), rtol=1e-6, atol=1e-6)


def test_nothing_is_loaded_or_open_before_it_is_asked_for(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "a", TWO)
    code = f"""
import os, sys
from mergekernels.formats.adapters import read_adapter, write_peft
adapters = [read_adapter({str(folder)!r}) for _ in range(50)]
assert "torch" not in sys.modules and "numpy" not in sys.modules
assert not any("adapter" in os.readlink(f"/proc/self/fd/{{f}}") for f in os.listdir("/proc/self/fd") if f != "3")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_file_that_changed_is_not_read(tmp_path: Path) -> None:
    adapter = read_adapter(peft_folder(tmp_path / "a", TWO))
    peft_folder(tmp_path / "a", {k: v + 1 for k, v in TWO.items()})
    with pytest.raises(InputError, match="changed after its header was read"):
        adapter.modules[Q].load()


def test_written_and_read_back(tmp_path: Path) -> None:
    sites = {
        Site("model.q", "linear", (8, 6)): 2,
        Site("model.embed", "embedding", (20, 6)): 3,
        Site("model.conv", "conv", (8, 4, 3, 3)): 2,
        Site("model.c_attn", "fan_in_fan_out", (6, 10)): 5,
    }
    modules = {s: Factors(draw(s.shape[0], r, seed=1), draw(r, s.shape[1], seed=2)) for s, r in sites.items()}
    write_peft(
        tmp_path / "out",
        modules,
        base_name="org/base",
        metadata={"method": "cat", "weights": [1, 0.5]},
        extras={"score.weight": lambda: draw(3, 6)},
        config={"task_type": "SEQ_CLS"},
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    adapter = read_adapter(tmp_path / "out")
    assert {m.site: m.rank for m in adapter.modules.values()} == sites
    for site, factors in modules.items():
        assert adapter.modules[site.module].scale == 1.0
        assert torch.equal(adapter.modules[site.module].factors().dense(), factors.dense())
    assert torch.equal(adapter.extras["score.weight"](), draw(3, 6))
    assert (adapter.base, adapter.config["task_type"]) == ("org/base", "SEQ_CLS")
    with pytest.raises(OutputError, match="already there"):
        write_peft(tmp_path / "out", modules)


def test_an_adapter_in_the_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"'org/lora' is neither.*hf download org/lora"):
        read_adapter("org/lora")
    folder, commit = tmp_path / "models--org--lora", "0" * 40
    peft_folder(folder / "snapshots" / commit, TWO)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    adapter = read_adapter("org/lora")
    assert adapter.label == "org/lora" and list(adapter.modules) == sorted([Q, V])


def test_many_adapters_of_one_base_are_small_until_loaded(tmp_path: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(25):
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            tensors |= linear_pair(f"model.layers.{layer}.self_attn.{part}", 64, 16, 64)
    folder = peft_folder(tmp_path / "a", tensors, r=16)
    read_adapter(folder)
    tracemalloc.start()
    try:
        adapters = [read_adapter(folder) for _ in range(20)]
        size, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # 100 modules: half a kilobyte each, where the factors have 8 KB.
    assert all(len(a.modules) == 100 for a in adapters) and size / 20 < 80_000
