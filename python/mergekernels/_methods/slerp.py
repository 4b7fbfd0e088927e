"""slerp: the great circle between two tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .gram import Combine, Rule, cosine
from .protocol import MethodInfo, Param, Spec

__all__ = ["Slerp"]

_LINEAR = 0.9995
_NORM = 1e-8


class Slerp(Combine):
    """y = (sin((1 - t) th) a + sin(t th) b) / sin th, a the base, b the model, th the angle between them."""

    info = MethodInfo(
        name="slerp",
        purpose="Spherical interpolation between two models.",
        formula="y = (sin((1 - t) th) a + sin(t th) b) / sin th with a the base, b the model, cos th = <a, b> / (|a| "
        "|b|); y = (1 - t) a + t b if |cos th| > 0.9995; a norm of at most 1e-8 counts as 1",
        params=(Param("t", "float", "place between the base (0) and the model (1)"),),
        base="first",
        min_models=1,
        max_models=1,
        passes="2 reads of both tensors, 1 write",
        source="Shoemake 1985, Animating rotation with quaternion curves; mergekit merge_methods/slerp.py",
        dialects={"default": "mergekit 0.1.5's rules; the angle from float64 sums"},
        deviations=(
            "mergekit takes dot product and norms in float32; here they are float64 sums in a fixed order",
            "mergekit computes coefficients in float32; here they are float64, rounded to float32 once",
        ),
        tier="T1",
    )

    def rule(self, spec: Spec) -> Rule:
        """The two coefficients."""
        t = spec.params["t"]

        def rule(gram: Sequence[float]) -> Sequence[float]:
            norm_a, norm_b = math.sqrt(gram[0]), math.sqrt(gram[2])
            cos = cosine(gram[1], norm_a if norm_a > _NORM else 1.0, norm_b if norm_b > _NORM else 1.0)
            if abs(cos) > _LINEAR:
                return 1.0 - t, t
            # Away from the linear range, acos loses no digits: its derivative stays below 32.
            theta = math.acos(cos)
            sin = math.sin(theta)
            return math.sin((1.0 - t) * theta) / sin, math.sin(t * theta) / sin

        return rule
