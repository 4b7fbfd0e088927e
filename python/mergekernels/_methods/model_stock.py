"""model_stock: between the base and the mean of the experts, by the angle between their task vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..ops.sums import Segments
from .gram import Combine, Rule, cosine
from .protocol import MethodInfo, Param, Spec

__all__ = ["ModelStock"]

_EPS = 1e-8  # fusion_bench's, in both of its quotients


class ModelStock(Combine):
    """y = x0 + (t / T) (d1 + ... + dT), t = T c / (1 + (T - 1) c), c the mean cosine of pairs of task vectors."""

    info = MethodInfo(
        name="model_stock",
        purpose="Interpolate between the base and the mean of fine-tuned models by the angle between them.",
        formula="c = mean over the pairs i < j of <di, dj> / max(|di| |dj|, norm_floor); t = T c / (1 + (T - 1) c), 0 "
        "if |1 + (T - 1) c| < 1e-6; y = x0 + (t / T) (d1 + ... + dT)",
        params=(
            Param("filter_wise", "bool", "one c per row of the last dim", default=False),
            Param(
                "norm_floor",
                "float",
                "least product of two norms; 0 is exact, a task vector of zero then has cosine 0",
                default=1e-6,
                low=0.0,
            ),
        ),
        base="required",
        min_models=2,
        passes="2 reads of the base and every model, 1 write",
        source="Jang et al. 2024, Model Stock, arXiv 2403.19522; mergekit merge_methods/model_stock.py; fusion_bench "
        "method/model_stock/",
        dialects={
            "default": "mergekit 0.1.5's rules: the mean of the cosines",
            "fusionbench": "for more than two models the cosine of the mean angle; c = <di, dj> / (|di| |dj| + 1e-8), "
            "t = T c / (1 + (T - 1) c + 1e-8); no norm_floor and no other guard",
        },
        deviations=(
            "the authors published no code; what T > 2 means differs between tools, see the dialects",
            "with the default norm_floor (mergekit's constant) t comes out far too small in magnitude for task "
            "vectors with norms below 1e-3; 0 is the exact formula",
            "mergekit works in the checkpoint's dtype; here deltas are float32 and sums float64",
        ),
        tier="T1",
        modifiable=True,
    )

    def segments(self, spec: Spec) -> Segments:
        """The tensor, or its rows along the last dim."""
        if not spec.params["filter_wise"] or len(spec.shape) < 2:
            return Segments("tensor", 1, spec.n)
        return Segments("rows", spec.n // spec.shape[-1], spec.shape[-1])

    def rule(self, spec: Spec) -> Rule:
        """T / T for every model."""
        return _fusionbench(spec.num_models) if spec.dialect == "fusionbench" else _default(spec)


def _default(spec: Spec) -> Rule:
    num_models, floor = spec.num_models, spec.params["norm_floor"]
    pairs = num_models * (num_models - 1) // 2

    def rule(gram: Sequence[float]) -> Sequence[float]:
        c = 0.0
        for norm_a, norm_b, dot in _pairs(gram, num_models):
            product = norm_a * norm_b
            if product > 0.0 and product >= floor:
                c += cosine(dot, norm_a, norm_b)
            elif floor > 0.0:
                c += max(-1.0, min(1.0, dot / floor))
        c /= pairs
        below = 1.0 + (num_models - 1) * c
        return (c / below if abs(below) >= 1e-6 else 0.0,) * num_models

    return rule


def _fusionbench(num_models: int) -> Rule:
    pairs = num_models * (num_models - 1) // 2

    def rule(gram: Sequence[float]) -> Sequence[float]:
        angle = 0.0
        for norm_a, norm_b, dot in _pairs(gram, num_models):
            angle += math.acos(max(-1.0, min(1.0, dot / (norm_a * norm_b + _EPS))))
        c = math.cos(angle / pairs)
        return (c / ((num_models - 1) * c + 1.0 + _EPS),) * num_models

    return rule


def _pairs(gram: Sequence[float], num_models: int) -> list[tuple[float, float, float]]:
    """(|di|, |dj|, <di, dj>) of the pairs i < j."""
    rows, first = [], 0
    for i in range(num_models):
        rows.append(first)
        first += num_models - i
    norms = [math.sqrt(gram[k]) for k in rows]
    return [(norms[i], norms[j], gram[rows[i] + j - i]) for i in range(num_models) for j in range(i + 1, num_models)]
