"""passthrough: copy a tensor, as when layers are stacked."""

from __future__ import annotations

from ..ops.program import Program
from .common import Direct, check_factors
from .protocol import Coeffs, MethodInfo, Param, Spec

__all__ = ["Passthrough"]


class Passthrough(Direct):
    """y = x, or scale * x."""

    info = MethodInfo(
        name="passthrough",
        purpose="Copy tensors, for depth-stacked models made of layer ranges.",
        formula="y = x, or y = scale x; without scale and change of dtype the bytes are copied",
        params=(Param("scale", "float", "factor; absent for a copy of the bits", per_model=True, default=None),),
        base="input",
        passes="1 read, 1 write",
        source="mergekit merge_methods/passthrough.py",
        max_models=1,
        deviations=("it alone preserves -0 and returns identical models exactly",),
    )

    def apply(self, spec: Spec, coeffs: Coeffs) -> Program:
        """The copy."""
        check_factors(spec, "scale")
        scale = spec.params["scale"][0]
        return Program((1.0,), (None,), base=False, scale=1.0 if scale is None else scale, copy=True)
