"""lore (LoRE-Merging): a virtual base and low-rank deviations from it, by nuclear norm minimisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from ...errors import MergeError
from ..adapters.common import FOLD_SCALE, LAMBDA
from ..factor_space import Core, all_factors, core_of
from ..inner import Inner, inner_params, run_inner
from ..inner_scope import Coordinates, resolve_alone, write
from ..matrix import MatrixSpec, Merged
from ..permatrix import PerMatrix
from ..protocol import MethodInfo, Param
from .common import CONV, EXCLUDE, EXPERTS

if TYPE_CHECKING:
    import torch

    from ...adapters.model import Delta, Factors

__all__ = ["Lore"]

_STOP = 1e-6


class Lore(PerMatrix):
    """Delta = theta_0 + tau_scale * (mean or TIES of the deviations)."""

    info = MethodInfo(
        name="lore",
        purpose="Find a virtual base and low-rank deviations from it, and put the deviations' mean or TIES merge on "
        "that base (LoRE-Merging). The base model itself plays no part in the result.",
        formula="minimise sum of |D0 + dt - Dt|_F^2 + mu penalty(dt): D0 = mean(Dt - dt), dt = the proximal map of "
        "Dt - D0, in turn; plain: U (S - mu)_+ V^T, the proximal map of 2 mu |dt|_*; squared: that of mu |dt|_*^2; "
        "Delta = D0 + tau_scale tau, tau = the mean of the dt or their TIES merge",
        params=(
            Param("mu", "float", "threshold of the singular values of the deviations", default=0.01, low=0.0),
            Param("iterations", "int", "sweeps at most", default=20, low=1, high=100000),
            Param(
                "prox",
                "str",
                "penalty: the nuclear norm with a fixed threshold (plain), or its square (squared)",
                default="plain",
                choices=("plain", "squared"),
            ),
            Param("tau", "str", "how the deviations are merged", default="mean", choices=("mean", "ties")),
            Param(
                "tau_scale",
                "float",
                "scale of the merged deviations on the virtual base; with tau mean, 1 gives the plain average once the "
                "sweeps have converged",
                default=1.0,
            ),
            LAMBDA,
            EXCLUDE,
            CONV,
            EXPERTS,
            FOLD_SCALE,
            *inner_params(("ties",)),
        ),
        base="optional",
        passes="dense: one soft threshold per model and sweep; factors: 2 QR decompositions, then one SVD of the size "
        "of the sum of ranks per model and sweep",
        source="Liu et al. 2025, LoRE-Merging, arXiv 2502.10749 (objective and loop); no code by the authors is known",
        max_models=64,
        tier="T2",
        takes=("models", "adapters"),
        dialects={"default": "sweeps stop at a relative change of 1e-6 or after `iterations`"},
        deviations=(
            "the paper's mu, sweeps and scale are not public: the defaults are those of other implementations",
            "the loop's fixed threshold belongs to the plain nuclear norm, the stated objective has its square: prox "
            "chooses",
            "deviations that ties merges keep all entries unless density says otherwise, votes per matrix",
        ),
    )

    def check(self, params: Mapping[str, Any], dialect: str) -> list[str]:
        """Parameters of ties need tau ties."""
        if params["tau"] == "mean":
            given = [p.name for p in inner_params(("ties",)) if _given(params[p.name])]
            return [f"'{name}' is a parameter of tau ties; got tau mean" for name in given]
        try:
            _ties(params, len(params["density"]))
        except MergeError as error:
            return [str(error)]
        return []

    def scope(self, params: Mapping[str, Any], dialect: str) -> Literal["tensor", "model"]:
        """One module at a time."""
        return "tensor"

    def merge(self, spec: MatrixSpec, deltas: Sequence[Delta], state: Any = None) -> Merged:
        """The virtual base and the merged deviations on it."""
        deltas = list(deltas)
        factors = all_factors(deltas)
        warnings: tuple[str, ...] = ()
        if spec.params["tau"] == "mean" and spec.params["tau_scale"] == 1.0:
            warnings = (
                "lore with tau mean and tau_scale 1 converges to the plain average of the models: choose another "
                "tau_scale, or tau ties",
            )
        delta, report = _dense(spec, deltas) if factors is None else _factored(spec, factors)
        return Merged(delta, report, warnings)


def _given(value: Any) -> bool:
    return any(v is not None for v in value) if isinstance(value, tuple) else value is not None


def _ties(params: Mapping[str, Any], num_models: int) -> Inner:
    defaults = {"density": 1.0}
    return Inner.of("ties", params, (1.0,) * num_models, "tensor", defaults)


class _Change:
    """How far the deviations moved in a sweep, beside their size."""

    def __init__(self) -> None:
        self.moved = self.size = 0.0

    def add(self, new: torch.Tensor, old: torch.Tensor | None) -> None:
        """One model's deviation."""
        from ...ops.spectral.gram import inner

        self.size += inner(new, new)
        moved = new if old is None else new - old
        self.moved += inner(moved, moved)

    @property
    def small(self) -> bool:
        """Whether the sweeps have converged."""
        return self.moved <= _STOP**2 * self.size

    @property
    def ratio(self) -> float:
        """The relative change."""
        return float((self.moved / self.size) ** 0.5) if self.size else 0.0


