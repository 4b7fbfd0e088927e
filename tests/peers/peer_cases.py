"""Recipes on which mergekit 0.1.5 and this package must agree, and the random checkpoints that they merge.

{base}, {a}, {b}, {c} stand for bf16 checkpoints, {base32}, {a32}, {b32} for the same kind in float32, {tied}, {tieda}
for one with tied embeddings.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file

LAYERS, HIDDEN, MLP, VOCABULARY, KV = 4, 128, 320, 500, 64
MODELS = ("base", "a", "b", "c", "d", "e", "base32", "a32", "b32", "tied", "tieda")


def shapes(tied: bool = False) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama of 1 M parameters."""
    result: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for i in range(LAYERS):
        p = f"model.layers.{i}."
        result |= {
            p + "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            p + "self_attn.k_proj.weight": (KV, HIDDEN),
            p + "self_attn.v_proj.weight": (KV, HIDDEN),
            p + "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            p + "mlp.gate_proj.weight": (MLP, HIDDEN),
            p + "mlp.up_proj.weight": (MLP, HIDDEN),
            p + "mlp.down_proj.weight": (HIDDEN, MLP),
            p + "input_layernorm.weight": (HIDDEN,),
            p + "post_attention_layernorm.weight": (HIDDEN,),
        }
    result["model.norm.weight"] = (HIDDEN,)
    return result if tied else result | {"lm_head.weight": (VOCABULARY, HIDDEN)}


def make_checkpoint(folder: Path, name: str) -> None:
    """One of MODELS: bases are normal with 0.02, the others add noise of 0.001 * (1 + |N|) to theirs."""
    tied, wide = name.startswith("tied"), name.endswith("32")
    base = "tied" if tied else "base32" if wide else "base"
    dtype = torch.float32 if wide else torch.bfloat16
    draw = torch.Generator().manual_seed(MODELS.index(base))
    tensors = {n: (0.02 * torch.randn(s, generator=draw)).to(dtype) for n, s in shapes(tied).items()}
    if name != base:
        draw.manual_seed(100 + MODELS.index(name))
        for tensor in tensors.values():
            size = torch.randn(tensor.shape, generator=draw).abs() + 1
            tensor.copy_((tensor + 0.001 * torch.randn(tensor.shape, generator=draw) * size).to(dtype))
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HIDDEN // 64,
        "num_key_value_heads": KV // 64,
        "head_dim": 64,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": tied,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    (folder / "config.json").write_text(json.dumps(config))


@dataclass(frozen=True)
class Case:
    """A recipe and what may differ.

    recipe : YAML. dtypes : whether "dtype: float32" and "out_dtype: bfloat16" are appended.
    trimmed : model -> density of that model for a tensor name, for recipes that trim; elements whose magnitude ties
        with such a threshold may differ, because mergekit's unstable sort chooses among equals in its own way.
    ties : weights of a ties recipe without filters and gradients: at every difference both results must be what comes
        out when each tied delta is either kept or dropped.
    linear : weights of a linear recipe without filters and gradients. mergekit multiplies and adds in one rounding
        (addcmul), we in two: both are computed again and must come out bit for bit.
    normalize, scale : of `ties` and `linear`.
    rounding : most elements in a million that may differ for the same reason where `linear` cannot say it.
    """

    recipe: str
    dtypes: bool = True
    trimmed: dict[str, Callable[[str], float]] = field(default_factory=dict)
    base: str = "base"
    ties: dict[str, float] = field(default_factory=dict)
    linear: dict[str, float] = field(default_factory=dict)
    normalize: bool = True
    scale: float = 1.0
    rounding: int = 0

    def text(self, folder: Path) -> str:
        """The recipe with paths."""
        text = self.recipe
        for name in MODELS:
            text = text.replace("{" + name + "}", str(folder / name))
        return text + ("dtype: float32\nout_dtype: bfloat16\n" if self.dtypes else "")


def _layer(name: str) -> float:
    """t of a gradient over all layers: 0 for what is outside them, the head too."""
    parts = name.split(".")
    return int(parts[2]) / (LAYERS - 1) if parts[1] == "layers" else 0.0


