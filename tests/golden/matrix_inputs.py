"""The kit's inputs for methods over matrices: full models with prescribed spectra, and adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

__all__ = ["ADAPTERS", "MATRICES", "MATRIX_MODELS", "SITES", "adapters", "make_matrix_inputs", "matrices", "scale_of"]

MATRICES = {"layers.0.square": (48, 48), "layers.0.wide": (40, 64), "layers.1.tall": (72, 36), "layers.1.bias": (24,)}
MATRIX_MODELS = ("mbase", "m1", "m2", "m3")
SITES = {"layers.0.q_proj": (48, 40), "layers.0.down": (30, 64), "layers.1.q_proj": (48, 40), "embed": (24, 50)}
"""Module -> (out, in); `embed` is an embedding of 50 words."""

_TARGETS = {"peft_type": "LORA", "target_modules": sorted(SITES), "bias": "none", "fan_in_fan_out": False}
ADAPTERS: dict[str, dict[str, Any]] = {
    "l1": {**_TARGETS, "r": 4, "lora_alpha": 6},
    "l2": {**_TARGETS, "r": 4, "lora_alpha": 8},
    "l3": {**_TARGETS, "r": 4, "lora_alpha": 1},
    "x1": {**_TARGETS, "r": 3, "lora_alpha": 4},
    "x2": {**_TARGETS, "r": 6, "lora_alpha": 6, "use_rslora": True},
    "x3": {
        **_TARGETS,
        "r": 5,
        "lora_alpha": 10,
        "rank_pattern": {"down": 7},
        "alpha_pattern": {"embed": 2},
    },
}


def rank_of(adapter: str, module: str) -> int:
    """The rank of an adapter in a module."""
    config = ADAPTERS[adapter]
    found = [r for name, r in config.get("rank_pattern", {}).items() if module.endswith(name)]
    return int(found[0] if found else config["r"])


def scale_of(adapter: str, module: str) -> float:
    """alpha / r, or alpha / sqrt(r) for rsLoRA."""
    config = ADAPTERS[adapter]
    found = [a for name, a in config.get("alpha_pattern", {}).items() if module.endswith(name)]
    rank = rank_of(adapter, module)
    alpha = found[0] if found else config["lora_alpha"]
    return float(alpha / (rank**0.5 if config.get("use_rslora") else rank))


def _keys(module: str) -> tuple[str, str]:
    """Names of (A, B) as PEFT stores them."""
    stem = f"base_model.model.{module}.lora_"
    return (f"{stem}embedding_A", f"{stem}embedding_B") if module == "embed" else (f"{stem}A.weight", f"{stem}B.weight")


def make_matrix_inputs(folder: Path) -> None:
    """Both files."""
    _models(folder)
    draw = torch.Generator().manual_seed(20260103)
    tensors = {}
    for adapter in ADAPTERS:
        for module, (out, inner) in SITES.items():
            rank = rank_of(adapter, module)
            sizes = 0.85 ** torch.arange(rank)
            a, b = _keys(module)
            tensors[f"{adapter}/{a}"] = 0.1 * torch.randn(rank, inner, generator=draw)
            tensors[f"{adapter}/{b}"] = 0.1 * torch.randn(out, rank, generator=draw) * sizes
    save_file(tensors, folder / "inputs" / "adapters.safetensors")


def _models(folder: Path) -> None:
    """A base and three models of it. Every task vector has full rank and simple singular values, with a step behind the
    first third of them, whose directions differ between the models; their sum has a step where Iso-CTS with 0.8 cuts
    it. Otherwise results would depend on the library that decomposes."""
    draw = torch.Generator().manual_seed(20260102)
    tensors = {}
    for name, shape in MATRICES.items():
        base = 0.001 * torch.randn(shape, generator=draw)
        tensors[f"mbase/{name}"] = base
        if len(shape) == 1:
            for model in MATRIX_MODELS[1:]:
                tensors[f"{model}/{name}"] = base + 0.01 * torch.randn(shape, generator=draw)
            continue
        m, n = shape
        q = min(shape)
        k, common = q // 3, q - 3 * round((q - int(q * 0.8)) / 3)
        left, right = _orthonormal(m, q, draw), _orthonormal(n, q, draw)
        for t, model in enumerate(MATRIX_MODELS[1:]):
            strong = common // 3 + (t < common % 3)
            steps = ((3.0, 1.5, strong), (0.6, 0.45, k - strong), (0.04, 0.02, q - k))
            sizes = torch.cat([torch.linspace(*step, dtype=torch.float64) for step in steps])
            u, v = (_near(x[:, t * k : (t + 1) * k], q, draw) for x in (left, right))
            tensors[f"{model}/{name}"] = base + (0.01 * (u * sizes) @ v.T).float()
    save_file({k: x.contiguous() for k, x in tensors.items()}, folder / "inputs" / "matrices.safetensors")


def _orthonormal(d: int, c: int, draw: torch.Generator) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(d, c, generator=draw, dtype=torch.float64))[0]


def _near(x: torch.Tensor, q: int, draw: torch.Generator) -> torch.Tensor:
    """q orthonormal columns of which the first are near those of x."""
    d, k = x.shape
    first = x + 0.03 * torch.randn(d, k, generator=draw, dtype=torch.float64)
    rest = torch.randn(d, q - k, generator=draw, dtype=torch.float64)
    return torch.linalg.qr(torch.cat([first, rest], 1))[0]


def matrices(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, dict[str, torch.Tensor]]:
    """Model -> tensor name -> values."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in load_file(folder / "inputs" / "matrices.safetensors").items():
        model, name = key.split("/")
        found.setdefault(model, {})[name] = value.to(dtype)
    return found


def adapters(folder: Path) -> dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Adapter -> module -> (B, A) as stored, float32, in the orientation (out, in)."""
    stored = load_file(folder / "inputs" / "adapters.safetensors")
    return {
        adapter: {
            module: (stored[f"{adapter}/{_keys(module)[1]}"], stored[f"{adapter}/{_keys(module)[0]}"])
            for module in SITES
        }
        for adapter in ADAPTERS
    }
