"""What changes in the donor's config.json: dtype, number of layers, tying."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from ...formats.checkpoint import Checkpoint
from ..resolved import ResolvedTensor
from .mapping import Tying
from .names import config_flag
from .slices import Slice

__all__ = ["output_config"]

_LAYER_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


def output_config(
    donor: Checkpoint,
    inputs: Sequence[Checkpoint],
    slices: Sequence[Slice],
    tensors: Sequence[ResolvedTensor],
    tying: Tying | None,
    *,
    restacked: bool,
    dtype: str | None,
) -> dict[str, Any]:
    """The fields of config.json to set.

    restacked : the recipe has slices. dtype : torch's name of the output dtype, None for that of most of the weights.
    """
    config = donor.config
    changes: dict[str, Any] = {}
    name = dtype or _main_dtype(tensors)
    if name is not None:
        keys = [k for k in ("torch_dtype", "dtype") if k in config] or ["torch_dtype"]
        changes.update(dict.fromkeys(keys, name))
    if restacked and slices:
        _set(changes, config, _layers(config, inputs, slices))
    if tying is not None:
        flag = config_flag(config, "tie_word_embeddings")
        # Without a flag transformers goes by the architecture's default: said only where the merge decides it.
        if (flag is not None and flag is not tying.output) or (flag is None and not tying.output and tying.tied):
            _set(changes, config, {"tie_word_embeddings": tying.output})
    return changes


def _set(changes: dict[str, Any], config: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    """Sets each field where the donor has it: at the top, else in text_config."""
    text = config.get("text_config")
    for key, value in fields.items():
        if key not in config and isinstance(text, Mapping) and key in text:
            changes.setdefault("text_config", dict(text))[key] = value
        else:
            changes[key] = value


def _main_dtype(tensors: Sequence[ResolvedTensor]) -> str | None:
    """The dtype that most merged elements have."""
    counts: dict[str, int] = {}
    for tensor in tensors:
        if tensor.dtype.is_float:
            counts[tensor.dtype.torch] = counts.get(tensor.dtype.torch, 0) + prod(tensor.shape)
    return max(counts, key=lambda k: counts[k]) if counts else None


def _layers(config: Mapping[str, Any], inputs: Sequence[Checkpoint], slices: Sequence[Slice]) -> dict[str, Any]:
    """The number of layers under the donor's key, and its lists with one entry per layer in the new order."""
    text = config.get("text_config")
    flat = {**(text if isinstance(text, Mapping) else {}), **config}
    key = next((k for k in _LAYER_KEYS if k in flat), None)
    count = sum(s.length for s in slices)
    if key is None:
        return {}
    fields: dict[str, Any] = {}
    if flat[key] != count:
        fields[key] = count
    for name, value in flat.items():
        if "layer" in name and isinstance(value, list) and len(value) == flat[key]:
            # A slice's first source says what kind of layer it is.
            order = [
                (config_flag(inputs[s.sources[0].input].config, name), s.sources[0].first + i)
                for s in slices
                for i in range(s.length)
            ]
            if all(isinstance(own, list) and at < len(own) for own, at in order):
                stacked = [own[at] for own, at in order]  # type: ignore[index]
                if stacked != value:
                    fields[name] = stacked
    return fields
