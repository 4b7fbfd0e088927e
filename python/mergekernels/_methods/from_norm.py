"""from_norm (FroM): task vectors weighted by a power of their Frobenius norm."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping
from typing import Any, Literal, cast

from .. import _cpu
from ..ops.program import Program
from ..ops.sums import Reduce, Sums
from .common import LAMBDA, check_factors
from .gram import Combination, combination
from .protocol import Coeffs, MethodInfo, Param, Round, Spec, Stats

__all__ = ["FromNorm", "shares"]


class FromNorm:
    """y = x0 + lambda (sum of |d_t|^k d_t) / (sum of |d_t|^k), per tensor."""

    info = MethodInfo(
        name="from_norm",
        purpose="Weight task vectors by a power of their Frobenius norm, per tensor (FroM). Derived from the objective "
        "that the paper states, the minimum of sum of |dt|^k |d - dt|^2; not a verified reproduction: neither code nor "
        "the value of k was public.",
        formula="y = x0 + lambda (|d1|^k d1 + ... + |dT|^k dT) / (|d1|^k + ... + |dT|^k), |dt| the Frobenius norm of "
        "the tensor's delta; the base where all deltas are 0",
        params=(
            Param("k", "float", "power of the norm; 0 averages, a large one keeps the largest (try 1, 2, 4)", low=0.0),
            LAMBDA,
        ),
        base="required",
        passes="2 reads of the base and every model, 1 write",
        source="FroM, arXiv 2506.02478, EMNLP 2025 Findings (objective); the closed form is derived here",
        dialects={"default": "the closed form, for every floating tensor by itself"},
        deviations=("derived, not a verified reproduction: the paper's k and its rule for LoRA factors are unknown",),
        tier="T1",
        modifiable=True,
    )

    def check(self, params: Mapping[str, Any], dialect: str, nan: str) -> list[str]:
        """Every combination works."""
        return []

    def scope(self, params: Mapping[str, Any], dialect: str) -> Literal["tensor", "model"]:
        """Each tensor by itself."""
        return "tensor"

    def start(self, spec: Spec) -> Round | Coeffs:
        """The squared norms of the deltas."""
        check_factors(spec, "lambda")
        first = Combination(values=array("d", [1.0] * spec.num_models))
        if spec.n == 0:
            return first
        return Round("reduce", "tensor", coeffs=first, reduce=Reduce(("squares",)))

    def resolve(self, spec: Spec, round_: Round, stats: Stats, visited: int) -> Round | Coeffs:
        """The shares |dt|^k / sum, as a softmax of k log |dt|."""
        sums = cast(Sums, stats)
        squares = [sums.number(t) for t in range(spec.num_models)]
        if not all(map(math.isfinite, squares)):
            return Combination(values=array("d", [math.nan] * spec.num_models))
        return Combination(values=array("d", shares(squares, spec.params["k"])))

    def apply(self, spec: Spec, coeffs: Coeffs) -> Program:
        """The weighted deltas on top of the base."""
        return combination(spec, coeffs, spec.params["lambda"])


def shares(squares: list[float], power: float) -> list[float]:
    """|dt|^k over their sum; 0 to the power of 0 is 1. All 0 where every norm is."""
    if not any(squares):
        return [0.0] * len(squares)
    if power == 0.0:
        return [1.0 / len(squares)] * len(squares)
    # The package's own exp and log: the same bits on every machine.
    plain = [_cpu.transcendental("log", s) if s > 0.0 else -math.inf for s in squares]
    logs = [0.5 * power * x for x in plain]
    top = max(logs)
    if math.isinf(top):  # a huge power: only differences from the largest norm can be told
        logs, top = [0.5 * power * (x - max(plain)) for x in plain], 0.0
    parts = [_cpu.transcendental("exp", x - top) if x > -math.inf else 0.0 for x in logs]
    total = math.fsum(parts)
    return [p / total for p in parts]
