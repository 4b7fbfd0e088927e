"""Generates the checkpoints of the whole-merge benchmark: a Llama-shaped base and fine-tunes of it.

usage: python checkpoints.py FOLDER [--small | --layers N] [--models 3]

Base: normal, standard deviation 0.02, in bf16. Each fine-tune: base + N * 0.001 * (1 + |N'|) with N, N' standard
normal, rounded to bf16. Full size: 491.8 M parameters, 0.98 GB each, in shards of about 0.5 GB; --small: 5.0 M
parameters, 10 MB. Seeds are fixed per tensor, so that the same files come out again. A folder that is complete is left
alone.
"""

from __future__ import annotations

import argparse
import json
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama-shaped model with untied head; heads of 64 elements."""

    layers: int = 8
    hidden: int = 2048
    intermediate: int = 5632
    vocabulary: int = 32000
    kv_heads: int = 8
    shard_bytes: int = 500_000_000

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor, in the order of the shards."""
        h, kv, mlp = self.hidden, 64 * self.kv_heads, self.intermediate
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, h)}
        for i in range(self.layers):
            p = f"model.layers.{i}."
            shapes |= {
                p + "self_attn.q_proj.weight": (h, h),
                p + "self_attn.k_proj.weight": (kv, h),
                p + "self_attn.v_proj.weight": (kv, h),
                p + "self_attn.o_proj.weight": (h, h),
                p + "mlp.gate_proj.weight": (mlp, h),
                p + "mlp.up_proj.weight": (mlp, h),
                p + "mlp.down_proj.weight": (h, mlp),
                p + "input_layernorm.weight": (h,),
                p + "post_attention_layernorm.weight": (h,),
            }
        return shapes | {"model.norm.weight": (h,), "lm_head.weight": (self.vocabulary, h)}

    def config(self) -> dict[str, object]:
        """config.json, as mergekit and transformers want it."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.hidden // 64,
            "num_key_value_heads": self.kv_heads,
            "head_dim": 64,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }


FULL = Shape()
SMALL = Shape(layers=4, hidden=256, intermediate=704, vocabulary=4000, kv_heads=2, shard_bytes=6_000_000)


def _normal(name: str, model: int, draw: int, shape: tuple[int, ...]) -> torch.Tensor:
    seed = zlib.crc32(f"{name}/{model}/{draw}".encode())
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def values(name: str, model: int, shape: tuple[int, ...]) -> torch.Tensor:
    """One tensor in bf16: of the base for model 0, of a fine-tune for 1, 2, ..."""
    base = (0.02 * _normal(name, 0, 0, shape)).bfloat16()
    if model == 0:
        return base
    noise = _normal(name, model, 1, shape).mul_(_normal(name, model, 2, shape).abs_().add_(1)).mul_(0.001)
    return noise.add_(base).bfloat16()


def generate(folder: Path, shape: Shape, model: int) -> None:
    """Writes one checkpoint: shards, index, config."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    groups: list[list[str]] = [[]]
    size = 0
    sizes = {name: 2 * torch.Size(s).numel() for name, s in shape.tensors().items()}
    for name, nbytes in sizes.items():
        if groups[-1] and size + nbytes > shape.shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += nbytes
    places = {}
    for i, names in enumerate(groups, 1):
        file = f"model-{i:05d}-of-{len(groups):05d}.safetensors"
        shard = {name: values(name, model, shape.tensors()[name]) for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=2) + "\n")
    index.write_text(
        json.dumps({"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}, indent=2) + "\n"
    )


def generate_family(folder: Path, shape: Shape, models: int = 3) -> list[Path]:
    """The base and `models` fine-tunes under `folder`; base first."""
    paths = [folder / ("base" if model == 0 else f"tuned{model}") for model in range(models + 1)]
    for model, path in enumerate(paths):
        generate(path, shape, model)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--layers", type=int, default=FULL.layers)
    parser.add_argument("--models", type=int, default=3)
    args = parser.parse_args()
    for path in generate_family(args.folder, SMALL if args.small else replace(FULL, layers=args.layers), args.models):
        print(path)


if __name__ == "__main__":
    main()
