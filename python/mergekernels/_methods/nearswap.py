"""nearswap: move the base toward a second model by a bounded step per coordinate."""

from __future__ import annotations

from ..ops.program import Program
from .common import Direct, check_factors
from .protocol import Coeffs, MethodInfo, Param, Spec

__all__ = ["Nearswap"]


class Nearswap(Direct):
    """y = x0 + clip(d, -t, t)."""

    info = MethodInfo(
        name="nearswap",
        purpose="Move each weight of the base toward a second model by at most t.",
        formula="y = x0 + clip(d, -t, t) with d = x1 - x0; for t < 1e-6, where |d| < 1e-6, y = x0 + t 1e6 d",
        params=(Param("t", "float", "largest step; 0 or less returns the base"),),
        base="required",
        max_models=1,
        passes="1 read of both models, 1 write",
        source="alchemonaut, QuartetAnemoi-70B-t0.0001 model card; mergekit merge_methods/nearswap.py",
        deviations=(
            "mergekit computes w x1 + (1 - w) x0 with w = clip(t / max(|d|, 1e-6), 0, 1), the same up to rounding",
        ),
    )

    def apply(self, spec: Spec, coeffs: Coeffs) -> Program:
        """The clipped delta."""
        check_factors(spec, "t")
        return Program((1.0,), (None,), limit=max(0.0, spec.params["t"]))
