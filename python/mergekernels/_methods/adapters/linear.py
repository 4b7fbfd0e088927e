"""linear: PEFT's sum of the factors themselves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..matrix import MatrixSpec, Merged, Wants
from ..permatrix import PerMatrix
from ..protocol import MethodInfo
from .common import LAMBDA, MANY, WEIGHT
from .peft import DEVIATIONS, PEFT

if TYPE_CHECKING:
    from ...adapters.model import Delta, Factors

__all__ = ["Linear", "roots"]


def roots(spec: MatrixSpec) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(weights of the A, weights of the B): the root of |w_t s_t| on both, the sign on A."""
    products = [w * s for w, s in zip(spec.params["weight"], spec.scales, strict=True)]
    both = tuple(math.sqrt(abs(p)) for p in products)
    return tuple(math.copysign(r, p) for r, p in zip(both, products, strict=True)), both


class Linear(PerMatrix):
    """B = sum of b_t B_t, A = sum of a_t A_t: not the sum of the products, cross terms B_s A_t are part of it."""

    info = MethodInfo(
        name="linear",
        purpose="Sums of the factors of adapters of one rank: cheap, but with cross terms; svd and cat are exact.",
        formula="A = sum of sgn(wt st) sqrt|wt st| At, B = sum of sqrt|wt st| Bt, Delta = B A; st = alpha / r of "
        "adapter t",
        params=(WEIGHT, LAMBDA),
        base="optional",
        passes="1 read of the factors",
        source=PEFT,
        max_models=MANY,
        tier="T2",
        takes=("adapters",),
        dialects={
            "default": "the sums",
            "peft": "PEFT 0.21.2: if the first adapter asks for rsLoRA, times the square root of the rank",
        },
        deviations=(DEVIATIONS["rslora"], DEVIATIONS["ranks"]),
    )

    def wants(self, params: Mapping[str, Any], dialect: str) -> Wants:
        """The factors as they are, of one rank."""
        return Wants(raw=True, equal_ranks=True, peft=True)

    def merge(self, spec: MatrixSpec, deltas: Sequence[Delta], state: Any = None) -> Merged:
        """The two sums."""
        from ...adapters.model import Factors

        b = a = None
        for delta, on_a, on_b in zip(deltas, *roots(spec), strict=True):
            assert isinstance(delta, Factors)
            if delta.rank == 0:
                continue
            b = delta.b * on_b if b is None else b.add_(delta.b, alpha=on_b)
            a = delta.a * on_a if a is None else a.add_(delta.a, alpha=on_a)
        assert a is not None and b is not None  # the driver has no module without an adapter
        return Merged(Factors(b, a))

    def separate(self, spec: MatrixSpec, deltas: Sequence[Delta]) -> list[Factors] | None:
        """The factors themselves; zeros where an adapter lacks the module."""
        from ...adapters.model import Factors

        factors = [d for d in deltas if isinstance(d, Factors)]
        rank = max(f.rank for f in factors)
        return [
            f if f.rank else Factors(f.b.new_zeros((spec.shape[0], rank)), f.a.new_zeros((rank, spec.shape[1])))
            for f in factors
        ]
