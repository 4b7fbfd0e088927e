"""Adapters on the small checkpoints of `engine_cases`, written by hand as PEFT does, and what they stand for."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from engine_cases import family

MODULES = ("model.layers.0.mlp", "model.layers.1.mlp")
SHAPES = {"model.layers.0.mlp": (130, 257), "model.layers.1.mlp": (320, 500), "model.embed_tokens": (600, 64)}


def factors(module: str, rank: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """(b, a) in the orientation (out, in)."""
    m, n = SHAPES[module]
    if module.endswith("embed_tokens"):
        m, n = n, m
    generator = torch.Generator().manual_seed(seed * 1000 + len(module))
    b = torch.randn(m, rank, generator=generator) * 0.01
    a = torch.randn(rank, n, generator=generator) * 0.03
    return b.to(dtype), a.to(dtype)


def save_adapter(
    folder: Path,
    *,
    rank: int = 4,
    alpha: float = 8.0,
    seed: int = 0,
    modules: tuple[str, ...] = MODULES,
    dtype: torch.dtype = torch.float32,
    extras: dict[str, torch.Tensor] | None = None,
    **config: object,
) -> Path:
    """A PEFT folder; extras: full tensors by module path (modules_to_save)."""
    folder.mkdir(parents=True)
    tensors = {}
    for module in modules:
        b, a = factors(module, rank, seed, dtype)
        names = ("lora_embedding_A", "lora_embedding_B") if "embed" in module else ("lora_A.weight", "lora_B.weight")
        tensors[f"base_model.model.{module}.{names[0]}"] = a.contiguous()
        tensors[f"base_model.model.{module}.{names[1]}"] = b.contiguous()
    for name, tensor in (extras or {}).items():
        tensors[f"base_model.model.{name}"] = tensor
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    fields: dict[str, object] = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "bias": "none"}
    fields["target_modules"] = sorted({m.rpartition(".")[2] for m in modules})
    fields["base_model_name_or_path"] = "base"
    if extras:
        fields["modules_to_save"] = sorted({n.rpartition(".")[0] for n in extras})
    (folder / "adapter_config.json").write_text(json.dumps(fields | config))
    return folder


def save_family(folder: Path) -> Path:
    """The float32 checkpoints of `engine_cases`, lora1 on two modules, lora2 of another rank on three."""
    family(folder, dtype=torch.float32)
    save_adapter(folder / "lora1", seed=1)
    save_adapter(folder / "lora2", seed=2, rank=7, alpha=3.5, modules=(*MODULES, "model.embed_tokens"))
    return folder


def delta(
    module: str, *, rank: int = 4, alpha: float = 8.0, seed: int = 0, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """alpha / r B A as the weight is stored, float64."""
    b, a = factors(module, rank, seed, dtype)
    product = b.double() @ a.double() * (alpha / rank)
    return product.T if module.endswith("embed_tokens") else product


def exact_product(b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """+0 + b0 a0 + b1 a1 + ... with every operation rounded to the factors' dtype."""
    total = torch.zeros(b.shape[0], a.shape[1], dtype=b.dtype)
    for k in range(b.shape[1]):
        total = total + b[:, k : k + 1] * a[k : k + 1]
    return total
