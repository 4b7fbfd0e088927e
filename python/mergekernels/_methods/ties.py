"""ties: trim each task vector, elect one sign per coordinate, average what agrees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from ..ops.keep import KEEP_NOTHING, KeepRule
from ..ops.program import Program
from .common import INT8_MASK, LAMBDA, weight
from .pipeline import (
    DENSITY,
    MAJORITY,
    RESCALE,
    SCOPE,
    TIE_POLICY,
    ZERO_VOTE,
    Election,
    Pipeline,
    Points,
    measured,
    paper_count,
)
from .protocol import Coeffs, MethodInfo, Param, Spec

__all__ = ["Ties"]


class Ties(Pipeline):
    """TIES-merging in the dialects of mergekit, of the paper and of PEFT, trimming per tensor or over the model."""

    elections: ClassVar[Mapping[str, Election]] = {"default": "weighted", "paper": "paper", "peft": "peft"}
    info = MethodInfo(
        name="ties",
        purpose="Keep the largest entries of each task vector, vote one sign per coordinate, average what agrees.",
        formula=(
            "d~t = the max(1, floor(density n)) entries of largest |dt|, the others 0; "
            "s = +1 if w1 d~1 + ... + wT d~T >= 0, else -1; "
            "y = x0 + lambda (sum of the wt d~t of sign s) / (sum of their wt)"
        ),
        params=(
            weight("weight of each task vector, applied before the vote", optional_in=("paper",)),
            DENSITY,
            LAMBDA,
            Param(
                "normalize",
                "bool",
                "divide by the weights (paper and peft: the number) of the models that agree",
                default=True,
            ),
            SCOPE,
            TIE_POLICY,
            ZERO_VOTE,
            MAJORITY,
            Param(
                "merge_function",
                "str",
                "dialect paper: what becomes of the entries that agree; mean, or with normalize: false the sum",
                default=None,
                choices=("mean", "sum", "max"),
            ),
            RESCALE,
            INT8_MASK,
        ),
        base="required",
        modifiable=True,
        passes="scope tensor: 2 reads (a third where ties overflow the candidates), 1 write; scope model: 2 to 4 "
        "sweeps of the checkpoint and 1 writing pass; rescale adds a read",
        source="Yadav et al. 2023, TIES-Merging, arXiv 2306.01708; mergekit "
        "merge_methods/generalized_task_arithmetic.py; prateeky2806/ties-merging src/utils/merge_utils.py; "
        "peft utils/merge_utils.py",
        dialects={
            "default": "mergekit 0.1.5's rules in float32: exactly max(1, floor(density n)) kept, weighted vote, "
            "zero counts as +1, divisor the weights that agree",
            "paper": "the authors' code: all |d| >= the floor(density n)+1-th largest kept, unweighted vote, "
            "zero takes the majority "
            "sign of the scope, divisor the number that agree; weights other than 1 are refused",
            "peft": "PEFT's adapter merging: floor(density n) kept, which may be none; unweighted vote by sum or by "
            "number of signs, zero counts as +1; weights after the vote, divisor the number that agree",
        },
        deviations=(
            "mergekit leaves the survivors among equal magnitudes to an unstable sort; here tie_policy decides",
            "mergekit works in the checkpoint's dtype; here deltas are float32 and the output is rounded once",
            "density outside [0, 1] is refused; mergekit takes the nearer end",
            "the authors' code takes density 20 as percent, and at a density of 1 it fails; here 1 keeps everything",
            "where the paper's majority is itself 0 the coordinate stays at the base; the authors' code then takes "
            "the negative entries",
            "PEFT has one density for all models; here each model may have its own",
            "int8_mask has no effect on the result, as in mergekit up to the dtype of a comparison",
        ),
    )

    def check(self, params: Mapping[str, Any], dialect: str, nan: str) -> list[str]:
        """The paper's merge functions belong to its dialect."""
        problems = super().check(params, dialect, nan)
        function = params["merge_function"]
        if function is not None and dialect != "paper":
            problems.append(f"merge_function is the paper's; expected dialect paper; got dialect {dialect}")
        elif function in ("mean", "max") and not params["normalize"]:
            problems.append(f"normalize: false asks for a sum; expected merge_function sum; got {function}")
        return problems

    def searches(self, spec: Spec) -> tuple[tuple[int, int], ...]:
        """One point per model, unless it keeps nothing or everything."""
        n = measured(spec, self.scope(spec.params, spec.dialect)).n
        return tuple((t, k) for t, k in enumerate(self._counts(spec, n)) if 0 < k < n)

    def rules(self, spec: Spec, points: Points) -> tuple[KeepRule | None, ...]:
        """The points."""
        n = measured(spec, self.scope(spec.params, spec.dialect)).n
        return tuple(KEEP_NOTHING if k == 0 else points.get((t, k)) for t, k in enumerate(self._counts(spec, n)))

    def apply(self, spec: Spec, coeffs: Coeffs) -> Program:
        """Trim at the points, elect, average or take the largest, add."""
        program = super().apply(spec, coeffs)
        function = spec.params["merge_function"]
        if function in (None, "mean") or program.vote == "none":
            return program
        return replace(program, divisor="none", merge="max" if function == "max" else "sum")

    @staticmethod
    def _counts(spec: Spec, n: int) -> list[int]:
        """How many entries each model keeps, at most n."""
        counts = []
        for density in spec.params["density"]:
            if spec.dialect == "paper" or density <= 0.0 or density >= 1.0 or n == 0:
                counts.append(paper_count(density, n))
            else:
                counts.append(max(0 if spec.dialect == "peft" else 1, int(density * n)))
        return counts
