"""magmax: the largest change of each coordinate."""

from __future__ import annotations

from ..ops.program import Program
from .common import Direct, check_factors
from .protocol import Coeffs, MethodInfo, Param, Spec

__all__ = ["Magmax"]


class Magmax(Direct):
    """y = x0 + lambda * (the d_t of largest magnitude)."""

    info = MethodInfo(
        name="magmax",
        purpose="Keep the change of largest magnitude at each coordinate.",
        formula="y = x0 + lambda dt with t the model of largest |dt|, the later among equals",
        params=(Param("lambda", "float", "scale of the merged task vector", python="scale", default=0.5),),
        base="required",
        modifiable=True,
        passes="1 read of the base and every model, 1 write",
        source="Marczak et al. 2024, MagMax, arXiv 2407.06322; danielm1405/magmax src/merging/task_vectors.py",
        dialects={"default": "the authors' code"},
    )

    def apply(self, spec: Spec, coeffs: Coeffs) -> Program:
        """The largest delta."""
        check_factors(spec, "lambda")
        count = spec.num_models
        return Program((1.0,) * count, (None,) * count, merge="largest", scale=spec.params["lambda"])
