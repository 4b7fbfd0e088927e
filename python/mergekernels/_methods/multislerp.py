"""multislerp: a weighted mean of directions, with the weighted mean of the lengths."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import DataError
from ..ops.program import Program
from .common import weight
from .gram import Combination, Combine, Rule, exact_sum, norm_of, symmetric
from .protocol import Coeffs, MethodInfo, Param, Round, Spec

__all__ = ["Multislerp"]


class Multislerp(Combine):
    """y = (sum of w_t |v_t|) m / |m| with m = sum of w_t v_t / |v_t|, of tensors or of deltas."""

    info = MethodInfo(
        name="multislerp",
        purpose="Weighted mean of the directions of any number of models or task vectors, at their mean length.",
        formula="m = sum of wt vt / (|vt| + eps), y = (sum of wt |vt|) m / |m|, vt = xt, or with a base vt = xt - x0 "
        "and y + x0; wt divided by their sum if normalize_weights",
        params=(
            weight("weight of each model"),
            Param("normalize_weights", "bool", "divide the weights by their sum", default=True),
            Param("eps", "float", "added to the norms, and the least |m| that has a direction", default=1e-8, low=0.0),
        ),
        base="optional",
        passes="2 reads of every tensor, 1 write",
        source="mergekit merge_methods/multislerp.py",
        dialects={"default": "mergekit 0.1.5's rules in closed form; norms from float64 sums"},
        deviations=(
            "mergekit's step in the tangent space is identically zero, so it is left out",
            "weights that sum to zero under normalize_weights are refused; mergekit writes NaN",
            "where |m| is below eps, or below what sums in float64 can tell from 0, two models are mixed linearly and "
            "more are refused, as in mergekit; tensors that are all zero give zeros (the base) for any number",
            "one model is returned as it is; with a base as x0 + (x1 - x0), which may differ in the last bit of "
            "float32",
        ),
        tier="T1",
        modifiable=True,
    )

    def check(self, params: Mapping[str, Any], dialect: str, nan: str) -> list[str]:
        """Weights that sum to zero, or to too much, cannot be normalised."""
        total = exact_sum(params["weight"]) if params["normalize_weights"] else 1.0
        if total == 0.0:
            problem = "the weights sum to zero, and normalize_weights divides by their sum"
            return [f"{problem}; expected a sum other than 0; got {list(params['weight'])}"]
        if not math.isfinite(total):
            problem = "the sum of the weights is beyond the range of float64"
            return [f"{problem}; expected a magnitude below 2**1024; got {list(params['weight'])}"]
        return []

    def start(self, spec: Spec) -> Round | Coeffs:
        """The Gram, unless there is one model only."""
        if spec.num_models == 1:
            return Coeffs()
        return super().start(spec)

    def apply(self, spec: Spec, coeffs: Coeffs) -> Program:
        """The combination; one model as it is."""
        if isinstance(coeffs, Combination):
            return super().apply(spec, coeffs)
        if spec.has_base:
            return Program((1.0,), (None,))
        return Program((1.0,), (None,), base=False, copy=True)

    def rule(self, spec: Spec) -> Rule:
        """The coefficients, from |m| by the Gram."""
        weights: tuple[float, ...] = spec.params["weight"]
        if spec.params["normalize_weights"]:
            total = math.fsum(weights)
            weights = tuple(w / total for w in weights)
        eps = spec.params["eps"]
        num_models = spec.num_models

        def rule(entries: Sequence[float]) -> Sequence[float]:
            gram = symmetric(entries, num_models)
            norms = [math.sqrt(gram[t][t]) for t in range(num_models)]
            if not any(norms):
                return (0.0,) * num_models
            parts = [w / (v + eps) if v + eps > 0.0 else 0.0 for w, v in zip(weights, norms, strict=True)]
            length, noise = norm_of(parts, gram)
            if length < eps or length <= noise:
                if num_models == 2:
                    return weights
                raise _cancelled(spec)
            scale = math.fsum(w * v for w, v in zip(weights, norms, strict=True)) / length
            return [scale * p for p in parts]

        return rule


def _cancelled(spec: Spec) -> DataError:
    return DataError(
        "the weighted directions of the models cancel, so that their mean has no direction",
        code="directions.cancel",
        tensor=spec.name or None,
        expected="a weighted sum of unit vectors of at least eps",
        hint="Change the weights, or leave out one of the models that oppose each other.",
    )
