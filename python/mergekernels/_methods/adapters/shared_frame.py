"""compress_then_merge and tucker_merge: a shared frame of limited rank first, then any rule on the cores inside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ...errors import MergeError
from ..factor_space import all_factors
from ..inner import ELEMENTWISE, Inner, inner_params, run_inner
from ..matrix import MatrixSpec, Merged
from ..permatrix import PerMatrix
from ..protocol import MethodInfo, Param
from .common import FOLD_SCALE, LAMBDA, MANY, WEIGHT

if TYPE_CHECKING:
    import torch

    from ...adapters.model import Delta, Factors

__all__ = ["CompressThenMerge", "TuckerMerge"]

_SPECTRAL = ("tsv_m", "iso_c")
_INNER = Param(
    "inner",
    "str",
    "what merges the cores: element by element in a basis that the stack fixes, or as matrices (tsv_m, iso_c)",
    default="task_arithmetic",
    choices=(*ELEMENTWISE, *_SPECTRAL),
)
_ITERATION = (
    Param("max_iter", "int", "sweeps of the iteration for the frame", default=1000, low=1, high=1000000),
    Param("tol", "float", "stop where the relative error changes by less", default=1e-6, low=0.0),
)
_DEVIATIONS = (
    "rules that look at single entries depend on the basis of the frame, which the iteration leaves open: here it "
    "diagonalises the sums of Ot Ot^T and of Ot^T Ot",
    "an adapter of norm zero is left out of the fit; its core is 0, and it counts as a model",
)


class _Framed(PerMatrix):
    """Delta = U O V^T with O = inner(U^T D1 V .. U^T DT V)."""

    def check(self, params: Mapping[str, Any], dialect: str) -> list[str]:
        """The inner method must take its parameters, and every adapter."""
        if params["inner"] in _SPECTRAL:
            given = [p.name for p in inner_params(ELEMENTWISE) if _given(params[p.name])]
            return [f"inner method {params['inner']} has no parameter '{p}'" for p in given]
        try:
            Inner.of(params["inner"], params, params["weight"], "tensor", {})
        except MergeError as error:
            return [str(error)]
        if len(params["weight"]) > 64:
            return [f"inner method {params['inner']} merges at most 64 adapters; got {len(params['weight'])}"]
        return []

    def frame(self, spec: MatrixSpec, factors: Sequence[Factors]) -> tuple[int | float, list[float]]:
        """(size of the frame, weight of each adapter in the fit)."""
        raise NotImplementedError

    def merge(self, spec: MatrixSpec, deltas: Sequence[Delta], state: Any = None) -> Merged:
        """Fit the frame, merge the cores, go back."""
        from ...adapters.model import Factors
        from ...ops import tucker

        factors = all_factors(deltas)
        assert factors is not None
        params = spec.params
        if sum(f.rank for f in factors) == 0:
            return Merged(factors[0], {"frame": (0, 0), "error": 0.0})
        size, weights = self.frame(spec, factors)
        found = tucker(list(factors), size, weights=weights, max_iter=params["max_iter"], tol=params["tol"])
        merged = _inner(spec, found.cores)
        u, v = found.u, found.v
        report = {
            "frame": tuple(found.cores.shape[1:]),
            "error": found.error,
            "task_errors": tuple(round(e, 6) for e in found.task_errors),
            "sweeps": len(found.history),
        }
        warnings: tuple[str, ...] = ()
        if not found.converged:
            warnings = (f"the frame did not converge in {params['max_iter']} sweeps",)
        return Merged(Factors((u.double() @ merged.double()).to(u.dtype), v.mT), report, warnings)


def _inner(spec: MatrixSpec, cores: torch.Tensor) -> torch.Tensor:
    """The inner method's merge of the cores [T, p, q]; the matrix methods see them as task vectors of their own."""
    from ...adapters.model import Factors
    from ..arguments import bind_matrix
    from ..matrix_table import get_matrix

    params = spec.params
    name = params["inner"]
    if name not in _SPECTRAL:
        return run_inner(Inner.of(name, params, params["weight"], "tensor", {}), list(cores), spec.name, spec.seed)
    method = get_matrix(name, "models")
    bound = bind_matrix(method, {"weights": list(params["weight"])}, len(cores), "default", spec.name)
    rows, columns = cores.shape[1:]
    inside = replace(spec, shape=(rows, columns), params=bound, dialect="default")
    delta = method.merge(inside, list(cores)).delta
    return delta.dense() if isinstance(delta, Factors) else delta


