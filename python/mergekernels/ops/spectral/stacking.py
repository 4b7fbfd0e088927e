"""Weighted sums of products of factors, kept in factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...adapters.model import Factors
from ...errors import ArgumentError

if TYPE_CHECKING:
    import torch

__all__ = ["balance", "stack"]


def stack(deltas: Sequence[Factors], weights: Sequence[float] | None = None) -> Factors:
    """The sum of w_t b_t a_t, exactly, as the concatenation of the factors: rank sum r_t.

    deltas : at least one, all of one shape (m, n) and on one device; ranks may differ and may be 0. weights : one
    number each, default 1; they are multiplied into b. The dtype is float64 if any factor is, else float32.
    Errors: ArgumentError where shapes or counts do not fit.
    """
    import torch

    if not deltas:
        raise ArgumentError("stack needs at least one product", code="argument.deltas")
    if weights is not None and len(weights) != len(deltas):
        raise ArgumentError(
            "stack needs one weight per product",
            code="argument.weights",
            expected=str(len(deltas)),
            got=str(len(weights)),
        )
    shapes = {d.shape for d in deltas}
    if len(shapes) != 1:
        raise ArgumentError(
            "stack needs products of one shape", code="argument.shape", got=", ".join(str(s) for s in sorted(shapes))
        )
    wide = deltas[0].b.dtype
    for d in deltas:
        wide = torch.promote_types(torch.promote_types(wide, d.b.dtype), d.a.dtype)
    if weights is None:
        weights = [1.0] * len(deltas)
    b = torch.cat([d.b.to(wide) if w == 1.0 else d.b.to(wide) * w for d, w in zip(deltas, weights, strict=True)], 1)
    return Factors(b, torch.cat([d.a.to(wide) for d in deltas], 0))


def balance(b: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors with column i of b and row i of a scaled by powers of two to norms within a factor 2: same product.

    Scaling by a power of two is exact, so every element of b @ a keeps its bits unless an exponent leaves the range.
    Units of which either side is zero are left as they are.
    """
    import torch

    left = torch.linalg.vector_norm(b, dim=0, dtype=torch.float64)
    right = torch.linalg.vector_norm(a, dim=1, dtype=torch.float64)
    both = (left > 0) & (right > 0)
    half = torch.where(both, (torch.log2(right / left) / 2).round(), torch.zeros_like(left))
    scale = torch.exp2(half).to(b.dtype)
    return b * scale, a / scale[:, None]
