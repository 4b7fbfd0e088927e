"""linear: the weighted mean of checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..ops.program import Program
from .common import Direct, check_factors, is_zero_sum, nonzero_sum, weight
from .protocol import Coeffs, MethodInfo, Param, Spec

__all__ = ["Linear"]


class Linear(Direct):
    """y = sum of w_t x_t, divided by the sum of w_t if `normalize`."""

    info = MethodInfo(
        name="linear",
        purpose="Weighted mean of checkpoints (model soup).",
        formula="y = (w1 x1 + ... + wT xT) / (w1 + ... + wT); without the division if normalize is false",
        params=(
            weight("weight of each model; equal weights give the plain average"),
            Param("normalize", "bool", "divide by the sum of the weights", default=True),
        ),
        base="input",
        passes="1 read of every model, 1 write",
        source="Wortsman et al. 2022, Model soups, arXiv 2203.05482; mergekit merge_methods/linear.py",
        deviations=(
            "weights that sum to zero under normalize are refused; mergekit writes Inf or NaN "
            "(so does nan: propagate here)",
            "every product is rounded before it is added; mergekit fuses the two, which differs in "
            "the last bit of float32",
        ),
    )

    def check(self, params: Mapping[str, Any], dialect: str, nan: str) -> list[str]:
        """Weights that sum to zero in any compute dtype cannot be normalised; `apply` knows the dtype."""
        if params["normalize"] and nan == "error" and is_zero_sum(params["weight"]):
            problem = "the weights sum to zero, and normalize divides by their sum"
            return [f"{problem}; expected a sum other than 0; got {list(params['weight'])}"]
        return []

    def apply(self, spec: Spec, coeffs: Coeffs) -> Program:
        """The weighted sum."""
        check_factors(spec, "weight")
        weights = spec.params["weight"]
        keep = (None,) * spec.num_models
        if not spec.params["normalize"]:
            return Program(weights, keep, base=False)
        return Program(weights, keep, base=False, divisor="value", divisor_value=nonzero_sum(spec, weights))
