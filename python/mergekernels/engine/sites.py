"""Which weights of a checkpoint can have factors, and in which orientation, where no adapter says it."""

from __future__ import annotations

from ..adapters.model import Site
from ..formats.checkpoint import Checkpoint, TensorInfo
from .recipe.names import is_embedding_side

__all__ = ["site_for"]

# transformers.pytorch_utils.Conv1D stores (in, out); a checkpoint says so only by its kind.
_CONV1D = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
_CONV1D_MODULES = {"c_attn", "c_proj", "c_fc", "q_attn"}
_EMBEDDINGS = ("embed", "wte", "wpe")


def site_for(base: Checkpoint, name: str, info: TensorInfo) -> Site | None:
    """The site of a weight that can have factors."""
    if not name.endswith(".weight") or not info.dtype.is_float or not 2 <= len(info.shape) <= 5 or 0 in info.shape:
        return None
    module = name.removesuffix(".weight")
    leaf = module.rpartition(".")[2]
    if len(info.shape) > 2:
        return Site(module, "conv", info.shape)
    if any(part in leaf for part in _EMBEDDINGS) and is_embedding_side(name):
        return Site(module, "embedding", info.shape)
    if base.config.get("model_type") in _CONV1D and leaf in _CONV1D_MODULES:
        return Site(module, "fan_in_fan_out", info.shape)
    return Site(module, "linear", info.shape)
