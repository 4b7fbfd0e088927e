"""fisher: average with the importance of each entry as its weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import fsum, isfinite, sqrt
from typing import Any, Literal, cast

from ..errors import DataError
from ..ops.program import Program
from ..ops.sums import Reduce, Sums
from .common import check_factors, spoiled
from .gram import exact_sum
from .pipeline import place
from .protocol import Coeffs, MethodInfo, Param, Round, Spec, Stats

__all__ = ["Fisher"]


@dataclass(frozen=True)
class _Scales(Coeffs):
    """scales: factor of each model's weight, () for 1, None where a norm is not finite. negative: per tensor of the
    scope the number of negative importances of each model.
    """

    scales: tuple[float, ...] | None = ()
    negative: tuple[tuple[float, ...], ...] = ()


class Fisher:
    """y = sum of c_t (F_t + e) x_t over the sum of c_t (F_t + e)."""

    info = MethodInfo(
        name="fisher",
        purpose="Average checkpoints entry by entry, weighted by the diagonal Fisher information that is supplied.",
        formula="y = (sum of ct (Ft + epsilon) xt) / (sum of ct (Ft + epsilon)); with normalize_fisher ct is "
        "multiplied by rt / (r1 + ... + rT), rt = 1 / (||Ft|| + epsilon), the norm over the whole model",
        params=(
            Param("weight", "float", "weight ct of each model", python="weights", per_model=True, default=1.0, low=0.0),
            Param("normalize_fisher", "bool", "divide each model's importances by their norm", default=False),
            Param("epsilon", "float", "what is added to every importance", default=1e-6, low=0.0),
        ),
        base="input",
        companions="importance",
        max_models=32,
        tier="T1",
        passes="2 reads of the models and their importances (the first looks for negative ones and sums the norms), "
        "1 write",
        source="Matena and Raffel 2022, Merging models with Fisher-weighted averaging, arXiv 2111.09832; MergeLM "
        "model_merging_methods/merging_methods.py; fusion_bench method/fisher_merging",
        dialects={
            "default": "the formula of MergeLM and fusion_bench; normalize_fisher is off, as on MergeLM's command line"
        },
        deviations=(
            "fusion_bench and MergeLM's function normalise by default: normalize_fisher: true",
            "a missing or negative importance is an error",
            "the importances are supplied; estimating them is the caller's",
        ),
    )

    def check(self, params: Mapping[str, Any], dialect: str, nan: str) -> list[str]:
        """Weights must not all be 0."""
        if not any(w > 0.0 for w in params["weight"]):
            return [f"no weight is above 0; expected a sum above 0; got {list(params['weight'])}"]
        return []

    def scope(self, params: Mapping[str, Any], dialect: str) -> Literal["tensor", "model"]:
        """Norms are taken over the model."""
        return "model" if params["normalize_fisher"] else "tensor"

    def start(self, spec: Spec) -> Round | Coeffs:
        """Look for negative importances, and sum the squares."""
        check_factors(spec, "weight", "epsilon")
        if spec.scope.n == 0:
            return _Scales()
        normalize = spec.params["normalize_fisher"]
        quantities = ("negative_count", "importance_squares") if normalize else ("negative_count",)
        return Round("reduce", self.scope(spec.params, spec.dialect), coeffs=_Scales(), reduce=Reduce(quantities))

    def resolve(self, spec: Spec, round_: Round, stats: Stats, visited: int) -> Round | Coeffs:
        """The factors."""
        sums, models = cast(Sums, stats), range(spec.num_models)
        tensors = range(len(sums.values))
        coeffs = _Scales(negative=tuple(tuple(sums.number(t, i) for t in models) for i in tensors))
        if not spec.params["normalize_fisher"]:
            return coeffs
        epsilon = spec.params["epsilon"]
        norms = [sqrt(exact_sum([sums.number(spec.num_models + t, i) for i in tensors])) + epsilon for t in models]
        if not all(map(isfinite, norms)):
            return replace(coeffs, scales=None)
        # Without epsilon, importances that are all 0 have no norm: in the limit those models alone count.
        inverse = [float(norm == 0.0) if 0.0 in norms else 1.0 / norm for norm in norms]
        total = fsum(inverse)
        return replace(coeffs, scales=tuple(r / total for r in inverse))

    def apply(self, spec: Spec, coeffs: Coeffs) -> Program:
        """The weighted mean.

        Raises
        ------
        DataError : an importance of this tensor is negative.
        """
        check_factors(spec, "weight", "epsilon")
        found = cast(_Scales, coeffs)
        for t, count in enumerate(found.negative[place(spec)] if found.negative else ()):
            if count:
                raise DataError(
                    f"the importance of model {t} has {count:.0f} negative entries",
                    code="importance.negative",
                    tensor=spec.name or None,
                    expected="0 or more",
                )
        if found.scales is None:
            # The importances count as models here: all that is read is looked at.
            return spoiled(replace(spec, num_models=2 * spec.num_models), base=False)
        scales = found.scales or (1.0,) * spec.num_models
        weights = tuple(c * s for c, s in zip(spec.params["weight"], scales, strict=True))
        return Program(
            weights,
            (None,) * spec.num_models,
            base=False,
            merge="importance",
            epsilon=spec.params["epsilon"],
        )
