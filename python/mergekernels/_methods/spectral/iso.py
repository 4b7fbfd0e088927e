"""iso_c and iso_cts: every direction of the summed update at the same strength."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..matrix import MatrixSpec, Merged
from ..permatrix import PerMatrix
from ..protocol import MethodInfo, Param
from .common import (
    CONV,
    COUNT_ZERO,
    DIMS,
    EXCLUDE,
    EXPERTS,
    LAMBDA,
    MANY,
    MEAN_OVER,
    RANK_TOL,
    WEIGHT,
    Tasks,
    core_of,
    cut_of,
    full_svd,
    nothing,
    tasks_of,
)

if TYPE_CHECKING:
    import torch

    from ...adapters.model import Delta

__all__ = ["IsoC", "IsoCts"]


class IsoC(PerMatrix):
    """Delta = mu polar(sum of D_t)."""

    info = MethodInfo(
        name="iso_c",
        purpose="Give every direction of the summed task vectors the same strength (Iso-C).",
        formula="S = D_1 + ... + D_T; Delta = mu polar(S), mu = (sum of the singular values of S) / q, q the smaller "
        "side; polar(S) = U V^T on the support of S. Tensors that are no matrices: the mean, not the sum",
        params=(WEIGHT, LAMBDA, MEAN_OVER, EXCLUDE, CONV, EXPERTS, RANK_TOL),
        base="required",
        modifiable=True,
        max_models=MANY,
        tier="T2",
        passes="1 read of the models and the base, 1 write; one polar factor; adapters: none of their matrices is "
        "multiplied out",
        source="Marczak et al. 2025, No Task Left Behind, arXiv 2502.04959; danielm1405/iso-merging src/utils/iso.py; "
        "fusion_bench method/isotropic_merging",
        dialects={"default": "the authors' rules on the support of the sum"},
        deviations=(
            "directions in which the sum is zero stay zero; the authors lift what LAPACK returns there to mu",
            "tensors of more than two dimensions are flattened; the authors average them: conv: mean",
            "the authors exclude names with text_projection: exclude: '*text_projection*'",
        ),
        takes=("models", "adapters"),
    )

    def merge(self, spec: MatrixSpec, deltas: Sequence[Delta], state: Any = None) -> Merged:
        """The merged task vector of one matrix."""
        tasks = tasks_of(spec, deltas)
        return _flatten(spec, tasks) if tasks.live else nothing(spec, deltas)


def _flatten(spec: MatrixSpec, tasks: Tasks) -> Merged:
    from ...adapters.model import Factors
    from ...ops import polar

    total = tasks.total()
    core = min(*spec.shape, total.rank) if isinstance(total, Factors) else min(spec.shape)
    found = polar(total, spec.params["rank_tol"], nuclear=True)
    over = {"q": min(spec.shape), "rank": found.rank, "core": core}[spec.params["mean_over"]]
    mu = found.nuclear / over if over else 0.0
    p = found.p
    delta = Factors(p.b * mu, p.a) if isinstance(p, Factors) else p * mu
    report = {"rank": found.rank, "mu": mu, "residual": found.residual, "route": found.route}
    return Merged(delta, report)


@dataclass(frozen=True)
class _Split:
    """q = common + tasks * each."""

    q: int
    common: int
    each: int

    @staticmethod
    def of(q: int, fraction: float, tasks: int) -> _Split:
        """Half to even, as Python rounds."""
        n = tasks * round((q - int(q * fraction)) / tasks)
        return _Split(q, q - n, n // tasks)


class IsoCts(PerMatrix):
    """Iso-C, the weakest common directions replaced by directions of the tasks."""

    info = MethodInfo(
        name="iso_cts",
        purpose="Iso-C with the weakest common directions replaced by task-specific ones (Iso-CTS).",
        formula="c0 = int(f q), N = T round((q - c0) / T), c = q - N, k = N / T; U_c, V_c: top c of S = D_1 + ... + "
        "D_T; of each E_t = D_t - U_c U_c^T D_t the top k triplets; Delta = (mean of all q values) polar([U_1 .. U_T "
        "U_c]) polar([V_1 .. V_T V_c])^T. Tensors that are no matrices: mean",
        params=(
            WEIGHT,
            LAMBDA,
            Param("common_space_fraction", "float", "f, share of the common space", default=0.8, low=0.0, high=1.0),
            DIMS,
            MEAN_OVER,
            COUNT_ZERO,
            EXCLUDE,
            CONV,
            EXPERTS,
            RANK_TOL,
        ),
        base="required",
        modifiable=True,
        max_models=MANY,
        tier="T2",
        passes="1 read of the models and the base, 1 write; one decomposition of the sum, one dominant subspace per "
        "task, two polar factors; adapters: in the core of their factors",
        source=IsoC.info.source,
        dialects=IsoC.info.dialects,
        deviations=(
            *IsoC.info.deviations,
            "a fraction that leaves fewer than no common directions is an error; the authors' slices overlap then",
        ),
        takes=("models", "adapters"),
    )

    def fits(self, spec: MatrixSpec) -> list[str]:
        """The common space must not be of negative size."""
        if spec.params["dims"] != "q" or not spec.params["count_zero"]:
            return []
        split = _Split.of(min(spec.shape), spec.params["common_space_fraction"], spec.num_models)
        return _problems(split, spec.num_models)

    def merge(self, spec: MatrixSpec, deltas: Sequence[Delta], state: Any = None) -> Merged:
        """The merged task vector of one matrix."""
        tasks = tasks_of(spec, deltas)
        if not tasks.live:
            return nothing(spec, deltas)
        if spec.params["dims"] == "q":
            split = _Split.of(min(spec.shape), spec.params["common_space_fraction"], tasks.count)
            _refuse(spec, split, tasks.count)
            if split.each == 0:
                merged = _flatten(spec, tasks)
                return Merged(merged.delta, {**merged.report, "common": split.common, "k": 0})
        if tasks.factored and sum(f.rank for f in tasks.factors) < min(spec.shape):
            core = core_of(tasks.factors)
            delta, report = _common_and_specific(spec, core.matrices, tasks.count, min(core.matrices[0].shape))
            warnings = (_COLLAPSED,) if report["k"] and not any(report["k"]) else ()
            return Merged(core.expand(delta), {**report, "route": "core"}, warnings)
        delta, report = _common_and_specific(spec, tasks.dense, tasks.count, min(spec.shape))
        return Merged(delta, {**report, "route": "subspace"})


_COLLAPSED = (
    "the common space holds everything that the tasks change, so this is iso_c; dims = 'rank' takes sizes from the rank"
)


def _problems(split: _Split, tasks: int) -> list[str]:
    if split.common >= 0:
        return []
    return [
        f"the common space has a negative size: {split.q} directions, {tasks} times {split.each} of them for tasks; "
        "expected a larger common_space_fraction or fewer tasks"
    ]


def _refuse(spec: MatrixSpec, split: _Split, tasks: int) -> None:
    """What `fits` could not see: sizes that the data decide."""
    from ...errors import DataError

    for problem in _problems(split, tasks):
        raise DataError(problem, code="spectral.split", tensor=spec.name or None)


def _common_and_specific(
    spec: MatrixSpec, live: Sequence[torch.Tensor], count: int, core: int
) -> tuple[torch.Tensor, Mapping[str, Any]]:
    """Delta from matrices in any orthonormal bases, and the report."""
    import torch

    from ...ops import polar, subspace

    m, n = live[0].shape
    tol = cut_of(spec.params, spec.shape)
    total = live[0]
    for x in live[1:]:
        total = total + x
    u, s, v = full_svd(total, tol)
    rank = len(s)
    split = _Split.of(
        min(spec.shape) if spec.params["dims"] == "q" else rank, spec.params["common_space_fraction"], count
    )
    _refuse(spec, split, count)
    c = min(split.common, rank)
    common = u[:, :c]
    lefts, rights, ks, values = [], [], [], float(s[:c].sum())
    floor = tol * (float(s[0]) if rank else 0.0)
    for delta in live:
        rest = delta - common @ (common.T @ delta)
        # Twice: what one pass leaves of a large common part is of the size of the rounding of that part.
        rest = rest - common @ (common.T @ rest)
        # More than are needed: where the spectrum is flat, a few of its head converge much later than an eighth of it.
        asked = min(max(split.each, min(m, n) // 8), m, n)
        found = subspace(rest, asked, side="right" if m >= n else "left", accuracy="subspace")
        sigma = found.ritz.sqrt()
        k = min(split.each, int((sigma > max(tol * float(sigma[0]) if len(sigma) else 0.0, floor)).sum()))
        basis = found.basis[:, :k]
        image = (rest @ basis if m >= n else rest.T @ basis) / sigma[:k].to(rest)
        lefts.append(image if m >= n else basis)
        rights.append(basis if m >= n else image)
        values += float(sigma[:k].sum())
        ks.append(k)
    size = {"q": min(spec.shape), "rank": c + sum(ks), "core": core}[spec.params["mean_over"]]
    mu = values / size if size else 0.0
    report: dict[str, Any] = {"common": c, "k": ks, "mu": mu, "rank": c + sum(ks)}
    if c + sum(ks) == 0:
        return torch.zeros_like(total), report
    # The tasks' left vectors are orthogonal to the common ones already; the right ones are not.
    tol_polar = spec.params["rank_tol"]
    right = polar(torch.cat([*rights, v[:, :c]], 1), tol_polar)
    specific = polar(torch.cat(lefts, 1), tol_polar).p if sum(ks) else common[:, :0]
    left = torch.cat([specific, common], 1)
    report["residual"] = right.residual
    return (left * mu) @ right.p.T, report
