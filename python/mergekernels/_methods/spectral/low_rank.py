"""low_rank: the best approximations of task vectors by matrices of low rank, added."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..matrix import MatrixSpec, Merged
from ..permatrix import PerMatrix
from ..protocol import MethodInfo, Param
from .common import CONV, EXCLUDE, EXPERTS, LAMBDA, MANY, WEIGHT, nothing, tasks_of

if TYPE_CHECKING:
    from ...adapters.model import Delta

__all__ = ["LowRankSum"]


class LowRankSum(PerMatrix):
    """Delta = sum of the truncated task vectors."""

    info = MethodInfo(
        name="low_rank",
        purpose="Replace each task vector by its best approximation of low rank and add them up; with one model, "
        "truncate its task vector.",
        formula="Delta = sum of w_t trunc(D_t); trunc keeps the `rank` largest singular values, or the least number "
        "whose squares reach the share `energy` of all (with both, the smaller). Tensors that are no matrices: mean",
        params=(
            WEIGHT,
            LAMBDA,
            Param("rank", "int", "singular values that are kept, at least 1", default=None, low=1),
            Param("energy", "float", "share of the squared norm kept, in (0, 1]", default=None, low=0.0, high=1.0),
            EXCLUDE,
            CONV,
            EXPERTS,
        ),
        base="required",
        modifiable=True,
        max_models=MANY,
        tier="T2",
        passes="1 read of the models and the base, 1 write; one dominant subspace per task",
        source="Eckart and Young 1936",
        dialects={"default": "as the formula says"},
        takes=("models",),
    )

    def check(self, params: Any, dialect: str) -> list[str]:
        """One of both is given."""
        if params["rank"] is None and params["energy"] is None:
            return ["neither rank nor energy is given; expected one of them"]
        return ["energy is 0; expected a number in (0, 1]"] if params["energy"] == 0.0 else []

    def fits(self, spec: MatrixSpec) -> list[str]:
        """No rank above the smaller side."""
        rank, q = spec.params["rank"], min(spec.shape)
        return [f"rank is {rank}; expected at most {q}, the smaller side"] if rank is not None and rank > q else []

    def merge(self, spec: MatrixSpec, deltas: Sequence[Delta], state: Any = None) -> Merged:
        """The merged task vector of one matrix."""
        from ...ops import lowrank, stack

        tasks = tasks_of(spec, deltas)
        if not tasks.live:
            return nothing(spec, deltas)
        found = lowrank(list(tasks.live), spec.params["rank"], spec.params["energy"])
        report = {
            "k": [f.factors.rank for f in found],
            "kept_energy": [f.kept_energy for f in found],
            "route": found[0].route,
        }
        result = stack([f.factors for f in found])
        report["rank"] = min(result.rank, *result.shape)
        return Merged(result if result.rank < min(result.shape) else result.dense(), report)
