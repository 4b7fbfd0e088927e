"""svd_clamp: the entries of U S and V^T limited to a quantile of all of them, as PEFT and sd-scripts offer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..protocol import Param

if TYPE_CHECKING:
    import torch

    from ...adapters.model import Factors

__all__ = ["SVD_CLAMP", "clamping"]

SVD_CLAMP = Param(
    "svd_clamp",
    "float",
    "quantile of the entries of [U S, V^T] to which both are limited in magnitude; absent: no limit",
    default=None,
    low=0.0,
    high=1.0,
)


def clamping(params: Mapping[str, Any]) -> Callable[[Factors], Factors] | None:
    """What `svd_clamp` does to truncated factors; None if there is none."""
    share = params.get("svd_clamp")
    return None if share is None else lambda factors: clamp(factors, share)


def clamp(factors: Factors, share: float) -> Factors:
    """Both factors limited to +- the quantile `share` of all their entries, signs as of `with_signs`."""
    import torch

    from ...adapters.model import Factors
    from ...adapters.truncate import with_signs

    signed = with_signs(factors)
    limit = _quantile(torch.cat([signed.b.reshape(-1), signed.a.reshape(-1)]), share)
    return Factors(signed.b.clamp(-limit, limit), signed.a.clamp(-limit, limit))


def _quantile(values: torch.Tensor, share: float) -> float:
    """The quantile by linear interpolation; torch.quantile takes at most 2^24 values."""
    if values.numel() == 0:
        return 0.0
    place = share * (values.numel() - 1)
    low = math.floor(place)
    below = float(values.kthvalue(low + 1).values)
    if low == place:
        return below
    return below + (place - low) * (float(values.kthvalue(low + 2).values) - below)
