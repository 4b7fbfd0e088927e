"""The calls of sd-mecha's merge methods, with their arguments, answered here."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...ops import Program, stream
from .._hooks import NotServed
from .._plain import check_alike, check_plain, finite_only
from . import draws, truncate
from .ties import elected, stock_factor, ties, wide

if TYPE_CHECKING:
    import torch

__all__ = ["CALLS"]


def _ties_sum(*models: Any, k: float = 1.0, vote_sgn: bool = False) -> Any:
    if not models:
        return 0
    plain = check_alike(models)
    if plain[0].numel() == 0:
        return models[0]
    with finite_only():
        return ties(plain, k, bool(vote_sgn))


def _ties_sum_extended(
    *models: Any,
    k: float = 0.2,
    vote_sgn: bool = False,
    apply_stock: bool = False,
    apply_median: bool = False,
    cos_eps: float = 1e-6,
    eps: float = 1e-6,
    maxiter: int = 100,
    ftol: float = 1e-20,
) -> Any:
    if not models:
        return 0
    plain = check_alike(models)
    if plain[0].numel() == 0:
        return models[0]
    if apply_median:
        raise NotServed("a geometric median")
    with finite_only():
        # The name says the opposite: sd-mecha applies the factor unless it is told to.
        if apply_stock:
            return ties(plain, k, bool(vote_sgn))
        return elected(plain, k, bool(vote_sgn), cos_eps)


def _ties_sum_with_dropout(
    *deltas: Any,
    probability: Any = 0.9,
    della_eps: float = 0.0,
    rescale: bool = True,
    k: float = 0.2,
    vote_sgn: bool = False,
    apply_stock: bool = False,
    cos_eps: float = 1e-6,
    apply_median: bool = False,
    eps: float = 1e-6,
    maxiter: int = 100,
    ftol: float = 1e-20,
    seed: int | None = None,
) -> Any:
    dropped = _number(probability)
    if not deltas or math.isclose(dropped, 1.0):
        return 0
    plain = check_alike(deltas)
    if apply_median:
        raise NotServed("a geometric median")
    divisor = 1.0 - dropped if rescale else 1.0
    if plain[0].numel() == 0:
        return plain[0] / divisor
    chosen = draws.UNSEEDED if seed is None or seed < 0 else seed % 2**64
    with finite_only():
        kept = draws.masked(plain, dropped, della_eps, chosen)
        result = ties(kept, k, bool(vote_sgn)) if apply_stock else elected(kept, k, bool(vote_sgn), cos_eps)
    return result.div_(divisor)


def _dropout(
    *deltas: Any,
    probability: float = 0.9,
    rescale: float = 1.0,
    overlap: float = 1.0,
    overlap_emphasis: float = 0.0,
    seed: int | None = None,
) -> Any:
    if not deltas:
        return 0
    if overlap % 2 != 1:
        raise NotServed("an overlap that is not odd")
    if seed is not None and seed < 0:
        raise NotServed("a negative seed")
    plain = check_alike(deltas)
    divisor = draws.rescaling(probability, rescale)
    if plain[0].numel() == 0:
        return plain[0].clone()
    chosen = int.from_bytes(os.urandom(8), "little") if seed is None else seed % 2**64
    with finite_only():
        return draws.averaged(plain, probability, divisor, chosen)


def _model_stock(*deltas: Any, cos_eps: float = 1e-6) -> Any:
    import torch

    if not deltas:
        raise NotServed("no models")
    plain = check_alike(deltas)
    if plain[0].numel() == 0:
        raise NotServed("an empty tensor")
    dtype = wide(plain[0])
    factor = stock_factor([d.to(dtype) for d in plain], cos_eps)
    with finite_only():
        mean = stream(
            plain,
            Program((1.0,) * len(plain), (None,) * len(plain), base=False, divisor="value", divisor_value=len(plain)),
            out_dtype=dtype,
        )
    return torch.nan_to_num_(mean.mul_(factor)).to(plain[0].dtype)


def _truncate_rank(
    a: Any,
    rank: float = 8,
    use_approximate_basis: bool = True,
    approximate_basis_iters: int = 2,
    approximate_basis_seed: int | None = None,
    **context: Any,
) -> Any:
    if a.dim() < 2:
        return a
    if context.get("cache") is not None:
        raise NotServed("a cache of factors")
    matrix = check_plain(a).flatten(start_dim=1)
    target = min(max(round(rank), 0), *matrix.shape)
    if target == min(matrix.shape):
        return a
    if target == 0:
        return matrix.new_zeros(a.shape)
    if matrix.dtype != wide(matrix):
        raise NotServed("a decomposition in 16 bits")
    if not math.isfinite(float(matrix.amax())) or not math.isfinite(float(matrix.amin())):
        raise NotServed("values that are not finite")
    if use_approximate_basis:
        result = truncate.in_random_basis(matrix, target, approximate_basis_iters, approximate_basis_seed)
    else:
        result = truncate.best(matrix, target)
    return result.reshape(a.shape)


def _number(probability: float | torch.Tensor) -> float:
    """The probability of a method whose parameter is a tensor."""
    import torch

    if isinstance(probability, torch.Tensor) and probability.numel() != 1:
        raise NotServed("a probability per element")
    return float(probability)


CALLS: dict[str, Callable[..., Any]] = {
    "ties_sum": _ties_sum,
    "ties_sum_extended": _ties_sum_extended,
    "ties_sum_with_dropout": _ties_sum_with_dropout,
    "dropout": _dropout,
    "model_stock": _model_stock,
    "truncate_rank": _truncate_rank,
}
"""What answers, by the identifier of the merge method. Its signature is the one that is known."""
