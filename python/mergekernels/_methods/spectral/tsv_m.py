"""tsv_m: each task's leading singular triplets, made orthogonal between the tasks, re-added."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from ...errors import DataError
from ..matrix import MatrixSpec, Merged
from ..permatrix import PerMatrix
from ..protocol import MethodInfo
from .common import (
    CONV,
    COUNT_ZERO,
    DIMS,
    EXCLUDE,
    EXPERTS,
    LAMBDA,
    MANY,
    RANK_TOL,
    WEIGHT,
    Tasks,
    cut_of,
    nothing,
    tasks_of,
)

if TYPE_CHECKING:
    import torch

    from ...adapters.model import Delta

__all__ = ["TsvM"]


class TsvM(PerMatrix):
    """Delta = polar(U_cat) diag(S_cat) polar(V_cat)."""

    info = MethodInfo(
        name="tsv_m",
        purpose="Keep each task's leading singular triplets, make the tasks' singular vectors orthogonal to each other "
        "and add them up (TSV-Merge).",
        formula="k = floor(q / T); U_cat = [U_1[:, :k] .. U_T[:, :k]], S_cat and V_cat likewise; Delta = polar(U_cat) "
        "diag(S_cat) polar(V_cat)^T; q is the smaller side, polar(X) the orthogonal factor on the support of X. "
        "Tensors that are no matrices: mean",
        params=(WEIGHT, LAMBDA, DIMS, COUNT_ZERO, EXCLUDE, CONV, EXPERTS, RANK_TOL),
        base="required",
        modifiable=True,
        max_models=MANY,
        tier="T2",
        passes="1 read of the models and the base, 1 write; one dominant subspace per task and two polar factors, no "
        "singular value decomposition; adapters: none of their matrices is multiplied out",
        source="Gargiulo et al. 2025, Task Singular Vectors, arXiv 2412.00081; AntoAndGar/task_singular_vectors "
        "src/utils/TSVM_utils.py; fusion_bench method/task_singular_vector",
        dialects={"default": "the authors' rules on the support of each task vector"},
        deviations=(
            "a task of lower rank than k has as many triplets as its rank; the authors add what LAPACK returns for "
            "singular values of zero",
            "tensors of more than two dimensions are flattened; the authors average them: conv: mean",
            "the authors exclude names with text_projection: exclude: '*text_projection*'",
            "more tasks than the smaller side is an error; the authors' result is then zero",
        ),
        takes=("models", "adapters"),
    )

    def fits(self, spec: MatrixSpec) -> list[str]:
        """Every task needs a direction."""
        q = min(spec.shape)
        if spec.params["dims"] == "q" and spec.params["count_zero"] and q < spec.num_models:
            return [f"k = floor(q / T) is 0; expected q, the smaller side, of at least {spec.num_models}; got {q}"]
        return []

    def merge(self, spec: MatrixSpec, deltas: Sequence[Delta], state: Any = None) -> Merged:
        """The merged task vector of one matrix."""
        tasks = tasks_of(spec, deltas)
        if not tasks.live:
            return nothing(spec, deltas)
        if tasks.count == 1:
            # All triplets of one task, orthogonal already.
            return Merged(tasks.live[0], {"k": [min(spec.shape)], "route": "one task"})
        if tasks.factored:
            return _factored(spec, tasks)
        return _dense(spec, tasks)


def _size(spec: MatrixSpec, tasks: Tasks, rank: int) -> int:
    """K of a task."""
    if spec.params["dims"] == "q":
        q = min(spec.shape)
        if q < tasks.count:
            raise DataError(
                "k = floor(q / T) is 0",
                code="spectral.rank",
                tensor=spec.name or None,
                expected=f"a smaller side of at least {tasks.count}",
                got=str(q),
            )
        return min(q // tasks.count, rank)
    if rank < tasks.count:
        raise DataError(
            "k = floor(rank / T) is 0",
            code="spectral.rank",
            tensor=spec.name or None,
            expected=f"task vectors of rank {tasks.count} or more",
            got=str(rank),
            hint="dims = 'q' takes sizes from the matrix instead.",
        )
    return rank // tasks.count


def _dense(spec: MatrixSpec, tasks: Tasks) -> Merged:
    """Any bases of the dominant subspaces will do: a rotation inside a task's block of U_cat and V_cat cancels."""
    import torch

    from ...ops import subspace

    m, n = spec.shape
    tol = cut_of(spec.params, spec.shape)
    side: Literal["right", "left"] = "right" if m >= n else "left"
    lefts, rights, cores, ks, residual, gaps = [], [], [], [], 0.0, []
    live = tasks.dense
    limit = min(m, n) if spec.params["dims"] == "rank" else min(m, n) // tasks.count
    for delta in live:
        found = subspace(delta, limit, side=side, accuracy="subspace")
        sigma = found.ritz.sqrt()
        k = _size(spec, tasks, int((sigma > tol * sigma[:1]).sum()))
        basis = found.basis[:, :k]
        image = delta @ basis if side == "right" else delta.T @ basis
        # Ritz vectors have orthogonal images: the triangle is near diag(sigma) and well conditioned once scaled.
        scale = torch.linalg.vector_norm(image, dim=0, dtype=torch.float64)
        unit = (image / scale.to(image.dtype)).to(torch.float64)
        triangle = torch.linalg.cholesky(unit.T @ unit, upper=True)
        other = torch.linalg.solve_triangular(triangle, unit, upper=True, left=False).to(delta.dtype)
        core = (triangle * scale).to(delta.dtype)
        lefts.append(other if side == "right" else basis)
        rights.append(basis if side == "right" else other)
        cores.append(core if side == "right" else core.T)
        ks.append(k)
        residual = max(residual, found.residual)
        gaps.append(found.gap if k == len(found.ritz) else float(sigma[k] / sigma[k - 1]))
    left, right, report = _orthogonal(spec, lefts, rights)
    blocks = torch.cat([p @ c for p, c in zip(torch.split(left, ks, 1), cores, strict=True)], 1)
    report |= {"k": ks, "residual": residual, "gap": max(gaps), "route": "subspace"}
    return Merged(blocks @ right.T, report)