def _sweeps(
    matrices: Sequence[torch.Tensor], spec: MatrixSpec, shrink: Any
) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """The deviations, and a report. matrices : D_t minus their mean, so that D0 is minus the mean of the deviations.

    shrink : model, matrix -> (its proximal map, rank).
    """
    deviations: list[torch.Tensor] = []
    report: dict[str, Any] = {}
    for sweep in range(1, spec.params["iterations"] + 1):
        # The mean of the matrices is zero: D0 = -mean(d).
        mean = _mean(deviations) if deviations else None
        change, ranks, after = _Change(), [], []
        for t, x in enumerate(matrices):
            new, rank = shrink(t, x if mean is None else x + mean)
            change.add(new, deviations[t] if deviations else None)
            after.append(new)
            ranks.append(rank)
        deviations = after
        report = {"iterations": sweep, "change": change.ratio, "ranks": ranks}
        if change.small:
            break
    return deviations, report


def _mean(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    total = tensors[0].clone()
    for x in tensors[1:]:
        total += x
    return total / len(tensors)


def _dense(spec: MatrixSpec, deltas: Sequence[Delta]) -> tuple[Delta, dict[str, Any]]:
    """On matrices of full size."""
    from ...adapters.model import Factors
    from ...ops import soft_threshold

    matrices = [d.dense() if isinstance(d, Factors) else d for d in deltas]
    centre = _mean(matrices)
    mu, kind = spec.params["mu"], spec.params["prox"]

    warm: list[torch.Tensor | None] = [None] * len(matrices)

    def shrink(t: int, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        found = soft_threshold(x, mu, kind, warm=warm[t])
        warm[t] = found.basis  # sweeps change little
        return found.y, found.rank

    deviations, report = _sweeps([x - centre for x in matrices], spec, shrink)
    virtual = centre - _mean(deviations)
    if spec.params["tau"] == "mean":
        tau = _mean(deviations)
    else:
        tau = run_inner(_ties(spec.params, spec.num_models), deviations, spec.name, spec.seed)
    return virtual + tau * spec.params["tau_scale"], report


def _factored(spec: MatrixSpec, factors: Sequence[Factors]) -> tuple[Delta, dict[str, Any]]:
    """In the core of the factors: every matrix of the loop lies in their common bases."""
    from ...ops import small_svd
    from ...ops.spectral.shrink import threshold

    core = core_of(factors)
    tasks = core.tasks()
    if tasks[0].numel() == 0:
        return core.expand(tasks[0]), {"iterations": 0, "change": 0.0, "ranks": [0] * len(tasks)}
    mu, kind = spec.params["mu"], spec.params["prox"]

    def shrink(_: int, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        svd = small_svd(x)
        left = (svd.s - threshold(svd.s, mu, kind)).clamp_min(0)
        rank = int((left > 0).sum())
        return (svd.u[:, :rank] * left[:rank]) @ svd.vh[:rank], rank

    centre = _mean(tasks)
    deviations, report = _sweeps([x - centre for x in tasks], spec, shrink)
    mean = _mean(deviations)
    scale = spec.params["tau_scale"]
    if spec.params["tau"] == "mean":
        return core.expand(centre - mean + mean * scale), report
    tau = _elementwise(spec, core, deviations)
    return core.expand(centre - mean).dense() + tau * scale, report


def _elementwise(spec: MatrixSpec, core: Core, deviations: Sequence[torch.Tensor]) -> torch.Tensor:
    """TIES of the deviations as full matrices, generated by rows."""
    products = [core.expand(d) for d in deviations]
    dtype = products[0].b.dtype
    rows = Coordinates(
        spec.name,
        (int(core.u.shape[0]), int(core.v.shape[1])),
        spec.num_models,
        dtype.itemsize,
        lambda first, last: [p.b[first:last] @ p.a for p in products],
    )
    inner = _ties(spec.params, spec.num_models)
    compute = "F64" if str(dtype) == "torch.float64" else "F32"
    return write(inner, resolve_alone(inner, rows, compute, spec.seed), rows)
