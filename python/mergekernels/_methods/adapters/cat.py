"""cat and svd: the weighted sum of adapters, exactly or at a rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..matrix import MatrixSpec, Merged, Wants
from ..permatrix import PerMatrix
from ..protocol import MethodInfo
from .clamp import SVD_CLAMP, clamping
from .common import LAMBDA, MANY, WEIGHT
from .peft import DEVIATIONS, PEFT
from .sums import weighted_sum

if TYPE_CHECKING:
    from ...adapters.model import Delta

__all__ = ["Cat", "Svd"]


class Cat(PerMatrix):
    """Delta = sum of w_t B_t A_t, exactly, at rank sum of r_t."""

    info = MethodInfo(
        name="cat",
        purpose="The weighted sum of adapters, exactly: their factors side by side.",
        formula="Delta = w1 B1 A1 + ... + wT BT AT = [w1 B1 .. wT BT] [A1; ..; AT]; rank r1 + ... + rT, at most "
        "min(m, n)",
        params=(WEIGHT, LAMBDA),
        base="optional",
        passes="1 read of the factors",
        source=PEFT,
        max_models=MANY,
        tier="T2",
        takes=("adapters",),
        dialects={
            "default": "the sum",
            "peft": "PEFT 0.21.2: the sum; if the first adapter asks for rsLoRA, times the square root of the result's "
            "rank",
        },
        deviations=(
            DEVIATIONS["rslora"],
            "where the ranks add up to min(m, n) or more, the factors are the dense sum and an identity matrix; PEFT "
            "keeps all columns",
        ),
    )

    def wants(self, params: Mapping[str, Any], dialect: str) -> Wants:
        """Truncated only where asked for."""
        return Wants(rank="exact", peft=True)

    def merge(self, spec: MatrixSpec, deltas: Sequence[Delta], state: Any = None) -> Merged:
        """The factors side by side, or the dense sum."""
        delta, route = weighted_sum(deltas, spec.params["weight"], spec.shape)
        return Merged(delta, {"route": route} if route else {})


class Svd(PerMatrix):
    """The best rank-r approximation of sum of w_t B_t A_t."""

    info = MethodInfo(
        name="svd",
        purpose="The best approximation of the weighted sum of adapters at a rank: the default type of PEFT.",
        formula="Delta = best rank r approximation of w1 B1 A1 + ... + wT BT AT; r = rank, or the least that keeps the "
        "energy, by default the largest rank among the adapters",
        params=(WEIGHT, LAMBDA, SVD_CLAMP),
        base="optional",
        passes="1 read of the factors",
        source=PEFT,
        max_models=MANY,
        tier="T2",
        takes=("adapters",),
        dialects={
            "default": "the sum, truncated",
            "peft": "PEFT 0.21.2: one adapter alone is not truncated; if the first adapter asks for rsLoRA, times the "
            "square root of the rank",
        },
        deviations=(
            DEVIATIONS["scale"],
            DEVIATIONS["rslora"],
            DEVIATIONS["single"],
            DEVIATIONS["half"],
            DEVIATIONS["clamp"],
        ),
    )

    def wants(self, params: Mapping[str, Any], dialect: str) -> Wants:
        """Always truncated."""
        return Wants(rank="largest", peft=True)

    def merge(self, spec: MatrixSpec, deltas: Sequence[Delta], state: Any = None) -> Merged:
        """The sum; the driver truncates it."""
        delta, route = weighted_sum(deltas, spec.params["weight"], spec.shape)
        return Merged(delta, {"route": route} if route else {}, finish=clamping(spec.params))
