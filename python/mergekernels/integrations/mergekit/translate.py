"""mergekit's parameters in the words of our methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .._hooks import NotServed

__all__ = ["ARITHMETIC", "FUNCTIONS", "Merge", "arithmetic", "function"]

FUNCTIONS: Mapping[str, tuple[str, ...]] = {
    "linear": ("batch", "weight", "normalize"),
    "slerp": ("batch", "t"),
    "nuslerp": ("group", "weight", "nuslerp_row_wise", "nuslerp_flatten"),
    "multislerp": ("group", "weight", "normalize_weights", "eps"),
    "karcher": ("group", "max_iter", "tol"),
    "sce": ("group", "int8_mask", "select_topk"),
    "ram": ("group", "epsilon"),
    "ramplus_tl": ("group", "r", "alpha", "epsilon"),
    "model_stock": ("group", "filter_wise"),
    "nearswap": ("group", "t"),
    "arcee_fusion": ("group",),
    "passthrough": ("group", "scale"),
}
"""The methods that are functions, and the parameters that we know of each."""

ARITHMETIC: Mapping[tuple[str | None, str | None], str] = {
    (None, None): "task_arithmetic",
    ("sum", None): "ties",  # with a density of 1
    ("sum", "magnitude"): "ties",
    (None, "random"): "dare_linear",
    ("sum", "random"): "dare_ties",
    (None, "magnitude_outliers"): "breadcrumbs",
    ("sum", "magnitude_outliers"): "breadcrumbs_ties",
    (None, "della_magprune"): "della_linear",
    ("sum", "della_magprune"): "della",
}
"""(consensus, sparsification) of generalized task arithmetic -> our method."""

_RANDOM = ("random", "della_magprune")
_WIDENED = ("arcee_fusion", "ramplus_tl")  # a float32 mask or factor makes their 16-bit results float32
_DEFAULTS: Mapping[str, Any] = {"density": 1.0, "gamma": 0.01, "epsilon": 0.15}


@dataclass(frozen=True)
class Merge:
    """A call of :func:`mergekernels.merge`.

    method, arguments : ours. models, base : the tensors. name : of the tensor, None if it has none.
    random : whether a seed matters. widen : whether 16-bit inputs give float32.
    """

    method: str
    arguments: Mapping[str, Any]
    models: Sequence[Any]
    base: Any
    name: str | None
    random: bool = False
    widen: bool = False


def function(method: str, group: Any, parameters: Mapping[str, Any]) -> Merge:
    """A call of one of the group methods among `FUNCTIONS`.

    parameters : among those of `FUNCTIONS`, the required ones present.

    Raises
    ------
    NotServed : there is nothing to compute, or a model has no value.
    """
    known = FUNCTIONS[method][1:]
    entries = list(group.entries)
    base = next((e for e in entries if e.is_base), None)
    arguments = dict(parameters)
    if method in ("karcher", "passthrough"):
        inputs, base = entries, None
    else:
        inputs = [e for e in entries if not e.is_base]
    least = {"passthrough": 1, "nearswap": 1, "arcee_fusion": 1, "sce": 1, "ram": 1, "ramplus_tl": 1}.get(method, 2)
    if len(inputs) < least:
        raise NotServed("one tensor alone: nothing to compute")
    if method == "passthrough":
        scale = _values("scale", parameters.get("scale", {e.id: None for e in inputs}), inputs)
        if scale == [None]:
            raise NotServed("one tensor alone: nothing to compute")
        arguments["scale"] = scale
    elif "weight" in known:
        arguments["weights"] = _values("weight", arguments.pop("weight", None), inputs)
    if "select_topk" in arguments:
        arguments["select_topk"] = _clamped(arguments["select_topk"])
    return Merge(
        method,
        arguments,
        [e.tensor for e in inputs],
        None if base is None else base.tensor,
        group.metadata.name,
        widen=method in _WIDENED,
    )


def arithmetic(method: Any, group: Any, parameters: Mapping[str, Any]) -> Merge:
    """A call of ``GeneralizedTaskArithmeticMerge.merge_group``.

    Raises
    ------
    NotServed : a combination of consensus and sparsification that we have not, or nothing to compute.
    """
    consensus, sparsification = (
        None if kind is None else str(kind.value) for kind in (method.consensus_method, method.sparsification_method)
    )
    ours = ARITHMETIC.get((consensus, sparsification))
    if ours is None:
        raise NotServed("a combination of consensus and sparsification that has no name in mergekit")
    base = group.base
    inputs = list(group.non_base)
    if base is None or not inputs:
        raise NotServed("one tensor alone: nothing to compute")
    shared = {"int8_mask", "normalize", "rescale", "lambda"}
    if any(name not in shared | {"weight", "density", "gamma", "epsilon"} for name in parameters):
        raise NotServed("other parameters than the method has")
    if any(name not in parameters for name in ("normalize", "rescale", "lambda", "weight")):
        raise NotServed("a parameter is missing")
    arguments: dict[str, Any] = {
        "weights": _values("weight", parameters["weight"], inputs),
        "scale": parameters["lambda"],
        "normalize": parameters["normalize"],
    }
    if sparsification is None and consensus is not None:
        arguments["density"] = 1.0
    elif sparsification is not None:
        arguments["rescale"] = parameters["rescale"]
        for name in ("density", *_extra(sparsification)):
            values = parameters.get(name, {e.id: _DEFAULTS[name] for e in inputs})
            arguments[name] = _values(name, values, inputs)
        arguments["density"] = _densities(arguments["density"], sparsification)
    return Merge(
        ours,
        arguments,
        [e.tensor for e in inputs],
        base.tensor,
        group.metadata.name,
        random=sparsification in _RANDOM,
    )


def _extra(sparsification: str) -> tuple[str, ...]:
    return {"magnitude_outliers": ("gamma",), "della_magprune": ("epsilon",)}.get(sparsification, ())


def _values(name: str, values: Any, entries: Sequence[Any]) -> list[Any]:
    """One value per entry, in the order of the entries."""
    try:
        return [values[entry.id] for entry in entries]
    except (KeyError, TypeError) as error:
        raise NotServed("a parameter is missing") from error


def _densities(values: Sequence[Any], sparsification: str) -> list[Any]:
    """What mergekit takes for everything or nothing; less than nothing, at random or in a band, is its to refuse."""
    if sparsification in ("random", "magnitude_outliers"):
        return [1.0 if isinstance(v, float) and v > 1.0 else v for v in values]
    return [_clamped(v) for v in values]


def _clamped(value: Any) -> Any:
    return min(max(value, 0.0), 1.0) if isinstance(value, float) and value == value else value
