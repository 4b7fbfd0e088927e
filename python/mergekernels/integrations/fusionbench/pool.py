"""FusionBench's pools of models: what is read from them and where a merged state dict goes."""

from __future__ import annotations

import logging
from copy import deepcopy
from typing import Any

__all__ = ["as_pool", "loaded", "names_of_linear_weights"]

_log = logging.getLogger("mergekernels")


def as_pool(modelpool: Any) -> Any:
    """The pool, or a pool of a plain dict of models."""
    from fusion_bench.modelpool import BaseModelPool

    return modelpool if isinstance(modelpool, BaseModelPool) else BaseModelPool(modelpool)


def loaded(model: Any, state_dict: dict[str, Any], strict: bool = True) -> Any:
    """`model` with the merged tensors: a module itself; of a state dict on disk, a new module of its class."""
    from torch import nn

    if isinstance(model, nn.Module):
        model.load_state_dict(state_dict, strict=strict)
        return model
    if getattr(model, "meta_module", None) is None:
        raise TypeError(f"a model of type {type(model).__name__} holds no module")
    module = deepcopy(model.meta_module).to_empty(device=model._device)
    result = module.load_state_dict(state_dict, strict=False)
    if result.unexpected_keys:
        raise ValueError(f"Unexpected keys in the merged state dict: {result.unexpected_keys}")
    if result.missing_keys:
        _log.warning("keys that the merged state dict lacks: %s", result.missing_keys)
    return module


def names_of_linear_weights(module: Any) -> set[str]:
    """The parameters that are weights of linear layers."""
    from torch import nn

    return {f"{name}.weight".lstrip(".") for name, m in module.named_modules() if isinstance(m, nn.Linear)}
