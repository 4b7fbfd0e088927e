"""consensus and tall_mask: the multi-task vector, and which of its coordinates the tasks use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from ..ops.program import Program, Useful
from .common import LAMBDA, check_factors
from .pipeline import SCOPE
from .protocol import Coeffs, MethodInfo, Param, Round, Spec, Stats
from .ties import Ties

__all__ = ["Consensus", "TallMask"]

_TRIM = 0.2
_THRESHOLD = Param(
    "threshold",
    "float",
    "task t uses a coordinate if |dt| > threshold |S - dt|; the authors choose from 0.2 to 0.6 by validation",
    per_model=True,
    default=0.2,
    low=0.0,
)
_AT_LEAST = Param(
    "at_least",
    "int",
    "tasks that must use a coordinate: 0 keeps all, more than there are models none",
    default=2,
    low=0,
)
_INNER = (
    Param(
        "inner",
        "str",
        "what makes S: the sum of the task vectors, or TIES in the paper's dialect with a sum",
        default="task_arithmetic",
        choices=("task_arithmetic", "ties"),
    ),
    Param(
        "density",
        "float",
        f"inner ties: fraction of each task vector that is kept; {_TRIM}",
        per_model=True,
        default=None,
        low=0.0,
        high=1.0,
    ),
    replace(SCOPE, help="inner ties: what density and the majority count over; model"),
)
_SOURCE = (
    "Wang et al. 2024, Localizing task information for improved model merging and compression, arXiv 2405.07813; "
    "nik-dim/tall_masks src/utils/tallmask_utils.py, src/eval/aggregation.py"
)
_PASSES = "1 read of the base and every model, 1 write; inner ties adds its selection and its majority vote"
_DEVIATIONS = (
    "the authors compare distances of absolute weights, which rounds differently; here the deltas are compared",
)


class Consensus:
    """y = x0 + lambda S where enough tasks use the coordinate."""

    info = MethodInfo(
        name="consensus",
        purpose="Add the task vectors, and keep only the coordinates that several tasks use.",
        formula="S = d1 + ... + dT, or their TIES sum; mt = 1 where |dt| > threshold_t |S - dt|; "
        "y = x0 + lambda S where m1 + ... + mT >= at_least, else x0",
        params=(_THRESHOLD, _AT_LEAST, LAMBDA, *_INNER),
        base="required",
        modifiable=True,
        passes=_PASSES,
        source=_SOURCE,
        dialects={"default": "the authors' code"},
        deviations=_DEVIATIONS,
    )
    _ties = Ties()

    def check(self, params: Mapping[str, Any], dialect: str, nan: str) -> list[str]:
        """Only TIES trims."""
        given = params["density"] if isinstance(params["density"], tuple) else (params["density"],)
        if params["inner"] == "ties":
            return []
        problems = []
        if any(d is not None for d in given):
            problems.append("density is for inner: ties; expected no density; got inner: task_arithmetic")
        if params["scope"] is not None:
            problems.append("scope is for inner: ties; expected no scope; got inner: task_arithmetic")
        return problems

    def scope(self, params: Mapping[str, Any], dialect: str) -> Literal["tensor", "model"]:
        """As TIES in the paper's dialect; a sum measures nothing."""
        return self._ties.scope(params, "paper") if params["inner"] == "ties" else "tensor"

    def start(self, spec: Spec) -> Round | Coeffs:
        """The first round of the inner method."""
        check_factors(spec, "threshold", "lambda")
        if spec.params["inner"] == "ties":
            return self._ties.start(_inner(spec))
        return Coeffs()

    def resolve(self, spec: Spec, round_: Round, stats: Stats, visited: int) -> Round | Coeffs:
        """The next round of the inner method."""
        return self._ties.resolve(_inner(spec), round_, stats, visited)

    def apply(self, spec: Spec, coeffs: Coeffs) -> Program:
        """The inner merge under the consensus of the masks."""
        check_factors(spec, "threshold", "lambda")
        useful = Useful(spec.params["threshold"], self.at_least(spec))
        if spec.params["inner"] == "ties":
            return replace(self._ties.apply(_inner(spec), coeffs), useful=useful)
        ones = (1.0,) * spec.num_models
        return Program(ones, (None,) * spec.num_models, scale=spec.params["lambda"], useful=useful)

    def at_least(self, spec: Spec) -> int:
        """How many tasks must use a coordinate."""
        return min(int(spec.params["at_least"]), spec.num_models + 1)


def _inner(spec: Spec) -> Spec:
    """The spec of TIES in the paper's dialect, adding what agrees."""
    given = spec.params
    params = {p.name: p.default for p in Ties.info.params}
    params |= {
        "weight": (1.0,) * spec.num_models,
        "density": tuple(_TRIM if d is None else d for d in given["density"]),
        "lambda": given["lambda"],
        "scope": given["scope"],
        "normalize": False,
    }
    return replace(spec, dialect="paper", params=params)


class TallMask(Consensus):
    """The multi-task vector whose coordinates TALL masks assign to tasks."""

    info = MethodInfo(
        name="tall_mask",
        purpose="The multi-task vector of TALL masks on the base: with a mask per task it gives any expert back.",
        formula="S = d1 + ... + dT, or their TIES sum; y = x0 + lambda S; the mask of task t is 1 where "
        "|dt| > threshold_t |S - dt|, its expert x0 + S under the mask",
        params=(_THRESHOLD, LAMBDA, *_INNER),
        base="required",
        modifiable=True,
        passes=_PASSES,
        source=_SOURCE,
        dialects={"default": "the authors' code"},
        deviations=(
            *_DEVIATIONS,
            "this is the multi-task vector alone, on which threshold has no effect; the authors give each task its own "
            "expert",
        ),
    )

    def at_least(self, spec: Spec) -> int:
        """Every coordinate stays."""
        return 0
