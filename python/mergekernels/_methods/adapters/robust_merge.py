"""robust_merge (RobustMerge, first titled CoPA-Merging): prune factors, strengthen weak rank directions, normalise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...errors import ArgumentError
from ..factor_space import all_factors
from ..matrix import MatrixSpec, Merged, Wants
from ..permatrix import PerMatrix
from ..protocol import MethodInfo, Param
from .common import FOLD_SCALE, LAMBDA, MANY

if TYPE_CHECKING:
    import torch

    from ...adapters.model import Delta, Factors

__all__ = ["RobustMerge"]

_CLAMP = 0.8


class RobustMerge(PerMatrix):
    """Delta = a (sum of B~_t diag(c~_t)) (sum of A~_t), a = 4 (paper: 2)."""

    info = MethodInfo(
        name="robust_merge",
        purpose="Prune each factor to its largest entries, scale every rank direction by what its row of A lost, "
        "normalised over the adapters, and multiply the sums of the factors (RobustMerge, CoPA-Merging).",
        formula="A~t, B~t = the largest entries of At, Bt by magnitude; ct[i] = sum |At[i,:]| / sum |A~t[i,:]|, raised "
        "to at least sort(ct)[int(clamp r)]; c~t[i] = ct[i] / (c1[i] + ... + cT[i]); "
        "Delta = (f sum of B~t diag(c~t)) (f sum of A~t)",
        params=(
            Param(
                "keep",
                "float",
                "share of each factor that is kept: n - int((1 - keep) n) + 1 entries and what equals the last; all "
                "where int((1 - keep) n) is 0",
                default=0.2,
                low=0.0,
                high=1.0,
            ),
            Param(
                "clamp",
                "float",
                "place of the least c in the sorted ones, as a share of the rank, below 1; 0 raises nothing. 0.8, in "
                "the dialect paper 0",
                default=None,
                low=0.0,
                high=1.0,
            ),
            Param(
                "factor_scale",
                "float",
                "f: on each factor, so that the result carries its square; in the dialect paper on one factor alone",
                default=2.0,
            ),
            LAMBDA,
            FOLD_SCALE,
        ),
        base="required",
        passes="2 reads of the factors (thresholds, then sums), 1 write; no decomposition",
        source="Zeng et al. 2025, RobustMerge, arXiv 2502.17159; AuroraZengfh/RobustMerge llava/model/builder.py",
        max_models=MANY,
        tier="T2",
        takes=("adapters",),
        dialects={
            "default": "the released code's rules on factors that carry alpha / r",
            "paper": "the formulas of the text: nothing is clamped, the whole product is scaled once",
            "code": "the released code: alpha / r is ignored (fold_scale false)",
        },
        deviations=(
            "a row of A that is pruned away altogether gets c = 0 and is reported; the released code divides by zero",
            "the released code fails where int((1 - keep) n) is 0; here everything is kept",
            "the released code pairs an A with the next B of its state dict; here modules are paired by name",
            "an adapter without the module adds nothing to its sums",
        ),
    )

    def check(self, params: Mapping[str, Any], dialect: str) -> list[str]:
        """The place of the clamp must exist."""
        clamp = params["clamp"]
        return ["clamp must be below 1"] if clamp is not None and clamp >= 1.0 else []

    def wants(self, params: Mapping[str, Any], dialect: str) -> Wants:
        """Adapters of one rank."""
        return Wants(equal_ranks=True)

    def merge(self, spec: MatrixSpec, deltas: Sequence[Delta], state: Any = None) -> Merged:
        """Sums of pruned factors.

        Raises
        ------
        ArgumentError : adapters of different ranks.
        """
        from ...adapters.model import Factors

        factors = all_factors(deltas)
        assert factors is not None
        used = [f for f in factors if f.rank > 0]
        if not used:
            return Merged(factors[0], {"rank": 0}, (f"{spec.name}: no adapter has this module",))
        if len({f.rank for f in used}) > 1:
            raise ArgumentError(
                "robust_merge needs adapters of one rank: it adds their factors",
                code="adapter.rank",
                tensor=spec.name,
                expected="equal ranks",
                got=", ".join(str(f.rank) for f in factors),
                hint="core_space, knots or svd merge adapters of different ranks.",
            )
        keep = spec.params["keep"]
        pruned = [Factors(_pruned(f.b, keep), _pruned(f.a, keep)) for f in used]
        clamp = spec.params["clamp"]
        if clamp is None:
            clamp = 0.0 if spec.dialect == "paper" else _CLAMP
        ratios = [_ratios(f, p, clamp) for f, p in zip(used, pruned, strict=True)]
        total = _sum(ratios)
        safe = total.where(total > 0, total.new_ones(()))
        scale = spec.params["factor_scale"]
        b = _sum([p.b * (c / safe).to(p.b.dtype) for p, c in zip(pruned, ratios, strict=True)]) * scale
        a = _sum([p.a for p in pruned])
        if spec.dialect != "paper":
            a = a * scale
        lost = sum(int((p.a == 0).all(dim=1).sum()) for p in pruned)
        warnings: tuple[str, ...] = ()
        if lost:
            warnings = (f"{spec.name}: {lost} rows of A were pruned away altogether and count nothing",)
        return Merged(Factors(b, a), {"rank": int(b.shape[1]), "rows_lost": lost}, warnings)


def _pruned(x: torch.Tensor, keep: float) -> torch.Tensor:
    """The largest entries of x, the others 0; all that equal the smallest kept one stay."""
    from ...ops import Keep, Program, select, stream

    n = x.numel()
    dropped = int((1.0 - keep) * n)
    if dropped == 0:
        return x
    x = x.contiguous()
    points: list[Keep] = select([x], n - dropped + 1, policy="all")
    return stream([x], Program((1.0,), (points[0],), base=False))


def _ratios(f: Factors, pruned: Factors, clamp: float) -> torch.Tensor:
    """The ratios c of one adapter, float64: 0 where the pruned row is zero, clamped or not."""
    whole = f.a.double().abs().sum(1)
    left = pruned.a.double().abs().sum(1)
    none = left.new_zeros(())
    c = (whole / left.where(left > 0, left.new_ones(()))).where(left > 0, none)
    if clamp > 0.0:
        c = c.clamp_min(c.sort().values[int(clamp * f.rank)])
    return c.where(left > 0, none)


def _sum(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    total = tensors[0]
    for x in tensors[1:]:
        total = total + x
    return total