def _factored(spec: MatrixSpec, tasks: Tasks) -> Merged:
    """Triplets from the factors of each task; the result has rank sum of k."""
    import torch

    from ...adapters.model import Factors
    from ...ops import balance, small_svd, tall_qr

    found_in_grams = _from_grams(spec, tasks)
    if found_in_grams is not None:
        return found_in_grams
    tol = cut_of(spec.params, spec.shape)
    pairs = [balance(f.b, f.a) for f in tasks.factors]
    thin = tall_qr([x for b, a in pairs for x in (b, a.T.contiguous())])
    found = small_svd([left.r @ right.r.T for left, right in zip(thin[::2], thin[1::2], strict=True)], tol)
    lefts, rights, values, ks = [], [], [], []
    for left, right, core in zip(thin[::2], thin[1::2], found, strict=True):
        k = _size(spec, tasks, core.rank)
        lefts.append(left.q @ core.u[:, :k].to(left.q.dtype))
        rights.append(right.q @ core.vh[:k].T.to(right.q.dtype))
        values.append(core.s[:k])
        ks.append(k)
    left, right, report = _orthogonal(spec, lefts, rights)
    report |= {"k": ks, "route": "factors"}
    return Merged(Factors(left * torch.cat(values).to(left.dtype), right.T.contiguous()), report)


INDEPENDENT = 300.0
"""Condition of the stacked factors up to which the Gram of the tasks' vectors is known to 1e-6 of its least value."""


def _from_grams(spec: MatrixSpec, tasks: Tasks) -> Merged | None:
    """All of it in the size of the sum of ranks, from one Gram of each side; None where these do not allow it."""
    import torch

    from ...adapters.model import Factors
    from ...ops import small_svd, stack
    from ...ops.spectral.factor_sides import both_sides, triangles

    tol = spec.params["rank_tol"]
    sides = both_sides(stack(tasks.factors)) if tol is None or tol >= 1e-6 else None
    if sides is None or max(side.condition for side in sides) > INDEPENDENT:
        return None
    ranks = [f.rank for f in tasks.factors]
    b, a = (triangles(side.gram, ranks) for side in sides)
    weights = (sides[0].scale * sides[1].scale).split(ranks)  # type: ignore[no-untyped-call]
    cores = [(left * w) @ right.mT for left, w, right in zip(b, weights, a, strict=True)]
    found = small_svd(cores, cut_of(spec.params, spec.shape))
    ks = [_size(spec, tasks, core.rank) for core in found]
    # The tasks' singular vectors are sides[0].x @ lefts and sides[1].x @ rights, up to the scales of the sides.
    lefts, rights = torch.zeros(2, sum(ranks), sum(ks), dtype=torch.float64)
    row = column = 0
    for left, right, core, k in zip(b, a, found, ks, strict=True):
        at = slice(row, row + left.shape[0]), slice(column, column + k)
        lefts[at] = torch.linalg.solve_triangular(left, core.u[:, :k], upper=True)
        rights[at] = torch.linalg.solve_triangular(right, core.vh[:k].mT, upper=True)
        row, column = at[0].stop, at[1].stop
    turned = []
    for side, vectors in zip(sides, (lefts, rights), strict=True):
        squares, turn = torch.linalg.eigh(vectors.mT @ (side.gram @ vectors))
        turned.append(vectors @ ((turn * squares.rsqrt()) @ turn.mT))
    values = torch.cat([core.s[:k] for core, k in zip(found, ks, strict=True)])
    report = {"rank": sum(ks), "polar": "core", "k": ks, "route": "factors"}
    return Merged(Factors(sides[0].times(turned[0] * values), sides[1].rows(turned[1])), report)


def _orthogonal(
    spec: MatrixSpec, lefts: list[torch.Tensor], rights: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """polar(U_cat), polar(V_cat), and what the report says of them."""
    import torch

    from ...ops import polar

    tol = spec.params["rank_tol"]
    left, right = polar([torch.cat(lefts, 1), torch.cat(rights, 1)], tol)
    return left.p, right.p, {"rank": min(left.rank, right.rank), "polar": left.route}
