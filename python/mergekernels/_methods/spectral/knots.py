"""knots (KnOTS): one shared left basis for all updates, their right parts merged by another method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, cast

from ...errors import MergeError
from ..adapters.common import FOLD_SCALE, LAMBDA, MANY, WEIGHT
from ..factor_space import all_factors, weighted
from ..inner import Inner, inner_params
from ..inner_scope import Coordinates, Passing, Place, Resolved, advance, begin, measure_pass, resolve_alone, write
from ..matrix import MatrixSpec, Merged
from ..protocol import MethodInfo, Param
from .common import CONV, EXCLUDE, EXPERTS
from .tied import Tied, tie

if TYPE_CHECKING:
    import torch

    from ...adapters.model import Delta

__all__ = ["Knots"]

_ELEMENTWISE = ("ties", "dare_ties")
_INNER = (*_ELEMENTWISE, "task_arithmetic", "tsv_m", "iso_c")
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {"ties": {"density": 0.2}, "dare_ties": {"density": 0.9, "trim": 1.0}}
_ABSOLUTE = {"code": 1e-5, "fusionbench": 1e-4}
_GAP = 1e-6
_SMALL = 1 << 16


class Knots:
    """Delta = U inner(Z_1 .. Z_T) with [D_1 .. D_T] = U S V^T and Z_t = U^T D_t."""

    info = MethodInfo(
        name="knots",
        purpose="Express all updates in one shared basis and merge their right parts there (KnOTS).",
        formula="[D1 .. DT] = U S V^T; Zt = S Vt^T = U^T Dt; Delta = U inner(Z1 .. ZT); thresholds and majorities of "
        "ties and dare_ties count over the Z of all modules; stack rows: the same on the transposes",
        params=(
            Param("inner", "str", "what merges the Zt", default="ties", choices=_INNER),
            WEIGHT,
            LAMBDA,
            Param(
                "stack",
                "str",
                "columns: the updates side by side, one left basis; rows: on top of each other, one right basis",
                default="columns",
                choices=("columns", "rows"),
            ),
            Param(
                "cut",
                "float",
                "singular values at or below this share of the largest are dropped; default the larger side of what is "
                "decomposed times 1.2e-7, at most 1e-5. In the dialects code and fusionbench the cut is absolute, 1e-5 "
                "and 1e-4",
                default=None,
                low=0.0,
            ),
            Param(
                "scope",
                "str",
                "ties and dare_ties: what thresholds and majorities count over",
                default="model",
                choices=("model", "tensor"),
            ),
            EXCLUDE,
            CONV,
            EXPERTS,
            FOLD_SCALE,
            *inner_params(_ELEMENTWISE),
        ),
        base="required",
        modifiable=True,
        passes="factors: per pass a QR decomposition of the stacked B and of each A and one SVD of the size of the sum "
        "of ranks; ties 3 to 5 passes over all modules, dare_ties 2, the others 1; dense: a Gram of the smaller side",
        source="Stoica et al. 2024, Model merging with SVD to tie the knots, arXiv 2410.19735; gstoica27/KnOTS "
        "task_merger.py, masking_ops.py, merging_functions.py; fusion_bench method/knots/knots_utils.py",
        max_models=MANY,
        tier="T2",
        takes=("models", "adapters"),
        dialects={
            "default": "a relative cut; each adapter's scale is part of its factors",
            "code": "the authors' code: singular values at or below 1e-5 are dropped, alpha / r is ignored",
            "fusionbench": "FusionBench: singular values at or below 1e-4 are dropped",
        },
        deviations=(
            "weights multiply the entries that agree, after the election; the authors' code multiplies all adapters by "
            "the first coefficient",
            "ties keeps 20 % and dare_ties 90 % unless density says otherwise, and dare_ties trims nothing unless trim "
            "does, as the authors' settings for ViT-B",
            "masks of dare_ties come from Philox",
            "bases of equal singular values are arbitrary, as in every implementation; a relative difference below "
            "1e-6 is reported",
        ),
    )

    def check(self, params: Mapping[str, Any], dialect: str) -> list[str]:
        """The inner method must take its parameters, and every model."""
        name, weights = params["inner"], params["weight"]
        problems = []
        cut = params["cut"]
        if cut is not None and cut >= 1.0 and dialect not in _ABSOLUTE:
            problems.append(f"cut is a share of the largest singular value, below 1; got {cut}")
        if name in _ELEMENTWISE:
            try:
                _inner(params)
            except MergeError as error:
                problems.append(str(error))
            if len(weights) > 64:
                problems.append(f"inner method {name} merges at most 64 models; got {len(weights)}")
            return problems
        for param in inner_params(_ELEMENTWISE):
            value = params[param.name]
            if any(v is not None for v in (value if isinstance(value, tuple) else (value,))):
                problems.append(f"inner method {name} has no parameter '{param.name}'")
        return problems

    def scope(self, params: Mapping[str, Any], dialect: str) -> Literal["tensor", "model"]:
        """Thresholds and majorities count over all modules."""
        return cast("Literal['tensor', 'model']", params["scope"] if params["inner"] in _ELEMENTWISE else "tensor")

    def measure(self, spec: MatrixSpec, deltas: Sequence[Delta], state: Any = None) -> Any:
        """The size of the coordinates first, then the passes of the inner method."""
        return _measure(spec, _tied(spec, deltas, state, basis=False), state)

    def resolve(self, params: Mapping[str, Any], measured: Mapping[str, Any], state: Any = None) -> Any:
        """The next pass, or the inner method's coefficients."""
        inner = _inner(params)
        return begin(inner, measured) if state is None else advance(inner, state, measured)

    def merge(self, spec: MatrixSpec, deltas: Sequence[Delta], state: Any = None) -> Merged:
        """The merged right part on the shared basis: factors at its rank, dense for dense deltas."""
        tied = _tied(spec, deltas, state)
        name = spec.params["inner"]
        report: dict[str, Any] = {"rank": tied.rank, "inner": name}
        warnings: tuple[str, ...] = ()
        if tied.rank == 0:
            return Merged(_back(spec, tied, tied.basis().new_zeros(0, tied.shape[1])), report, warnings)
        if name in _ELEMENTWISE:
            if state is None:
                place = _measure(spec, tied, None)
                inside = _coordinates(spec, tied, _dtype(place.compute))
                state = resolve_alone(_inner(spec.params), inside, place.compute, spec.seed)
            inner = _inner(spec.params)
            report["inner"] = inner.text
            merged = write(inner, state, _coordinates(spec, tied, _dtype(state.scope.compute)))
            report["gap"] = tied.gap
            if tied.gap < _GAP:
                warnings = (
                    f"{spec.name}: two singular values of the stack differ by {tied.gap:.1e} of the largest, so their "
                    f"directions, and with them what {name} keeps, are arbitrary",
                )
            return Merged(_back(spec, tied, merged), report, warnings)
        return Merged(_back(spec, tied, _rotation_free(spec, tied)), report, warnings)


