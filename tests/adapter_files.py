"""Adapter files written by hand, without the writers under test."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

PLAIN: dict[str, Any] = {
    "peft_type": "LORA",
    "base_model_name_or_path": "org/base",
    "r": 2,
    "lora_alpha": 6,
    "target_modules": ["q_proj", "v_proj"],
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "task_type": "CAUSAL_LM",
    "use_rslora": False,
    "use_dora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers that depend on shape and seed only."""
    generator = torch.Generator().manual_seed(seed * 1009 + sum(n * 31**i for i, n in enumerate(shape)))
    return torch.randn(shape, generator=generator)


def linear_pair(path: str, out: int, rank: int, n: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """The two tensors of a linear module as PEFT writes them."""
    return {
        f"base_model.model.{path}.lora_A.weight": draw(rank, n, seed=2 * seed),
        f"base_model.model.{path}.lora_B.weight": draw(out, rank, seed=2 * seed + 1),
    }


def peft_folder(folder: Path, tensors: Mapping[str, torch.Tensor], **fields: Any) -> Path:
    """A PEFT folder with these tensors; `fields` change the plain config, the value ... takes a field out."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {k: v for k, v in {**PLAIN, **fields}.items() if v is not ...}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def delta(tensors: Mapping[str, torch.Tensor], path: str) -> torch.Tensor:
    """B A of a linear module, unscaled, in float64."""
    b, a = (tensors[f"base_model.model.{path}.lora_{x}.weight"].double() for x in "BA")
    return b @ a
