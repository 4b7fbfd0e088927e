"""Parameters and small arithmetic that several methods share."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import ArgumentError
from ..tensors import DType
from .protocol import Param, Spec, to_compute

__all__ = ["INT8_MASK", "LAMBDA", "no_effect", "nonzero_sum", "weight", "weight_sum"]

LAMBDA = Param("lambda", "float", "scale of the merged task vector", python="scale", default=1.0)
INT8_MASK = Param("int8_mask", "bool", "no effect: an option of mergekit about its temporaries", default=False)


def weight(help_: str, *, optional_in: tuple[str, ...] = ()) -> Param:
    """The `weight` parameter: one double per model."""
    return Param("weight", "float", help_, python="weights", per_model=True, optional_in=optional_in)


def no_effect(name: str, kind: str) -> Param:
    """A parameter that mergekit accepts for this method and that changes nothing."""
    default: object = False if kind == "bool" else 1.0
    text = "no effect: accepted because mergekit accepts it here"
    if kind == "bool":
        return Param(name, "bool", text, default=default)
    return Param(name, "float", text, per_model=True, default=default)


def weight_sum(weights: Sequence[float], compute: DType) -> float:
    """+0 + w1 + w2 + ... in recipe order, in the compute dtype."""
    total = 0.0
    for w in weights:
        total = to_compute(total + to_compute(w, compute), compute)
    return total


def nonzero_sum(spec: Spec, weights: Sequence[float]) -> float:
    """The weight sum, refused if it is zero (unless non-finite values are allowed to propagate)."""
    total = weight_sum(weights, spec.compute)
    if total == 0.0 and spec.nan == "error":
        raise ArgumentError(
            "the weights sum to zero, and normalize divides by their sum",
            code="weights.zero-sum",
            tensor=spec.name or None,
            expected="a sum other than 0",
            got=str(list(weights)),
            hint="Change the weights or set normalize to false.",
        )
    return total