def _inner(params: Mapping[str, Any]) -> Inner:
    name = params["inner"]
    return Inner.of(name, params, params["weight"], params["scope"], _DEFAULTS[name])


def _tied(spec: MatrixSpec, deltas: Sequence[Delta], state: Passing | Resolved | None, basis: bool = True) -> Tied:
    """The basis; of the transposes for stack rows. What an earlier pass has kept is used."""
    small = None if state is None else state.hints[spec.name]
    cut = spec.params["cut"]
    if cut is None:
        cut = _ABSOLUTE.get(spec.dialect)
    deltas = list(deltas)
    rows = spec.params["stack"] == "rows"
    return tie([_transposed(d) for d in deltas] if rows else deltas, cut, spec.dialect in _ABSOLUTE, small, basis)


def _transposed(delta: Delta) -> Delta:
    from ...adapters.model import Factors

    return Factors(delta.a.mT, delta.b.mT) if isinstance(delta, Factors) else delta.mT


def _back(spec: MatrixSpec, tied: Tied, merged: Delta) -> Delta:
    """U Z in the dtype and orientation of the deltas."""
    from ...adapters.model import Factors

    first = tied.deltas[0]
    dtype = first.b.dtype if isinstance(first, Factors) else first.dtype
    u = tied.basis().to(dtype)
    result: Delta
    if isinstance(merged, Factors):
        result = Factors(u @ merged.b.to(dtype), merged.a.to(dtype))
    elif isinstance(first, Factors):
        result = Factors(u, merged.to(dtype))
    else:
        result = u @ merged.to(dtype)
    return _transposed(result) if spec.params["stack"] == "rows" else result


def _dtype(compute: str) -> torch.dtype:
    import torch

    return torch.float64 if compute == "F64" else torch.float32


def _coordinates(spec: MatrixSpec, tied: Tied, dtype: torch.dtype) -> Coordinates:
    return Coordinates(
        spec.name,
        (tied.rank, tied.shape[1]),
        spec.num_models,
        dtype.itemsize,
        lambda first, last: tied.rows(first, last, dtype),
    )


def _measure(spec: MatrixSpec, tied: Tied, state: Passing | None) -> Any:
    if state is None:
        from ...adapters.model import Factors

        first = tied.deltas[0]
        wide = str(first.b.dtype if isinstance(first, Factors) else first.dtype) == "torch.float64"
        # Kept for the passes that follow unless it is large beside the statistics that they measure.
        small = tied.small
        hint = small if small is not None and small.coefficients.numel() <= _SMALL else None
        return Place((tied.rank, tied.shape[1]), "F64" if wide else "F32", spec.seed, hint)
    return measure_pass(_inner(spec.params), state, _coordinates(spec, tied, _dtype(state.scope.compute)))


def _rotation_free(spec: MatrixSpec, tied: Tied) -> Delta:
    """Inner methods that any orthonormal basis serves: on Z_t in factors, or dense."""
    import torch

    from ..arguments import bind_matrix
    from ..matrix_table import get_matrix

    weights = spec.params["weight"]
    factors = all_factors(tied.deltas)
    dtype = factors[0].b.dtype if factors is not None else cast("torch.Tensor", tied.deltas[0]).dtype
    factored = tied.factored(dtype)
    parts: list[Delta]
    if factored is not None:
        parts = list(weighted(factored, weights))
    else:
        parts = [z * w for z, w in zip(tied.rows(0, tied.rank, dtype), weights, strict=True)]
    name = spec.params["inner"]
    if name == "task_arithmetic":
        if factored is not None:
            left = torch.cat([c * w for c, w in zip(tied.coefficients, weights, strict=True)], dim=1)
            return left.to(dtype) @ torch.cat([f.a for f in factored])
        dense = [cast("torch.Tensor", p) for p in parts]
        return sum(dense[1:], dense[0])
    method = get_matrix(name, "models")
    bound = bind_matrix(method, {}, spec.num_models, "default", spec.name)
    inside = replace(spec, shape=(tied.rank, tied.shape[1]), params=bound, dialect="default")
    return method.merge(inside, parts).delta
