"""from_norm (FroM) of adapters: true products weighted by a power of their Frobenius norm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..factor_space import all_factors
from ..from_norm import shares
from ..matrix import MatrixSpec, Merged, Wants
from ..permatrix import PerMatrix
from ..protocol import MethodInfo, Param
from .common import FOLD_SCALE, LAMBDA, MANY
from .sums import weighted_sum

if TYPE_CHECKING:
    from ...adapters.model import Delta, Factors

__all__ = ["FromNorm"]


class FromNorm(PerMatrix):
    """Delta = (sum of |D_t|^k D_t) / (sum of |D_t|^k), per module, D_t = B_t A_t."""

    info = MethodInfo(
        name="from_norm",
        purpose="Weight adapters by a power of their update's Frobenius norm, per module (FroM). Derived from the "
        "objective that the paper states; not a verified reproduction: its rule for adapters and its k are not public.",
        formula="Delta = (|D1|^k D1 + ... + |DT|^k DT) / (|D1|^k + ... + |DT|^k), Dt = Bt At, |Dt| its Frobenius norm; "
        "0 where all are 0",
        params=(
            Param("k", "float", "power of the norm; 0 averages, a large one keeps the largest (try 1, 2, 4)", low=0.0),
            LAMBDA,
            FOLD_SCALE,
        ),
        base="required",
        passes="1 read of the factors, 1 write",
        source="FroM, arXiv 2506.02478, EMNLP 2025 Findings (objective); the closed form is derived here",
        max_models=MANY,
        tier="T2",
        takes=("adapters",),
        dialects={"default": "norms of the products B A, scales included"},
        deviations=("derived: products are weighed, not factors; the paper's own rule for adapters is unknown",),
    )

    def wants(self, params: Mapping[str, Any], dialect: str) -> Wants:
        """Truncation where it is asked for only: a dense sum is exact as it is."""
        return Wants(rank="exact")

    def merge(self, spec: MatrixSpec, deltas: Sequence[Delta], state: Any = None) -> Merged:
        """The weighted sum, its factors side by side."""
        factors = all_factors(deltas)
        assert factors is not None
        parts = shares([_square(f) for f in factors], spec.params["k"])
        merged, route = weighted_sum(factors, parts, spec.shape)
        warnings = () if any(parts) else (f"{spec.name}: every adapter's update is zero",)
        return Merged(merged, {"shares": parts, "route": route or "sum"}, warnings)


def _square(f: Factors) -> float:
    """||B A||_F^2 from two Grams, float64."""
    b, a = f.b.double(), f.a.double()
    # Rounding may leave a tiny negative number where the products cancel.
    return max(0.0, float(((b.mT @ b) * (a @ a.mT)).sum()))
