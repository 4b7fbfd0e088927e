"""expo: extrapolate from a model away from the model it was tuned from."""

from __future__ import annotations

from ..ops.program import Program
from .common import Direct, check_factors
from .protocol import Coeffs, MethodInfo, Param, Spec

__all__ = ["Expo"]


class Expo(Direct):
    """y = x1 + a (x1 - x0)."""

    info = MethodInfo(
        name="expo",
        purpose="Extrapolate an aligned model away from its supervised parent.",
        formula="y = x1 + a (x1 - x0), x0 the base (the parent), x1 the one model, a = extrapolation_factor",
        params=(Param("extrapolation_factor", "float", "how far to go on; 0 returns the model"),),
        base="required",
        max_models=1,
        passes="1 read of both models, 1 write",
        source="Zheng et al. 2024, Weak-to-strong extrapolation expedites alignment, arXiv 2404.16792; fusion_bench "
        "method/linear/expo.py",
        dialects={"default": "the paper's formula"},
    )

    def apply(self, spec: Spec, coeffs: Coeffs) -> Program:
        """The model and its scaled delta."""
        check_factors(spec, "extrapolation_factor")
        return Program((1.0,), (None,), scale=spec.params["extrapolation_factor"], anchor="first")
