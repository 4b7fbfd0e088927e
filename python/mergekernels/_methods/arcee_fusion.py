"""arcee_fusion: take over the most important changes of one model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isfinite
from typing import TYPE_CHECKING, Any, Literal, cast

from ..ops.arguments import in_compute
from ..ops.keep import Keep
from ..ops.program import Program, Table
from ..ops.selection import Selection
from ..ops.sums import Sums
from .common import from_key, spoiled, to_key
from .protocol import Coeffs, MethodInfo, Round, Spec, Stats

if TYPE_CHECKING:
    from .._cpu import SweepStats

__all__ = ["ArceeFusion"]


@dataclass(frozen=True)
class _Importance(Coeffs):
    """rows: the divergence of each row, None for an empty tensor. joint: the threshold. finite: both are numbers."""

    rows: Table | None = None
    joint: Keep | None = None
    finite: bool = True


class ArceeFusion:
    """y = x0 + (importance >= threshold) (x1 - x0)."""

    info = MethodInfo(
        name="arcee_fusion",
        purpose="Take over the second model's most important changes, the base elsewhere.",
        formula="per row of the last dimension p = softmax(x1) + 1e-8, q = softmax(x0) + 1e-8, KL = max(0, sum of p "
        "log(p / q)); I = |x1 - x0| KL; Q1, Q2, Q3 = the entries at positions floor(f (n - 1)), f = 1/4, 1/2, 3/4, of "
        "ascending I; y = x0 + [I >= Q2 + 1.5 (Q3 - Q1)] (x1 - x0)",
        params=(),
        base="required",
        max_models=1,
        modifiable=True,
        tier="T1",
        passes="1 read for the rows, 1 or 2 for the quartiles, 1 read and 1 write for the merge",
        source="Arcee AI, mergekit merge_methods/arcee_fusion.py",
        deviations=(
            "quartiles over all entries; mergekit takes a random sample of a million where there are more",
            "a divergence that rounding makes negative counts as 0",
            "the result has the output dtype; mergekit returns float32 for 16-bit models",
            "exp and log are the package's own, correct to about one unit in the last place, the same everywhere",
        ),
    )

    def check(self, params: Mapping[str, Any], dialect: str, nan: str) -> list[str]:
        """There is nothing to combine."""
        return []

    def scope(self, params: Mapping[str, Any], dialect: str) -> Literal["tensor", "model"]:
        """Each tensor by itself."""
        return "tensor"

    def start(self, spec: Spec) -> Round | Coeffs:
        """The divergence of the rows."""
        if spec.n == 0:
            return _Importance()
        return Round("divergence", "tensor", coeffs=_Importance(), row_length=_row(spec))

    def resolve(self, spec: Spec, round_: Round, stats: Stats, visited: int) -> Round | Coeffs:
        """The three quartiles of the importance, then the threshold."""
        coeffs = cast(_Importance, round_.coeffs)
        if round_.op == "divergence":
            rows = Table("rows", _row(spec), cast(Sums, stats).segments(0))
            if not all(map(isfinite, rows.values)):
                return replace(coeffs, finite=False)
            ranks = tuple((0, k) for k in sorted(set(_quartiles(spec.n))))
            selection = Selection.of(
                ranks, spec.scope, policy="all", seed=spec.seed, base=True, key="importance", rows=rows
            )
            return Round("select", "tensor", selection=selection, coeffs=replace(coeffs, rows=rows))
        assert round_.selection is not None
        selection = round_.selection.advance(cast("SweepStats", stats), visited)
        if not selection.done:
            return replace(round_, selection=selection)
        found = {k: cast(Keep, p).tau for k, p in zip(sorted(set(_quartiles(spec.n))), selection.points, strict=True)}
        q1, q2, q3 = (from_key(found[k], spec.compute) for k in _quartiles(spec.n))
        spread = in_compute(q3 - q1, spec.compute)
        threshold = in_compute(q2 + in_compute(1.5 * spread, spec.compute), spec.compute)
        if not isfinite(threshold):
            return replace(coeffs, finite=False)
        return replace(coeffs, joint=Keep(to_key(threshold, spec.compute), "all"))

    def apply(self, spec: Spec, coeffs: Coeffs) -> Program:
        """The delta where its importance reaches the threshold."""
        found = cast(_Importance, coeffs)
        if not found.finite:
            return spoiled(spec)
        return Program((1.0,), (None,), joint=found.joint, importance=found.rows, seed=spec.seed, tensor=spec.tensor)


def _row(spec: Spec) -> int:
    return max(1, spec.shape[-1] if spec.shape else spec.n)


def _quartiles(n: int) -> tuple[int, int, int]:
    """Q1, Q2 and Q3 as ranks from the largest."""
    return n - (n - 1) // 4, n - (n - 1) // 2, n - 3 * (n - 1) // 4