def _given(value: Any) -> bool:
    return any(v is not None for v in value) if isinstance(value, tuple) else value is not None


class CompressThenMerge(_Framed):
    """A frame of the adapters' own rank, fitted to updates of adjusted norm."""

    info = MethodInfo(
        name="compress_then_merge",
        purpose="Fix a frame of the adapters' own rank that serves all of them, then merge their cores in it: the "
        "result has that rank by construction.",
        formula="Nt = norm of Dt = Bt At; U, V (r columns) minimise sum_t norm(Tt - U U^T Tt V V^T)^2 for targets "
        "Tt = Dt (b Nt + (1 - b) mean N) / Nt; Ot = U^T Dt V; Delta = U inner(O1 .. OT) V^T",
        params=(
            _INNER,
            WEIGHT,
            LAMBDA,
            Param(
                "frame_rank",
                "int",
                "columns of the frame r; the largest rank among the adapters",
                default=None,
                low=1,
                high=65536,
            ),
            Param(
                "norm_share",
                "float",
                "b: 0 gives every adapter the same say in the frame, 1 as much as its energy",
                default=0.0,
                low=0.0,
                high=1.0,
            ),
            *_ITERATION,
            FOLD_SCALE,
            *inner_params(ELEMENTWISE),
        ),
        base="required",
        passes="2 QR decompositions of the stacked factors per module, sweeps on the cores, the inner method on T "
        "matrices r x r, 1 write",
        source="Compress then merge, arXiv 2606.03723; ZhengbaoHe/compress-then-merge",
        max_models=MANY,
        tier="T2",
        takes=("adapters",),
        dialects={
            "default": "each adapter's scale is part of its factors",
            "code": "the authors' code: alpha / r is ignored (fold_scale false)",
        },
        deviations=(*_DEVIATIONS, "with mixed ranks the frame has the largest of them"),
    )

    def frame(self, spec: MatrixSpec, factors: Sequence[Factors]) -> tuple[int | float, list[float]]:
        """The adapters' rank; weights that adjust the norms."""
        norms = [_norm(f) for f in factors]
        there = [n for n in norms if n > 0.0]
        b, mean = spec.params["norm_share"], sum(there) / max(1, len(there))
        weights = [(b + (1.0 - b) * mean / n) ** 2 if n > 0.0 else 0.0 for n in norms]
        return spec.params["frame_rank"] or max(f.rank for f in factors), weights


class TuckerMerge(_Framed):
    """A frame that keeps a share of the energy."""

    info = MethodInfo(
        name="tucker_merge",
        purpose="Merge the adapters' cores in a shared frame that is as small as a share of their energy allows.",
        formula="U, V minimise sum_t norm(Dt - U Ot V^T)^2, Dt = Bt At, Ot = U^T Dt V, with as many columns as keep "
        "`energy_share` of sum_t norm(Dt)^2 on each side; Delta = U inner(O1 .. OT) V^T",
        params=(
            _INNER,
            WEIGHT,
            LAMBDA,
            Param(
                "energy_share",
                "float",
                "share of the summed squares of all updates that each side of the frame must keep",
                default=0.95,
                low=0.01,
                high=0.999999,
            ),
            *_ITERATION,
            FOLD_SCALE,
            *inner_params(ELEMENTWISE),
        ),
        base="required",
        passes="as compress_then_merge",
        source="Tucker 1966; De Lathauwer, De Moor, Vandewalle 2000 (higher-order orthogonal iteration)",
        max_models=MANY,
        tier="T2",
        takes=("adapters",),
        dialects={"default": "each adapter's scale is part of its factors"},
        deviations=_DEVIATIONS,
    )

    def frame(self, spec: MatrixSpec, factors: Sequence[Factors]) -> tuple[int | float, list[float]]:
        """A share of the energy, every adapter by its own."""
        return spec.params["energy_share"], [1.0] * len(factors)


def _norm(f: Factors) -> float:
    """||B A||_F from the Grams of the factors."""
    b, a = f.b.double(), f.a.double()
    return float(((b.mT @ b) * (a @ a.mT)).sum().clamp_min(0.0).sqrt())
