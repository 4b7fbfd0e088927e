"""star: each task vector without its small singular values, its nuclear norm kept, averaged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..matrix import MatrixSpec, Merged
from ..permatrix import PerMatrix
from ..protocol import MethodInfo, Param
from .common import (
    CONV,
    COUNT_ZERO,
    EXCLUDE,
    EXPERTS,
    LAMBDA,
    MANY,
    RANK_TOL,
    WEIGHT,
    cut_of,
    full_svd,
    nothing,
    tasks_of,
)

if TYPE_CHECKING:
    import torch

    from ...adapters.model import Delta

__all__ = ["Star"]


class Star(PerMatrix):
    """Delta = (1/T) sum of the truncated, rescaled task vectors."""

    info = MethodInfo(
        name="star",
        purpose="Drop each task vector's small singular values, rescale the others to keep the nuclear norm, average "
        "(STAR).",
        formula="k_t = least k with s_1 + ... + s_k >= (eta / 100) sum(s); S' = s_1..s_k times sum(s) / (s_1 + ... + "
        "s_k); Delta = (1/T) sum of U_k S' V_k^T. Tensors that are no matrices: mean",
        params=(
            WEIGHT,
            LAMBDA,
            Param(
                "eta",
                "float",
                "share of the nuclear norm that is kept, in percent, above 0",
                default=40.0,
                low=0.0,
                high=100.0,
            ),
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
        passes="1 read of the models and the base, 1 write; one symmetric decomposition per task; adapters: in "
        "factors, rank sum of k_t",
        source="Lee et al. 2025, STAR: Spectral Truncation and Rescale for Model Merging, arXiv 2502.10339; IBM/STAR "
        "merger/STAR.py",
        dialects={"default": "the authors' rules"},
        deviations=(
            "k is at most the rank; the authors' rounding can pass the end",
            "the authors merge the matrices that LoRA changed and leave the others; here all matrices are merged",
        ),
        takes=("models", "adapters"),
    )

    def check(self, params: Any, dialect: str) -> list[str]:
        """Eta is above 0."""
        return ["eta is 0; expected a number in (0, 100]"] if params["eta"] == 0.0 else []

    def merge(self, spec: MatrixSpec, deltas: Sequence[Delta], state: Any = None) -> Merged:
        """The merged task vector of one matrix."""
        from ...adapters.model import Factors
        from ...ops import lowrank, stack

        tasks = tasks_of(spec, deltas)
        if not tasks.live:
            return nothing(spec, deltas)
        tol, eta, ks, kept = cut_of(spec.params, spec.shape), spec.params["eta"], [], []
        if not tasks.factored:
            total: torch.Tensor | None = None
            for delta in tasks.dense:
                u, s, v = full_svd(delta, tol)
                k, scale = _kept(s, eta)
                part = (u[:, :k] * (s[:k] * (scale / tasks.count)).to(u)) @ v[:, :k].T
                total = part if total is None else total + part
                ks.append(k)
            assert total is not None
            return Merged(total, {"k": ks, "route": "gram"})
        for f in tasks.factors:
            found = lowrank(f, min(f.rank, *f.shape))
            k, scale = _kept(found.singular_values, eta)
            kept.append(Factors(found.factors.b[:, :k] * (scale / tasks.count), found.factors.a[:k]))
            ks.append(k)
        return Merged(stack(kept), {"k": ks, "rank": sum(ks), "route": "factors"})


def _kept(s: torch.Tensor, eta: float) -> tuple[int, float]:
    """k, and the factor that gives the nuclear norm back."""
    import torch

    sums = torch.cumsum(s, 0)
    # Rounding of the sums must not ask for one value more than all of them.
    reached = sums >= eta / 100.0 * sums[-1] * (1.0 - 1e-12)
    k = int(reached.to(torch.int8).argmax()) + 1
    return k, float(sums[-1] / sums[k - 1])
