"""Small checkpoints without torch, for the tests of recipes and formats: zeros, or one value per tensor."""

from __future__ import annotations

import json
import struct
from pathlib import Path

from mergekernels.formats.safetensors import build_header, layout
from mergekernels.tensors import dtype_of

LLAMA = {"hidden_size": 4, "num_hidden_layers": 3, "vocab_size": 8, "torch_dtype": "bfloat16"}


def llama_shapes(layers=3, vocabulary=8, head=True):
    """Names and shapes of a small Llama-like model."""
    shapes = {"model.embed_tokens.weight": (vocabulary, 4), "model.norm.weight": (4,)}
    if head:
        shapes["lm_head.weight"] = (vocabulary, 4)
    for i in range(layers):
        shapes[f"model.layers.{i}.self_attn.q_proj.weight"] = (4, 4)
        shapes[f"model.layers.{i}.mlp.gate_proj.weight"] = (6, 4)
        shapes[f"model.layers.{i}.input_layernorm.weight"] = (4,)
    return shapes


def safetensors_bytes(tensors, dtype="BF16"):
    """A file of {name: shape or (dtype, shape)}, all zeros."""
    typed = {n: s if s and isinstance(s[0], str) else (dtype, s) for n, s in tensors.items()}
    entries = layout((n, dtype_of(t), tuple(s)) for n, (t, s) in typed.items())
    return build_header(entries, {"format": "pt"}) + bytes(max((e.end for e in entries.values()), default=0))


def save(folder: Path, tensors=None, *, dtype="BF16", config=LLAMA, shards=1):
    """Writes a checkpoint folder and returns it."""
    tensors = llama_shapes() if tensors is None else tensors
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors, dtype))
        return folder
    weight_map, total = {}, 0
    names = list(tensors)
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {n: tensors[n] for n in names[i::shards]}
        raw = safetensors_bytes(part, dtype)
        (folder / file).write_bytes(raw)
        total += len(raw) - 8 - struct.unpack("<Q", raw[:8])[0]
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