def _models(method: str, models: dict[str, str], parameters: str, base: str | None = "base") -> str:
    lines = [f"merge_method: {method}"]
    if base:
        lines.append(f"base_model: '{{{base}}}'")
    lines.append("models:")
    for name, own in models.items():
        lines.append(f"  - model: '{{{name}}}'")
        if own:
            lines.append(f"    parameters: {own}")
    return "\n".join(lines) + f"\nparameters: {parameters}\n"


def _ties(
    densities: dict[str, float],
    weights: dict[str, float],
    *,
    base: str = "base",
    normalize: bool = True,
    scale: float = 1.0,
    rest: str = "",
) -> Case:
    models = {m: f"{{density: {densities[m]}, weight: {weights[m]}}}" for m in densities}
    shared = f"{{normalize: {str(normalize).lower()}, lambda: {scale}{rest}}}"
    trimmed = {m: (lambda _, d=d: d) for m, d in densities.items()}
    recipe = _models("ties", models, shared, base)
    used = {m: weights[m] for m in densities}
    return Case(recipe, trimmed=trimmed, base=base, ties=used, normalize=normalize, scale=scale)


EQUAL = {"a": 1.0, "b": 1.0, "c": 1.0}
UNEQUAL = {"a": 0.7, "b": -0.45, "c": 0.3}


def _linear(weights: dict[str, float], normalize: bool = True, dtypes: str = "float32", listed: bool = False) -> Case:
    models = {name: f"{{weight: {weight}}}" for name, weight in weights.items()}
    recipe = _models("linear", models, f"{{normalize: {str(normalize).lower()}}}", "base" if listed else None)
    if dtypes == "bfloat16":
        recipe += "dtype: bfloat16\n"
    return Case(recipe, dtypes=dtypes == "float32", linear=weights, normalize=normalize)


_LINEAR = {
    "equal": _linear(dict.fromkeys("abc", 1.0)),
    "weights": _linear({"a": 0.7, "b": 0.5}),
    "plain-sum": _linear(dict.fromkeys("abc", 0.3), normalize=False),
    "bf16": _linear({"a": 0.9, "b": 0.4}, dtypes="bfloat16"),
    "no-dtype": _linear({"a": 1.0, "b": 0.4}, dtypes=""),
    "base-listed": _linear({"base": 0.5, "a": 0.3, "b": 0.3}, listed=True),
    "five": _linear(dict.fromkeys("abcde", 0.2)),
    "tied-embeddings": _linear({"tied": 0.5, "tieda": 0.5}),
}

_TASK_ARITHMETIC = {
    "plain": Case(_models("task_arithmetic", {"a": "", "b": "", "c": ""}, "{weight: 0.4}")),
    "lambda": Case(_models("task_arithmetic", {"a": "{weight: 0.6}", "b": "{weight: -0.3}"}, "{lambda: 0.7}")),
    "normalize": Case(
        _models("task_arithmetic", {"a": "{weight: 0.6}", "b": "{weight: 0.9}"}, "{normalize: true, lambda: 1.1}")
    ),
    "weights-cancel": Case(
        _models("task_arithmetic", {"a": "{weight: 0.5}", "b": "{weight: -0.5}"}, "{normalize: true}")
    ),
    "base-listed": Case(
        _models("task_arithmetic", {"a": "{weight: 0.5}", "base": "", "c": "{weight: 1e-1}"}, "{lambda: 0.9}")
    ),
    "five": Case(_models("task_arithmetic", {m: "" for m in "abcde"}, "{weight: 0.3}")),
    "precedence": Case(
        """
merge_method: task_arithmetic
base_model: '{base}'
models:
  - model: '{a}'
    parameters:
      weight:
        - {filter: self_attn, value: [0.1, 0.5, 0.9]}
        - {filter: mlp.down, value: 0.3}
  - model: '{b}'
    parameters: {weight: [0.0, 1.0]}
  - model: '{c}'
parameters:
  weight:
    - {filter: lm_head, value: 0.6}
    - {filter: '*', value: 0.25}
  lambda:
    - {filter: layers.2, value: 0.5}
    - value: [0.8, 0.2]
"""
    ),
}

