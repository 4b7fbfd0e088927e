"""`seg_dot`, `mask_sum` and `mask_merge`, the specification; see ops.learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..._native import to_torch
from ...ops.learned import GROUP_PURPOSE, MASK_PURPOSE, MaskMerge, Relaxed, SegDot
from ...tensors import CANONICAL_BLOCK, DType, Piece, TensorView
from .common import block_sums, constant, delta, flat_index, load, ordered_sum, philox, to_dtype
from .stream import canonical_nan
from .transcendental import in_compute, log, sigmoid

if TYPE_CHECKING:
    from ..._cpu import BlockSums

__all__ = ["mask_merge", "mask_sum", "seg_dot"]


def seg_dot(
    request: SegDot,
    sums: BlockSums,
    piece: Piece,
    base: TensorView | None,
    models: Sequence[TensorView],
    gradient: TensorView,
    logits: TensorView | None,
    *,
    compute: DType,
    threads: int,
) -> None:
    """See dispatch.Backend. `threads` has no effect."""
    deltas = _deltas(base, models, compute)
    g = flat_index(piece, deltas[0].device)
    slope = load(gradient, compute).double()
    if request.mask is not None:
        assert logits is not None
        mask = _normalised(_mask(request.mask, g, load(logits, compute)), request.mask.mean)
        deltas = [mask * d for d in deltas]
    word = philox(request.seed, request.tensor, GROUP_PURPOSE, g)
    group = (word * request.groups) >> 32
    zero = torch.zeros_like(slope)
    for t, d in enumerate(deltas):
        products = slope * d.double()
        for k in range(request.groups):
            _set(sums, t * request.groups + k, piece, torch.where(group == k, products, zero))


def mask_sum(
    request: Relaxed, sums: BlockSums, piece: Piece, logits: TensorView, *, compute: DType, threads: int
) -> None:
    """See dispatch.Backend. `threads` has no effect."""
    z = load(logits, compute)
    _set(sums, 0, piece, _mask(request, flat_index(piece, z.device), z).double())


def mask_merge(
    request: MaskMerge,
    piece: Piece,
    base: TensorView | None,
    models: Sequence[TensorView],
    gradient: TensorView | None,
    logits: TensorView,
    out: TensorView,
    *,
    compute: DType,
    threads: int,
) -> None:
    """See dispatch.Backend. `threads` has no effect."""
    z = load(logits, compute)
    m = _mask(request.mask, flat_index(piece, z.device), z)
    deltas = _deltas(base, models, compute)
    s = ordered_sum([constant(w, d) * d for w, d in zip(request.weights, deltas, strict=True)])
    if request.shift is None:
        y = _normalised(m, request.mask.mean) * s
        y = y if base is None else load(base, compute) + y
    else:
        assert gradient is not None
        mean = constant(request.mask.mean, s)
        y = (load(gradient, compute) * s - constant(request.shift, s)) / mean
        y = ((y * m) * (1 - m)) / constant(request.mask.temperature, s)
        y = torch.where(mean == 0, torch.zeros_like(y), y)
    target = to_torch(out)
    target.copy_(canonical_nan(to_dtype(y, target.dtype)).reshape(target.shape))


def _deltas(base: TensorView | None, models: Sequence[TensorView], compute: DType) -> list[torch.Tensor]:
    x0 = None if base is None else load(base, compute)
    return [delta(load(view, compute), x0) for view in models]


def _mask(request: Relaxed, g: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    word = philox(request.seed, request.tensor, MASK_PURPOSE, g)
    u = (((word >> 9).double() + 0.5) * 2.0**-23).to(z.dtype)
    r = (z + in_compute(log, u)) - in_compute(log, 1 - u)
    return in_compute(sigmoid, r / constant(request.temperature, z))


def _normalised(m: torch.Tensor, mean: float) -> torch.Tensor:
    divisor = constant(mean, m)
    return torch.where(divisor == 0, torch.zeros_like(m), m / divisor)


def _set(sums: BlockSums, slot: int, piece: Piece, products: torch.Tensor) -> None:
    sums.set(slot, 0, piece.g0 // CANONICAL_BLOCK, block_sums(products).cpu().numpy().data)
