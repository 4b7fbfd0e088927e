"""task_arithmetic: add or negate task vectors."""

from __future__ import annotations

from ..ops.program import Program
from .common import INT8_MASK, LAMBDA, Direct, check_factors, no_effect, safe_sum, weight
from .protocol import Coeffs, MethodInfo, Param, Spec

__all__ = ["TaskArithmetic"]


class TaskArithmetic(Direct):
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
        modifiable=True,
        passes="1 read of the base and every model, 1 write",
        source="Ilharco et al. 2023, Editing models with task arithmetic, arXiv 2212.04089; "
        "mergekit merge_methods/generalized_task_arithmetic.py",
    )

    def apply(self, spec: Spec, coeffs: Coeffs) -> Program:
        """The weighted sum of deltas on top of the base."""
        check_factors(spec, "weight", "lambda")
        weights, scale = spec.params["weight"], spec.params["lambda"]
        keep = (None,) * spec.num_models
        if not spec.params["normalize"]:
            return Program(weights, keep, scale=scale)
        return Program(weights, keep, divisor="value", divisor_value=safe_sum(spec, weights), scale=scale)
