"""Which attributes of PEFT are replaced, and the checks that they are the ones known."""

from __future__ import annotations

import importlib
import inspect
from typing import TYPE_CHECKING, Any

from .._hooks import refuse
from ._combine import Combining
from ._convert import Converting
from ._elementwise import FUNCTIONS, elementwise
from ._fold import Folding

if TYPE_CHECKING:
    from .._integration import Integration
    from ._options import Options

__all__ = ["install"]

_SVD = "_svd_generalized_task_arithmetic_weighted_adapter"
_FACTORS = "_generalized_task_arithmetic_weighted_adapter"
_KNOWN = {
    "add_weighted_adapter": "self adapters weights adapter_name combination_type svd_rank svd_clamp "
    "svd_full_matrices svd_driver density majority_sign_method",
    _SVD: "self combination_type adapters weights new_rank target target_lora_A target_lora_B density "
    "majority_sign_method clamp full_matrices driver",
    _FACTORS: "self combination_type adapters weights target density majority_sign_method",
    "_convert_module_to_lora": "module rank adapter_name",
    "merge": "self safe_merge adapter_names",
    "prune": "tensor density method rescale",
    "task_arithmetic": "task_tensors weights",
    "magnitude_prune": "task_tensors weights density",
    "dare_linear": "task_tensors weights density",
    "ties": "task_tensors weights density majority_sign_method",
    "dare_ties": "task_tensors weights density majority_sign_method",
}


def install(state: Integration[Options]) -> None:
    """Replaces the seams of the installed PEFT.

    Raises
    ------
    ToolError : it is missing, older than 0.20, or one of the seams takes other arguments.
    """
    model = _module("peft.tuners.lora.model")
    utils = _module("peft.utils.merge_utils")
    conversion = _module("peft.tuners.lora.conversion")
    layers = _module("peft.tuners.lora.layer")
    lora = model.LoraModel
    seams = [(lora, "add_weighted_adapter"), (lora, _SVD), (lora, _FACTORS), (conversion, "_convert_module_to_lora")]
    folded = [layers.Linear, layers.Embedding, layers._ConvNd]
    seams += [(layer, "merge") for layer in folded]
    seams += [(place, name) for place in (utils, model) for name in FUNCTIONS]
    seams += [(utils, "prune")]
    for owner, name in seams:
        _check(owner, name)
    options = state.options
    assert options is not None
    # Up to 0.20 the type svd multiplies weights with alpha / r, which the deltas have already.
    doubled = "scaling" in _names(inspect.unwrap(getattr(lora, _SVD)).__code__)
    combining = Combining(state, options, doubled)
    state.hooks.replace(lora, "add_weighted_adapter", combining.whole)
    state.hooks.replace(lora, _SVD, combining.svd)
    state.hooks.replace(lora, _FACTORS, combining.factors)
    state.hooks.replace(importlib.import_module("torch.nn").Linear, "reset_parameters", combining.beginning)
    state.hooks.replace(conversion, "_convert_module_to_lora", Converting(state).make)
    for name in FUNCTIONS:
        for place in (utils, model):
            state.hooks.replace(place, name, elementwise(state, options, name))
    state.hooks.replace(utils, "prune", elementwise(state, options, "prune"))
    for layer in folded:
        state.hooks.replace(layer, "merge", Folding(state, options).make)


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        refuse("peft", f"'{name}' cannot be imported ({error})")


def _check(owner: Any, name: str) -> None:
    found = getattr(owner, name, None)
    if found is None:
        refuse("peft", f"{owner.__name__} has no '{name}'")
    names = " ".join(inspect.signature(found).parameters)
    if names != _KNOWN[name]:
        refuse("peft", f"{owner.__name__}.{name} takes other arguments: {names}")


def _names(code: Any) -> set[str]:
    """The names that a function's code uses, in comprehensions and inner functions too."""
    inner = [const for const in code.co_consts if inspect.iscode(const)]
    return set(code.co_names).union(*(_names(part) for part in inner))
