"""The inputs of the golden digests: made by the package's own counter-based generator, so that they never change."""

from __future__ import annotations

import hashlib
from array import array
from functools import cache
from typing import Any

import torch

from mergekernels import _cpu

SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (37, 96),
    "model.layers.0.mlp.up_proj.weight": (300, 450),
    "model.layers.0.input_layernorm.weight": (96,),
    "model.layers.1.conv.weight": (6, 8, 3, 3),
    "model.layers.1.self_attn.q_proj.weight": (64, 130),
    "model.norm.bias": (1,),
    "model.scalar": (),
    "model.empty": (0, 4),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


def noise(n: int, tensor: int, stream: int) -> torch.Tensor:
    """About normal, float64: sums of four uniforms, the same everywhere."""
    words = array("Q", _cpu.philox(2026, tensor, stream, 0, 4 * n))
    uniform = torch.frombuffer(words, dtype=torch.int64).double() / 2**32 if n else torch.zeros(0, dtype=torch.float64)
    return (uniform.view(-1, 4).sum(1) - 2.0) * 1.7320508


@cache
def family(dtype: str) -> dict[str, dict[str, torch.Tensor]]:
    """ "base", "a" to "d", and "importance_a" to "importance_d": tensor name -> values. Deltas tie often in 16 bits."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for number, (name, shape) in enumerate(SHAPES.items()):
        n = int(torch.Size(shape).numel())
        base = 0.02 * noise(n, number, 0)
        shared = noise(n, number, 1)
        found.setdefault("base", {})[name] = base.to(DTYPES[dtype]).view(shape)
        for t, model in enumerate("abcd"):
            own, size = noise(n, number, 2 + t), 1 + noise(n, number, 10 + t).abs()
            delta = 0.001 * (0.6 * shared + 0.8 * own) * size
            unchanged = model == "b" and name.endswith("layernorm.weight")
            found.setdefault(model, {})[name] = (base if unchanged else base + delta).to(DTYPES[dtype]).view(shape)
            weight = noise(n, number, 20 + t) ** 2
            found.setdefault(f"importance_{model}", {})[name] = weight.to(DTYPES[dtype]).view(shape)
    return found


def digest(result: dict[str, Any]) -> str:
    """SHA-256 over name, dtype, shape and bytes of each tensor in order of name; shards must be joined before."""
    total = hashlib.sha256()
    for name in sorted(result):
        x = result[name].contiguous()
        total.update(f"{name} {x.dtype} {tuple(x.shape)}\n".encode())
        total.update(x.view(-1).view(torch.uint8).numpy().tobytes() if x.numel() else b"")
    return total.hexdigest()
