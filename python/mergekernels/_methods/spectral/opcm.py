"""opcm: a stream of models, each new task vector without what overlaps the merge so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import fsum, sqrt
from typing import TYPE_CHECKING, Any, Literal

from ..matrix import MatrixSpec, Merged
from ..permatrix import PerMatrix
from ..protocol import MethodInfo, Param
from .common import (
    CONV,
    EXCLUDE,
    EXPERTS,
    LAMBDA,
    MANY,
    RANK_TOL,
    core_of,
    cut_of,
    full_svd,
    nothing,
    tasks_of,
)

if TYPE_CHECKING:
    import torch

    from ...adapters.model import Delta

__all__ = ["Opcm", "Stream", "project_away"]


@dataclass(frozen=True)
class Stream:
    """What couples the matrices of a model: the factor from the sum of the projected task vectors to the merge.

    norms : of the task vectors over the whole model, in order. total : of the sum.
    """

    norms: tuple[float, ...]
    total: float

    @property
    def average(self) -> float:
        """Mean norm of the task vectors, which the merge gets."""
        return fsum(self.norms) / len(self.norms)

    @property
    def factor(self) -> float:
        """Average / total; 0 where everything is zero."""
        return self.average / self.total if self.total else 0.0


class Opcm(PerMatrix):
    """W_t = W_0 + (lambda (W_(t-1) - W_0) + projected D_t), scaled to the mean norm of the task vectors."""

    info = MethodInfo(
        name="opcm",
        purpose="Merge models one after the other: remove from each new task vector what overlaps the merge so far, "
        "then give the merge the mean norm of the task vectors (OPCM). The order of the models counts.",
        formula="X = U S V^T the merge so far, k = first index with cumsum(S) / sum(S) > alpha, counted from 0; P = "
        "U^T D_t V without its diagonal and its block [:k, :k]; X <- (lambda X + U P V^T) nbar / nu, lambda = nu / "
        "nbar; nu the norm of the new delta and nbar the mean norm of the task vectors so far, over the whole model. "
        "Tensors that are no matrices: lambda X + D_t",
        params=(
            LAMBDA,
            Param("alpha", "float", "share of singular values whose block is removed", default=0.5, low=0.0, high=1.0),
            Param(
                EXCLUDE.name,
                "str",
                "patterns of tensor names, separated by commas, that are added without projection",
                default="*embed*,*.wte.*,*.wpe.*",
            ),
            Param(
                CONV.name,
                "str",
                "tensors of more than two dimensions: flattened to (dim 0, rest), or added without projection",
                default="mean",
                choices=CONV.choices,
            ),
            EXPERTS,
            RANK_TOL,
        ),
        base="required",
        max_models=MANY,
        tier="T2",
        passes="2 reads of the models and the base (norms over the whole model, then the merge), 1 write; in each read "
        "one symmetric decomposition per matrix and model",
        source="Tang et al. 2025, Merging Models on the Fly Without Retraining, arXiv 2501.09522; tanganke/opcm; "
        "fusion_bench method/opcm",
        dialects={"default": "the authors' rules; the order is that of the models, never shuffled"},
        deviations=(
            "directions in which the merge so far is zero are not removed; the authors remove LAPACK's choice of them",
            "parameters of modules that contain others (a class embedding) are merged like all; the authors keep the "
            "first model's",
            "embeddings are known by their names (exclude), since a checkpoint has no module classes",
        ),
        takes=("models", "adapters"),
    )

    def scope(self, params: Mapping[str, Any], dialect: str) -> Literal["tensor", "model"]:
        """Norms are taken over the model."""
        return "model"

    def measure(self, spec: MatrixSpec, deltas: Sequence[Delta], state: Any = None) -> tuple[float, ...]:
        """Squared norms: of the sum of the projected task vectors, then of each task vector."""
        total = self._plain(spec, deltas) if spec.plain else self._projected(spec, deltas)
        return (square_norm(total.delta), *(square_norm(d) for d in deltas))

    def resolve(self, params: Mapping[str, Any], measured: Mapping[str, Any], state: Any = None) -> Stream:
        """The norms over the model."""
        rows = list(measured.values())
        sums = [fsum(row[i] for row in rows) for i in range(len(rows[0]))] if rows else [0.0, 0.0]
        return Stream(tuple(sqrt(x) for x in sums[1:]), sqrt(sums[0]))

    def merge(self, spec: MatrixSpec, deltas: Sequence[Delta], state: Any = None) -> Merged:
        """The merged task vector of one matrix."""
        return _scaled(self._projected(spec, deltas), state)

    def merge_plain(self, spec: MatrixSpec, deltas: Sequence[Delta], state: Any = None) -> Merged:
        """The scaled sum of the task vectors of a tensor that is no matrix."""
        return _scaled(self._plain(spec, deltas), state)

    def _plain(self, spec: MatrixSpec, deltas: Sequence[Delta]) -> Merged:
        tasks = tasks_of(spec, deltas)
        if not tasks.live:
            return nothing(spec, deltas)
        return Merged(tasks.total(), {"route": "sum"})

    def _projected(self, spec: MatrixSpec, deltas: Sequence[Delta]) -> Merged:
        """The sum of the projected task vectors: the merge before its scale, which no projection depends on."""
        tasks = tasks_of(spec, deltas)
        if not tasks.live:
            return nothing(spec, deltas)
        tol, alpha = cut_of(spec.params, spec.shape), spec.params["alpha"]
        if tasks.factored and sum(f.rank for f in tasks.factors) < min(spec.shape):
            core = core_of(tasks.factors)
            total, ks = _stream(core.matrices, alpha, tol)
            return Merged(core.expand(total), {"k": ks, "rank": min(total.shape), "route": "core"})
        total, ks = _stream(tasks.dense, alpha, tol)
        return Merged(total, {"k": ks, "route": "gram"})


def _scaled(merged: Merged, state: Any) -> Merged:
    from ...adapters.model import Factors

    if state is None:
        return merged
    factor, delta = state.factor, merged.delta
    delta = Factors(delta.b * factor, delta.a) if isinstance(delta, Factors) else delta * factor
    report = {**merged.report, "norm": state.average, "lambda_t": 1.0 / factor if factor else 1.0}
    return Merged(delta, report, merged.warnings)


def _stream(tasks: Sequence[torch.Tensor], alpha: float, tol: float) -> tuple[torch.Tensor, list[int]]:
    total, ks = tasks[0], []
    for task in tasks[1:]:
        projected, k = project_away(total, task, alpha, tol)
        total = total + projected
        ks.append(k)
    return total, ks


def project_away(merged: torch.Tensor, task: torch.Tensor, alpha: float, tol: float) -> tuple[torch.Tensor, int]:
    """The task vector without its overlap with the merge so far, and k.

    merged, task : (m, n), any scale of `merged`. alpha : share of its singular values. tol : relative cut on them.
    """
    import torch

    u, s, v = full_svd(merged, tol)
    if not len(s):
        return task, 0
    sums = torch.cumsum(s, 0)
    above = sums / sums[-1] > alpha  # with alpha = 1 never, whatever the rounding
    k = int(above.to(torch.int8).argmax()) if bool(above.any()) else 0
    image = task @ v
    overlap = torch.diag((u * image).sum(0))
    overlap[:k, :k] = u[:, :k].T @ image[:, :k]
    return task - (u @ overlap) @ v.T, k


def square_norm(delta: Delta) -> float:
    """The squared Frobenius norm in float64."""
    import torch

    from ...adapters.model import Factors

    if isinstance(delta, Factors):
        b, a = delta.b.to(torch.float64), delta.a.to(torch.float64)
        return float(((b.T @ b) * (a @ a.T)).sum().clamp_min(0.0))
    return float(torch.linalg.vector_norm(delta, dtype=torch.float64)) ** 2
