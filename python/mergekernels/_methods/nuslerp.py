"""nuslerp: slerp with weights, of tensors, rows or columns, or of what fine-tuning changed."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..ops.sums import Segments
from .common import weight
from .gram import RESOLUTION, Combine, Rule, cosine
from .protocol import MethodInfo, Param, Spec

__all__ = ["Nuslerp"]

_NORM = 1e-7


class Nuslerp(Combine):
    """slerp of two models (of their deltas, with a base) at t = w2 / (w1 + w2), with one or many angles."""

    info = MethodInfo(
        name="nuslerp",
        purpose="Spherical interpolation of two models or task vectors, with weights, per tensor, row or column.",
        formula="y = (sin((1 - t) th) v1 + sin(t th) v2) / sin th, t = w2 / (w1 + w2) (0.5 if |w1 + w2| < 1e-6), vt = "
        "xt, or with a base vt = xt - x0 and y + x0; th the angle of v1 and v2 over the tensor, a row or a column, "
        "norms taken as at least 1e-7; (1 - t) v1 + t v2 where sin th is 0",
        params=(
            weight("weight of each of the two models"),
            Param("nuslerp_flatten", "bool", "one angle per tensor", default=True),
            Param(
                "nuslerp_row_wise",
                "bool",
                "without flatten: true = one angle per column (over dim 0), false = per row (over the last dim)",
                default=False,
            ),
        ),
        base="optional",
        min_models=2,
        max_models=2,
        passes="2 reads of every tensor, 1 write",
        source="mergekit merge_methods/nuslerp.py",
        dialects={"default": "mergekit 0.1.5's rules; angles from float64 sums"},
        deviations=(
            "mergekit works in the checkpoint's dtype, where small angles snap to others (0.002 to 0.030 to 0 in "
            "bfloat16); here deltas are float32 and sums float64",
            "linear where 1 - cos^2 <= 2**-46, which sums in float64 cannot tell from 0; mergekit tests 1e-16 and "
            "amplifies rounding errors between vectors that are nearly opposite",
        ),
        tier="T1",
        modifiable=True,
    )

    def segments(self, spec: Spec) -> Segments:
        """The tensor, its rows along the last dim, or its columns along dim 0."""
        if spec.params["nuslerp_flatten"] or len(spec.shape) < 2:
            return Segments("tensor", 1, spec.n)
        if spec.params["nuslerp_row_wise"]:
            return Segments("columns", spec.n // spec.shape[0], spec.shape[0])
        return Segments("rows", spec.n // spec.shape[-1], spec.shape[-1])

    def rule(self, spec: Spec) -> Rule:
        """The two coefficients of a segment."""
        w1, w2 = spec.params["weight"]
        total = w1 + w2
        if math.isinf(total):
            w2, total = w2 / 2, w1 / 2 + w2 / 2
        t = 0.5 if abs(total) < 1e-6 else w2 / total
        s = 1.0 - t
        sin, acos, sqrt = math.sin, math.acos, math.sqrt

        def rule(gram: Sequence[float]) -> Sequence[float]:
            cos = cosine(gram[1], max(_NORM, sqrt(gram[0])), max(_NORM, sqrt(gram[2])))
            if 1.0 - cos * cos <= RESOLUTION:
                return s, t
            # For small angles acos is off by 1e-16 / th, but the quotients change by th times that only.
            theta = acos(cos)
            return sin(s * theta) / sin(theta), sin(t * theta) / sin(theta)

        return rule
