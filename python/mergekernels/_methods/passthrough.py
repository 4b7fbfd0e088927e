"""passthrough: copy a tensor, as when layers are stacked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from ..ops.program import Program
from .protocol import Coeffs, MethodInfo, Param, Round, Spec

if TYPE_CHECKING:
    from .._cpu import StreamStats, SweepStats

__all__ = ["Passthrough"]


class Passthrough:
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

    def check(self, params: Mapping[str, Any], dialect: str, nan: str) -> list[str]:
        """Every combination works."""
        return []

    def scope(self, params: Mapping[str, Any], dialect: str) -> Literal["tensor", "model"]:
        """Nothing is measured."""
        return "tensor"

    def start(self, spec: Spec) -> Round | Coeffs:
        """No data is needed."""
        return Coeffs()

    def resolve(self, spec: Spec, round_: Round, stats: SweepStats | StreamStats, visited: int) -> Round | Coeffs:
        """Never called: there are no rounds."""
        return Coeffs()

    def apply(self, spec: Spec, coeffs: Coeffs) -> Program:
        """The copy."""
        scale = spec.params["scale"][0]
        return Program((1.0,), (None,), base=False, scale=1.0 if scale is None else scale, copy=True)
