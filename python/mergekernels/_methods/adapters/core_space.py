"""core_space: adapters merged in the small coordinates that all of them share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ...errors import MergeError
from ..factor_space import Core, all_factors, core_of, weighted
from ..inner import ELEMENTWISE, Inner, inner_params, run_inner
from ..matrix import MatrixSpec, Merged, Wants
from ..permatrix import PerMatrix
from ..protocol import MethodInfo, Param
from .common import FOLD_SCALE, LAMBDA, MANY, WEIGHT
from .sums import weighted_sum

if TYPE_CHECKING:
    import torch

    from ...adapters.model import Delta, Factors

__all__ = ["CoreSpace"]

_INNER = (*ELEMENTWISE, "tsv_m", "iso_c")
_SUMS = ("task_arithmetic",)
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "ties": {"density": 0.1},
    "dare_linear": {"density": 0.7},
    "dare_ties": {"density": 0.7, "trim": 1.0},
}
_GAP = 1e-6


class CoreSpace(PerMatrix):
    """Delta = U M V with M the inner method's merge of the cores M_t, where B_t A_t = U M_t V."""

    info = MethodInfo(
        name="core_space",
        purpose="Merge adapters by any method in the common coordinates of their factors, which lose nothing and are "
        "as small as the sum of the ranks.",
        formula="U an orthonormal basis of [B1 .. BT] (left singular vectors), V of the stacked A1 .. AT (right ones); "
        "Mt = (U^T Bt)(At V^T); M = inner(M1 .. MT); Delta = U M V; with flatten, M = mean(sigma) polar(M)",
        params=(
            Param("inner", "str", "what merges the cores", choices=_INNER),
            WEIGHT,
            LAMBDA,
            Param(
                "flatten",
                "bool",
                "give every direction of the merged core the same strength (Iso-C after the inner method)",
                default=False,
            ),
            Param(
                "mean_over",
                "str",
                "flatten and iso_c: that strength is the sum of the singular values over the dimension of the core, "
                "their number (rank), or the smaller side of the weight (q)",
                default="core",
                choices=("core", "rank", "q"),
            ),
            Param(
                "dims",
                "str",
                "tsv_m: directions per task are a T-th of the dimension of the core, of the rank, or of the smaller "
                "side of the weight (q)",
                default="core",
                choices=("core", "rank", "q"),
            ),
            Param(
                "rank_tol",
                "float",
                "flatten and iso_c: a direction is there if its singular value is above this share of the largest; "
                "0 counts all. Default: dimension of the core times 1.2e-7, at most 1e-5",
                default=None,
                low=0.0,
                high=0.999,
            ),
            FOLD_SCALE,
            *inner_params(ELEMENTWISE),
        ),
        base="required",
        modifiable=True,
        passes="2 QR decompositions of the stacked factors per module, the inner method on T matrices of the sum of "
        "ranks squared, 1 write; task_arithmetic without flatten decomposes nothing",
        source="Panariello et al. 2025, Accurate and efficient low-rank model merging in core space; "
        "apanariello4/core-space-merging task_merger.py",
        max_models=MANY,
        tier="T2",
        takes=("adapters",),
        dialects={
            "default": "each adapter's scale is part of its factors",
            "code": "the authors' code: alpha / r is ignored (fold_scale false)",
        },
        deviations=(
            "thresholds of ties count at most 64 adapters, as every element-wise method here; sums, tsv_m and iso_c "
            "have no limit",
            "ties keeps 10 % of each core and dare 70 % unless density says otherwise, as the authors' settings; "
            "dare_ties trims nothing unless trim says so",
            "directions that no adapter has get no strength from flatten",
        ),
    )

    def check(self, params: Mapping[str, Any], dialect: str) -> list[str]:
        """The inner method must take its parameters, and every adapter."""
        name, weights = params["inner"], params["weight"]
        if name not in ELEMENTWISE:
            given = [p.name for p in inner_params(ELEMENTWISE) if _given(params[p.name])]
            return [f"inner method {name} has no parameter '{p}'" for p in given]
        try:
            Inner.of(name, params, weights, "tensor", _DEFAULTS.get(name, {}))
        except MergeError as error:
            return [str(error)]
        if len(weights) > 64 and not self._is_sum(params):
            return [f"inner method {name} merges at most 64 adapters; got {len(weights)}"]
        return []

    def wants(self, params: Mapping[str, Any], dialect: str) -> Wants:
        """Truncation where it is asked for only: a dense sum is exact as it is."""
        return Wants(rank="exact")

    def merge(self, spec: MatrixSpec, deltas: Sequence[Delta], state: Any = None) -> Merged:
        """The inner method in the core, and back."""
        if self._is_sum(spec.params) and not spec.params["flatten"]:
            # The cores add up to the core of the sum: nothing needs decomposing.
            delta, route = weighted_sum(deltas, _sum_weights(spec.params), spec.shape)
            return Merged(delta, {"route": route or "sum"})
        factors = all_factors(deltas)
        assert factors is not None
        name, params = spec.params["inner"], spec.params
        if name in ELEMENTWISE and not self._is_sum(params):
            return self._elementwise(spec, factors)
        factors = weighted(factors, _sum_weights(params) if self._is_sum(params) else params["weight"])
        core = core_of(factors)
        report: dict[str, Any] = {"core": core.shape}
        if name == "tsv_m":
            merged = self._tsv(spec, factors, core)
        else:
            tasks = core.tasks()
            merged = sum(tasks[1:], tasks[0])
            if name == "iso_c" and not params["flatten"]:
                merged, rank = _flattened(merged, spec)
                report["rank"] = rank
        return self._finish(spec, core, merged, report)

    @staticmethod
    def _is_sum(params: Mapping[str, Any]) -> bool:
        """Whether the result is a weighted sum, for which any basis will do."""
        return params["inner"] in _SUMS

    def _elementwise(self, spec: MatrixSpec, factors: Sequence[Factors]) -> Merged:
        """Thresholds, masks and votes entry by entry: these need the singular bases."""
        params = spec.params
        name = params["inner"]
        core = core_of(factors, singular=True)
        inner = Inner.of(name, params, params["weight"], "tensor", _DEFAULTS.get(name, {}))
        merged = run_inner(inner, core.tasks(), spec.name, spec.seed)
        warnings: tuple[str, ...] = ()
        if core.gap < _GAP:
            warnings = (
                f"{spec.name}: two singular values of the stacked factors differ by {core.gap:.1e} of the largest, so "
                f"their directions, and with them what {name} keeps, are arbitrary",
            )
        return self._finish(spec, core, merged, {"core": core.shape, "gap": core.gap, "inner": inner.text}, warnings)

    def _tsv(self, spec: MatrixSpec, factors: Sequence[Factors], core: Core) -> torch.Tensor:
        """TSV-M, on the cores as if they were the task vectors, or with the sizes of the whole matrix."""
        from ..arguments import bind_matrix
        from ..matrix_table import get_matrix

        method = get_matrix("tsv_m", "models")
        if min(core.shape) == 0:
            return core.tasks()[0]
        dims = spec.params["dims"]
        bound = bind_matrix(method, {} if dims == "core" else {"dims": dims}, len(factors), "default", spec.name)
        if dims == "core":
            inside = replace(spec, shape=core.shape, params=bound, dialect="default")
            return _dense(method.merge(inside, core.tasks()).delta)
        merged = method.merge(replace(spec, params=bound, dialect="default"), list(factors)).delta
        return core.u.mT.double() @ _dense(merged).double() @ core.v.mT.double()

    def _finish(
        self,
        spec: MatrixSpec,
        core: Core,
        merged: torch.Tensor,
        report: Mapping[str, Any],
        warnings: tuple[str, ...] = (),
    ) -> Merged:
        """Flattened if asked for, and in factors again."""
        report = dict(report)
        if spec.params["flatten"]:
            merged, report["rank"] = _flattened(merged, spec)
        return Merged(core.expand(merged), report, warnings)


def _sum_weights(params: Mapping[str, Any]) -> tuple[float, ...]:
    """Of task_arithmetic: divided by their sum where it is asked to normalize."""
    weights: tuple[float, ...] = params["weight"]
    total = sum(weights)
    if not params["normalize"] or abs(total) < 1e-8:
        return weights
    return tuple(w / total for w in weights)


def _flattened(core: torch.Tensor, spec: MatrixSpec) -> tuple[torch.Tensor, int]:
    """(mean singular value times the polar factor, rank)."""
    from ...ops import small_svd

    if core.numel() == 0:
        return core, 0
    svd = small_svd(core, tol=spec.params["rank_tol"])
    k = svd.rank
    counts = {"core": min(core.shape), "rank": max(1, k), "q": min(spec.shape)}
    strength = float(svd.s[:k].sum()) / counts[spec.params["mean_over"]]
    return strength * (svd.u[:, :k] @ svd.vh[:k]), k


def _dense(delta: Delta) -> torch.Tensor:
    from ...adapters.model import Factors

    return delta.dense() if isinstance(delta, Factors) else delta


def _given(value: Any) -> bool:
    return any(v is not None for v in value) if isinstance(value, tuple) else value is not None
