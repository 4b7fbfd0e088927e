"""cat: the exact weighted sum of adapters, their factors side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..matrix import MatrixSpec, Merged
from ..protocol import MethodInfo
from .common import LAMBDA, MANY, WEIGHT, PerModule

if TYPE_CHECKING:
    from ...adapters.model import Delta

__all__ = ["Cat"]


class Cat(PerModule):
    """Delta = sum of w_t B_t A_t, exactly, at rank sum of r_t."""

    info = MethodInfo(
        name="cat",
        purpose="The weighted sum of adapters, exactly: their factors side by side.",
        formula="Delta = w1 B1 A1 + ... + wT BT AT = [w1 B1 .. wT BT] [A1; ..; AT]; rank r1 + ... + rT",
        params=(WEIGHT, LAMBDA),
        base="required",
        passes="1 read of the factors, 1 write",
        source="peft tuners/lora/model.py, add_weighted_adapter",
        max_models=MANY,
        tier="T2",
        takes=("adapters",),
        dialects={"default": "the weight times the adapter's scale goes into B", "peft": "PEFT 0.21.2: the same sum"},
        deviations=(
            "PEFT 0.21.2 copies use_rslora from the first adapter into the result, which is then too large by the "
            "square root of its rank; here the result never asks for rsLoRA",
        ),
    )

    def merge(self, spec: MatrixSpec, deltas: Sequence[Delta], state: Any = None) -> Merged:
        """The factors side by side."""
        import torch

        from ...adapters.model import Factors

        factors = [d for d in deltas if isinstance(d, Factors)]
        weights = spec.params["weight"]
        b = torch.cat([f.b * w for f, w in zip(factors, weights, strict=True)], dim=1)
        a = torch.cat([f.a for f in factors], dim=0)
        return Merged(Factors(b, a), {"rank": int(b.shape[1]), "route": "concatenated"})
