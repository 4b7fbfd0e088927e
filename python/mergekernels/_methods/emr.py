"""emr: the unified task vector of EMR-merging."""

from __future__ import annotations

from ..ops.program import Program
from .common import LAMBDA, Direct, check_factors
from .protocol import Coeffs, MethodInfo, Spec

__all__ = ["Emr"]


class Emr(Direct):
    """y = x0 + lambda * sign * (largest agreeing magnitude)."""

    info = MethodInfo(
        name="emr",
        purpose="One unified task vector: at each coordinate the elected sign and the largest magnitude that has it.",
        formula="g = +1 if d1 + ... + dT > 0, else -1; y = x0 + lambda g max over t of |dt| where dt g > 0 (0 if "
        "there is none)",
        params=(LAMBDA,),
        base="required",
        modifiable=True,
        passes="1 read of the base and every model, 1 write",
        source="Huang et al. 2024, EMR-Merging, arXiv 2405.17461; harveyhuang18/EMR_Merging; fusion_bench "
        "method/emr_merging",
        dialects={"default": "the authors' code"},
        deviations=(
            "this is the unified vector alone; the authors give each task its own expert, the unified vector under the "
            "task's mask and times the task's scale",
        ),
    )

    def apply(self, spec: Spec, coeffs: Coeffs) -> Program:
        """The largest of what agrees."""
        check_factors(spec, "lambda")
        count = spec.num_models
        return Program(
            (1.0,) * count,
            (None,) * count,
            vote="weighted",
            zero_vote=-1,
            merge="max",
            scale=spec.params["lambda"],
        )
