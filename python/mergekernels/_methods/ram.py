"""ram and ramplus_tl: entries that one model alone changed stay whole, shared ones are averaged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from ..ops.keep import Keep
from ..ops.program import Program
from ..ops.sums import Reduce, Sums
from .common import Direct, check_factors, to_key
from .protocol import Coeffs, MethodInfo, Param, Round, Spec, Stats

__all__ = ["Ram", "RamPlus"]

_EPSILON = Param("epsilon", "float", "a change counts if it is larger than this", default=1e-5, low=0.0)
_SOURCE = "Behavior knowledge merge in reinforced agentic models, arXiv 2601.13572; mergekit merge_methods/ram.py"
_R, _ALPHA, _FACTOR = 0.1, 0.2, 1.05


def _program(spec: Spec) -> Program:
    """The mean of the changes that count, over the models that made one."""
    check_factors(spec, "epsilon")
    point = Keep(to_key(spec.params["epsilon"], spec.compute), "none")
    ones = (1.0,) * spec.num_models
    return Program(ones, (point,) * spec.num_models, divisor="kept_count", seed=spec.seed, tensor=spec.tensor)


class Ram(Direct):
    """y = x0 + the mean of the d_t above epsilon."""

    info = MethodInfo(
        name="ram",
        purpose="Merge sparse changes (as reinforcement learning makes): keep what one model changed, average what "
        "several changed.",
        formula="mt = 1 where |dt| > epsilon, else 0; y = x0 + (m1 d1 + ... + mT dT) / max(1, m1 + ... + mT)",
        params=(_EPSILON,),
        base="required",
        modifiable=True,
        passes="1 read of the base and every model, 1 write",
        source=_SOURCE,
        deviations=("a sum over the changes is divided once; mergekit divides each shared change before it adds",),
    )

    def apply(self, spec: Spec, coeffs: Coeffs) -> Program:
        """The mean of what counts."""
        return _program(spec)


@dataclass(frozen=True)
class _Factors(Coeffs):
    """alone: factor per model of what it alone changed; () while it is unknown."""

    alone: tuple[float, ...] = ()


class RamPlus:
    """RAM with a factor above 1 for what a model alone changed."""

    info = MethodInfo(
        name="ramplus_tl",
        purpose="As ram, and what a model alone changed grows with the share of its changes that others share.",
        formula="as ram; where model t alone changed an entry, y = x0 + ft dt with ft = 1 + r clip(shared_t / "
        "unique_t, 0, alpha), unique_t the number of entries that it alone changed, shared_t that of its others",
        params=(
            _EPSILON,
            Param("r", "float", "strength of the factor; not in the paper's dialect", default=_R, low=0.0),
            Param(
                "alpha",
                "float",
                "largest ratio that counts; not in the paper's dialect",
                default=_ALPHA,
                low=0.0,
            ),
            Param(
                "rescale_factor", "float", "dialect paper: the largest factor, R", default=_FACTOR, low=1.0, high=1e6
            ),
        ),
        base="required",
        modifiable=True,
        passes="2 reads of the base and every model, 1 write",
        source=_SOURCE + "; xiangchi-yuan/mrl ram-main.py (arm-r-v2)",
        dialects={
            "default": "mergekit 0.1.5's rules: counts over each tensor by itself",
            "paper": "the authors' code: counts over the whole model, ft = 1 + (R - 1) min(1, shared_t / unique_t)",
        },
        deviations=(
            "ratios are computed in float64 and rounded once",
            "a sum over the changes is divided once; mergekit divides each shared change before it adds",
            "the authors' code divides by zero where a model changed nothing alone; no entry needs the factor then",
        ),
    )

    def check(self, params: Mapping[str, Any], dialect: str, nan: str) -> list[str]:
        """Each dialect has its own strength."""
        given = {"r": _R, "alpha": _ALPHA} if dialect == "paper" else {"rescale_factor": _FACTOR}
        other = "default" if dialect == "paper" else "paper"
        return [
            f"{name} has no effect in dialect {dialect}; expected dialect {other}; got {name} {params[name]!r}"
            for name, default in given.items()
            if params[name] != default
        ]

    def scope(self, params: Mapping[str, Any], dialect: str) -> Literal["tensor", "model"]:
        """The paper counts over the model."""
        return "model" if dialect == "paper" else "tensor"

    def start(self, spec: Spec) -> Round | Coeffs:
        """Count what each model changed."""
        coeffs = _Factors()
        check_factors(spec, "epsilon", "r", "rescale_factor")
        if spec.scope.n == 0:
            return coeffs
        scope = self.scope(spec.params, spec.dialect)
        return Round("reduce", scope, coeffs=coeffs, reduce=Reduce(("kept_count", "alone_count")))

    def resolve(self, spec: Spec, round_: Round, stats: Stats, visited: int) -> Round | Coeffs:
        """The factors."""
        sums, models = cast(Sums, stats), spec.num_models
        tensors = range(len(sums.values))
        alone = []
        for t in range(models):
            kept = sum(sums.number(t, i) for i in tensors)
            unique = sum(sums.number(models + t, i) for i in tensors)
            alone.append(_factor((kept - unique) / unique, spec) if unique else 1.0)
        return replace(cast(_Factors, round_.coeffs), alone=tuple(alone))

    def apply(self, spec: Spec, coeffs: Coeffs) -> Program:
        """The mean of what counts, and the factors."""
        alone = cast(_Factors, coeffs).alone
        return replace(_program(spec), alone=alone if any(f != 1.0 for f in alone) else ())


def _factor(ratio: float, spec: Spec) -> float:
    if spec.dialect == "paper":
        return float(1.0 + (spec.params["rescale_factor"] - 1.0) * min(1.0, ratio))
    return float(1.0 + spec.params["r"] * min(ratio, spec.params["alpha"]))
