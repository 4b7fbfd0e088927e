"""task_arithmetic: add or negate task vectors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from ..ops.program import Program
from .common import INT8_MASK, LAMBDA, no_effect, weight, weight_sum
from .protocol import Coeffs, MethodInfo, Param, Round, Spec

if TYPE_CHECKING:
    from .._cpu import StreamStats, SweepStats

__all__ = ["TaskArithmetic"]


class TaskArithmetic:
    """y = x0 + lambda * sum of w_t d_t, the sum divided by the sum of w_t if `normalize`."""

    info = MethodInfo(
        name="task_arithmetic",
        purpose="Add (or, with negative weights, remove) what fine-tuning taught.",
        formula="y = x0 + lambda (w1 d1 + ... + wT dT) / v with dt = xt - x0; v = 1, or with normalize the sum of the "
        "weights (1 if it is below 1e-8 in magnitude)",
        params=(
            weight("weight of each task vector; negative to negate"),
            LAMBDA,
            Param("normalize", "bool", "divide by the sum of the weights", default=False),
            no_effect("density", "float"),
            no_effect("rescale", "bool"),
            INT8_MASK,
        ),
        base="required",
        passes="1 read of the base and every model, 1 write",
        source="Ilharco et al. 2023, Editing models with task arithmetic, arXiv 2212.04089; "
        "mergekit merge_methods/generalized_task_arithmetic.py",
    )

    def check(self, params: Mapping[str, Any], dialect: str, nan: str) -> list[str]:
        """Every combination works."""
        return []

    def scope(self, params: Mapping[str, Any], dialect: str) -> Literal["tensor", "model"]:
        """Nothing is measured."""
        return "tensor"

    def start(self, spec: Spec) -> Round | Coeffs:
        """No data is needed."""
        return Coeffs()

    def resolve(self, spec: Spec, round_: Round, stats: SweepStats | StreamStats, visited: int) -> Round | Coeffs:
        """Never called: there are no rounds."""
        return Coeffs()

    def apply(self, spec: Spec, coeffs: Coeffs) -> Program:
        """The weighted sum of deltas on top of the base."""
        weights, scale = spec.params["weight"], spec.params["lambda"]
        keep = (None,) * spec.num_models
        if not spec.params["normalize"]:
            return Program(weights, keep, scale=scale)
        total = weight_sum(weights, spec.compute)
        value = 1.0 if abs(total) < 1e-8 else total
        return Program(weights, keep, divisor="value", divisor_value=value, scale=scale)