_TIES = {
    "0.1": _ties(dict.fromkeys(EQUAL, 0.1), EQUAL),
    "0.2-unequal": _ties(dict.fromkeys(EQUAL, 0.2), UNEQUAL),
    "densities": _ties({"a": 0.2, "b": 0.5, "c": 0.8}, UNEQUAL, scale=1.3),
    "0.5-plain-sum": _ties(dict.fromkeys(EQUAL, 0.5), UNEQUAL, normalize=False),
    "0.9-int8-mask": _ties(dict.fromkeys(EQUAL, 0.9), {"a": 0.4, "b": 0.4, "c": 0.4}, rest=", int8_mask: true"),
    "untrimmed": Case(_models("ties", {"a": "", "b": "", "c": ""}, "{weight: 0.5}")),
    "density-0": Case(_models("ties", {"a": "{density: 0}", "b": ""}, "{weight: 0.5}")),
    "tiny": _ties({"a": 1e-9, "b": 0.001}, EQUAL),
    "float32": _ties({"a32": 0.3, "b32": 0.6}, {"a32": 0.8, "b32": 0.5}, base="base32", scale=0.6),
    "five": _ties(dict.fromkeys("abcde", 0.3), dict.fromkeys("abcde", 0.25)),
    "gradients": Case(
        _models("ties", {"a": "{density: [0.2, 0.8]}", "b": "{weight: [1, 0.2], density: 0.5}"}, "{weight: 0.7}"),
        trimmed={"a": lambda name: 0.2 + 0.6 * _layer(name), "b": lambda _: 0.5},
    ),
    "slices": Case(
        """
merge_method: ties
slices:
  - sources:
      - {model: '{base}', layer_range: [0, 3]}
      - {model: '{a}', layer_range: [0, 3], parameters: {weight: 0.6}}
      - {model: '{b}', layer_range: [0, 3]}
  - sources:
      - {model: '{base}', layer_range: [3, 4]}
      - {model: '{a}', layer_range: [3, 4], parameters: {weight: [5, 0.9]}}
      - {model: '{b}', layer_range: [3, 4]}
    parameters: {lambda: 0.5}
base_model: '{base}'
parameters: {density: 0.4, weight: 0.8}
""",
        trimmed={"a": lambda _: 0.4, "b": lambda _: 0.4},
    ),
}

_STACKS = {
    "passthrough": Case(
        """
merge_method: passthrough
slices:
  - sources: [{model: '{a}', layer_range: [0, 3]}]
  - sources: [{model: '{b}', layer_range: [1, 4]}]
""",
    ),
    "passthrough-scale": Case(
        """
merge_method: passthrough
slices:
  - sources:
      - model: '{a}'
        layer_range: [0, 3]
        parameters:
          scale: [{filter: o_proj, value: 0.3}, {filter: down_proj, value: [0, 1]}, {value: 1.0}]
  - sources: [{model: '{a}', layer_range: [2, 4]}]
""",
    ),
    "linear-restacked": Case(
        """
merge_method: linear
slices:
  - sources:
      - {model: '{a}', layer_range: [0, 2], parameters: {weight: [0.2, 0.8]}}
      - {model: '{b}', layer_range: [2, 4], parameters: {weight: [{filter: layers.2, value: 0.9}, {value: 0.1}]}}
  - sources:
      - {model: '{c}', layer_range: [1, 4]}
      - {model: '{b}', layer_range: [0, 3], parameters: {weight: 0.5}}
parameters: {weight: 1}
""",
        rounding=600,
    ),
    "task-arithmetic-two-bases": Case(
        """
merge_method: task_arithmetic
slices:
  - sources:
      - {model: '{base}', layer_range: [0, 2]}
      - {model: '{a}', layer_range: [1, 3]}
    base_model: '{base}'
  - sources:
      - {model: '{c}', layer_range: [2, 4]}
      - {model: '{b}', layer_range: [2, 4], parameters: {weight: [0.1, 0.6]}}
    base_model: '{c}'
parameters: {weight: 0.35}
""",
    ),
}

CASES: dict[str, Case] = {
    f"{family}-{name}": case
    for family, cases in (
        ("linear", _LINEAR),
        ("task-arithmetic", _TASK_ARITHMETIC),
        ("ties", _TIES),
        ("stack", _STACKS),
    )
    for name, case in cases.items()
}
