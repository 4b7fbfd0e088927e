"""Parameters, small arithmetic and the skeleton that several methods share."""

from __future__ import annotations

import math
import struct
from abc import ABC, abstractmethod
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ..errors import ArgumentError
from ..ops.arguments import check_range, in_compute
from ..ops.program import Program, Table
from ..tensors import F32, F64, DType
from .protocol import Coeffs, MethodInfo, Param, Round, Spec, Stats

__all__ = [
    "INT8_MASK",
    "LAMBDA",
    "Direct",
    "check_factors",
    "finite_sum",
    "from_key",
    "is_zero_sum",
    "no_effect",
    "nonzero_sum",
    "safe_sum",
    "spoiled",
    "to_key",
    "weight",
    "weight_sum",
]

LAMBDA = Param("lambda", "float", "scale of the merged task vector", python="scale", default=1.0)
INT8_MASK = Param("int8_mask", "bool", "no effect: an option of mergekit about its temporaries", default=False)


class Direct(ABC):
    """A method whose program follows from its parameters: nothing is measured, so there are no rounds."""

    info: MethodInfo

    def check(self, params: Mapping[str, Any], dialect: str, nan: str) -> list[str]:
        """Every combination works."""
        return []

    def scope(self, params: Mapping[str, Any], dialect: str) -> Literal["tensor", "model"]:
        """Nothing is measured."""
        return "tensor"

    def start(self, spec: Spec) -> Round | Coeffs:
        """No data is needed. The program is made once, so that what it refuses is refused before data is read."""
        self.apply(spec, Coeffs())
        return Coeffs()

    def resolve(self, spec: Spec, round_: Round, stats: Stats, visited: int) -> Round | Coeffs:
        """Never called: there are no rounds."""
        return Coeffs()

    @abstractmethod
    def apply(self, spec: Spec, coeffs: Coeffs) -> Program:
        """The fused pass for this tensor."""


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


def check_factors(spec: Spec, *names: str) -> None:
    """Refuse parameters (recipe names) whose numbers the compute dtype cannot hold.

    Raises
    ------
    ArgumentError : beyond the range of float32, and the tensor is merged in it.
    """
    for name in names:
        value = spec.params[name]
        numbers = value if isinstance(value, tuple) else (value,)
        check_range((v for v in numbers if v is not None), spec.compute, name, spec.name)


def weight_sum(weights: Sequence[float], compute: DType) -> float:
    """+0 + w1 + w2 + ... in recipe order, in the compute dtype; not finite where that overflows."""
    total = 0.0
    for w in weights:
        total = in_compute(total + in_compute(w, compute), compute)
    return total


def is_zero_sum(weights: Sequence[float]) -> bool:
    """Whether the weight sum is zero in both compute dtypes, so whatever the dtypes of the tensors."""
    return all(weight_sum(weights, compute) == 0.0 for compute in (F32, F64))


def finite_sum(spec: Spec, weights: Sequence[float]) -> float:
    """The weight sum in the spec's compute dtype.

    Raises
    ------
    ArgumentError : it overflows.
    """
    total = weight_sum(weights, spec.compute)
    if not math.isfinite(total):
        raise ArgumentError(
            f"the sum of the weights is beyond the range of {spec.compute}, in which these tensors are merged",
            code="range",
            tensor=spec.name or None,
            expected="partial sums of a magnitude below " + ("2**128" if spec.compute is F32 else "2**1024"),
            got=str(list(weights)),
        )
    return total


def nonzero_sum(spec: Spec, weights: Sequence[float]) -> float:
    """As `finite_sum`, and refused if it is zero (unless non-finite values are allowed to propagate)."""
    total = finite_sum(spec, weights)
    if total == 0.0 and spec.nan == "error":
        raise ArgumentError(
            f"the weights sum to zero in {spec.compute}, and normalize divides by their sum",
            code="weights.zero-sum",
            tensor=spec.name or None,
            expected="a sum other than 0",
            got=str(list(weights)),
            hint="Change the weights or set normalize to false.",
        )
    return total


def to_key(value: float, compute: DType) -> int:
    """The key of a non-negative number: its bits in the compute dtype, to which it is rounded."""
    if compute is F64:
        return int(struct.unpack("<Q", struct.pack("<d", abs(value)))[0])
    return int(struct.unpack("<I", struct.pack("<f", abs(in_compute(value, F32))))[0])


def from_key(key: int, compute: DType) -> float:
    """The number whose key it is."""
    if compute is F64:
        return float(struct.unpack("<d", struct.pack("<Q", key))[0])
    return float(struct.unpack("<f", struct.pack("<I", key))[0])


def safe_sum(spec: Spec, weights: Sequence[float]) -> float:
    """As `finite_sum`, but 1 where its magnitude is below 1e-8."""
    total = finite_sum(spec, weights)
    return 1.0 if abs(total) < 1e-8 else total


def spoiled(spec: Spec, *, base: bool = True) -> Program:
    """A program whose result is NaN everywhere: what a statistic that is not finite leaves of a tensor.

    With nan="error" its pass names the input that is not finite, or the result.
    """
    weights = Table("rows", max(1, spec.n), array("d", [math.nan] * spec.num_models))
    return Program((1.0,) * spec.num_models, (None,) * spec.num_models, base=base, table=weights)
