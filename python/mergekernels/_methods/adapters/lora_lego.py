"""lora_lego: the rank-1 units of all adapters, clustered; the centroids make the merged adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..factor_space import all_factors
from ..matrix import MatrixSpec, Merged
from ..permatrix import PerMatrix
from ..protocol import MethodInfo, Param
from .common import FOLD_SCALE, LAMBDA, MANY

if TYPE_CHECKING:
    import torch

    from ...adapters.model import Delta, Factors
    from ...ops import Clusters

__all__ = ["LoraLego"]


class LoraLego(PerMatrix):
    """Delta = c sum of b_k a_k over the centroids (a_k, b_k) of k clusters of units."""

    info = MethodInfo(
        name="lora_lego",
        purpose="Pool the rank-1 units of all adapters, cluster equal and similar ones, and build an adapter of chosen "
        "rank from the centroids.",
        formula="unit zi = [ai ; bi], row i of the stacked At and column i of [B1 .. BT]; k-means with k clusters; "
        "centroid mu = mean of its units, times mean(norm_inf of its units) / norm_inf(mu); "
        "Delta = c sum over centroids of mu_b mu_a^T, c = sqrt(r / k), r the mean rank",
        params=(
            LAMBDA,
            Param(
                "k",
                "int",
                "clusters, the rank of the result; the mean rank of the adapters",
                default=None,
                low=1,
                high=65536,
            ),
            Param(
                "output",
                "str",
                "factor of the merged update: sqrt_r_k is sqrt(r / k), sqrt_R_k the root of the sum of all ranks over "
                "k, none is 1",
                default="sqrt_r_k",
                choices=("sqrt_r_k", "sqrt_R_k", "none"),
            ),
            Param(
                "reweight",
                "bool",
                "bring each centroid to the mean largest entry of its units (parameter reweighting)",
                default=True,
            ),
            Param(
                "features",
                "str",
                "what is compared: units whose halves have equal norm (balanced), as they are (raw), or both halves "
                "of norm 1 (unit)",
                default="balanced",
                choices=("balanced", "raw", "unit"),
            ),
            Param(
                "sign",
                "str",
                "(a, b) and (-a, -b) are one unit: canonical makes the largest entry of a positive, adaptive chooses "
                "the sign nearer to the centroid, none leaves it",
                default="canonical",
                choices=("canonical", "adaptive", "none"),
            ),
            Param("n_starts", "int", "starts of k-means; the least inertia is taken", default=10, low=1, high=1024),
            Param("max_iter", "int", "steps of a start", default=100, low=1, high=1000000),
            FOLD_SCALE,
        ),
        base="required",
        passes="1 Gram of the units per module, k-means on it, 1 pass over the factors for the centroids, 1 write",
        source="Zhao et al. 2024, Merging LoRAs like playing LEGO, arXiv 2409.16167",
        max_models=MANY,
        tier="T2",
        takes=("adapters",),
        dialects={
            "default": "the decisions listed here, each an option",
            "code": "alpha / r is ignored (fold_scale false)",
        },
        deviations=(
            "the authors' code was not read; third-party codes disagree on the factor of the output, on scale and sign",
            "centroids are means, so that copies of one adapter give this adapter at k = r",
            "units of zeros are dropped and counted; k above the number of units is reduced",
        ),
    )

    def merge(self, spec: MatrixSpec, deltas: Sequence[Delta], state: Any = None) -> Merged:
        """Balance, cluster, average."""
        return self.merge_together([spec], [deltas])[0]

    def merge_together(self, specs: Sequence[MatrixSpec], deltas: Sequence[Sequence[Delta]]) -> list[Merged]:
        """The units of all modules, clustered in one batch."""
        import torch

        from ...ops.tensor.cluster import cluster, cluster_gram

        pools = [_pool(spec, given) for spec, given in zip(specs, deltas, strict=True)]
        found: dict[int, Clusters] = {}
        for k, large in sorted({(pool.k, pool.large) for pool in pools if pool.k}):
            chosen = [i for i, pool in enumerate(pools) if (pool.k, pool.large) == (k, large)]
            params, seed = specs[0].params, specs[0].seed
            options: dict[str, Any] = {"n_starts": params["n_starts"], "max_iter": params["max_iter"], "seed": seed}
            options["sign"] = "adaptive" if params["sign"] == "adaptive" else "none"
            halves = [tuple(x.double() for x in pools[i].features) for i in chosen]
            if large:
                clusters = cluster([torch.cat([left.mT, right], 1) for left, right in halves], k, **options)
            else:
                clusters = cluster_gram([left.mT @ left + right @ right.mT for left, right in halves], k, **options)
            found |= zip(chosen, clusters, strict=True)
        return [
            _merged(spec, pool, found[i]) if i in found else Merged(pool.nothing, {"units": 0, "k": 0})
            for i, (spec, pool) in enumerate(zip(specs, pools, strict=True))
        ]


@dataclass(frozen=True)
class _Pool:
    """The units of one module that are not zero. b : (m, R). a : (R, n). features : what is compared, of these shapes.

    k : clusters, 0 without units. total : sum of the ranks. models : adapters. nothing : the result without units.
    """

    b: torch.Tensor
    a: torch.Tensor
    features: tuple[torch.Tensor, torch.Tensor]
    k: int
    total: int
    models: int
    nothing: Factors

    @property
    def large(self) -> bool:
        """Whether a Gram would be larger than the units are."""
        return self.a.shape[0] > 8192


def _pool(spec: MatrixSpec, deltas: Sequence[Delta]) -> _Pool:
    import torch

    from ...adapters.model import Factors

    factors = all_factors(deltas)
    assert factors is not None
    params, total = spec.params, sum(f.rank for f in factors)
    b, a, features = _units(torch.cat([f.b for f in factors], 1), torch.cat([f.a for f in factors]), params["features"])
    count = a.shape[0]
    if params["sign"] == "canonical" and count:
        turn = torch.where(a.gather(1, a.abs().argmax(1)[:, None]) < 0, -1.0, 1.0).to(a)
        b, a = b * turn[:, 0], a * turn
        features = (features[0] * turn[:, 0], features[1] * turn)
    k = min(params["k"] or max(1, round(total / len(factors))), count)
    return _Pool(b, a, features, k, total, len(factors), factors[0] if total == 0 else Factors(b, a))


def _merged(spec: MatrixSpec, pool: _Pool, found: Clusters) -> Merged:
    """The centroids as an adapter."""
    import torch

    from ...adapters.model import Factors

    params, b, a, k = spec.params, pool.b, pool.a, pool.k
    member = torch.nn.functional.one_hot(found.labels, k).to(torch.float64) * found.signs[:, None]
    share = member / member.abs().sum(0)
    mu_b, mu_a = b.double() @ share, share.mT @ a.double()
    if params["reweight"]:
        size = torch.maximum(b.abs().amax(0), a.abs().amax(1)).double()
        largest = torch.maximum(mu_b.abs().amax(0), mu_a.abs().amax(1))
        gain = torch.where(largest > 0, (share.abs().mT @ size) / largest, torch.ones_like(largest))
        mu_b, mu_a = mu_b * gain, mu_a * gain[:, None]
    units = {"sqrt_r_k": pool.total / pool.models, "sqrt_R_k": pool.total, "none": k}[params["output"]]
    report = {
        "units": a.shape[0],
        "zero_units": pool.total - a.shape[0],
        "k": k,
        "inertia": found.inertia,
        "steps": found.steps,
        "sizes": found.sizes,
    }
    warnings: tuple[str, ...] = ()
    if not found.converged:
        warnings = (f"k-means did not settle in {params['max_iter']} steps",)
    return Merged(Factors((mu_b * (units / k) ** 0.5).to(b.dtype), mu_a.to(a.dtype)), report, warnings)


def _units(
    b: torch.Tensor, a: torch.Tensor, kind: str
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Units without those of zero (b columns, a rows), balanced unless `raw`, and what is compared."""
    import torch

    # In float64: the squares of float32 numbers need not fit into float32.
    left = torch.linalg.vector_norm(b, dim=0, dtype=torch.float64)
    right = torch.linalg.vector_norm(a, dim=1, dtype=torch.float64)
    there = (left > 0) & (right > 0)
    b, a, left, right = b[:, there], a[there], left[there], right[there]
    if kind == "raw":
        return b, a, (b, a)
    same = (b / left, a / right[:, None]) if kind == "unit" else None
    ratio = (right / left).sqrt().to(b.dtype)
    b, a = b * ratio, a / ratio[:, None]
    return b, a, same or (b, a)
