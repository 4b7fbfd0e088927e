"""The passes behind learned coefficients on the CUDA backend; see dispatch.LearnedBackend.

Sums wait for the device, since their results are numbers on the host; `mask_merge` returns before it is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .._native import to_torch
from ..ops.learned import MaskMerge, Relaxed, SegDot
from ..tensors import CANONICAL_BLOCK, F32, DType, Piece, TensorView
from . import _cuda_launches as launches
from ._cuda_plan import address
from ._device import Operands, operands

if TYPE_CHECKING:
    import torch

    from .._cpu import BlockSums

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
    """See dispatch.LearnedBackend. `threads` has no effect."""
    if piece.numel == 0:
        return
    inputs = operands(base, models, compute)
    slope, z = _one(gradient, compute), _one(logits, compute)
    found = _room(len(models) * request.groups, piece, inputs)
    with launches.launching():
        launches.native().seg_dot(
            request.groups,
            (request.seed, request.tensor),
            None if request.mask is None else _mask(request.mask),
            launches.box(piece),
            address(inputs.base),
            [address(x) for x in inputs.models],
            _side(slope),
            _side(z),
            inputs.dtype.code,
            compute.code,
            found.data_ptr(),
            *launches.queue_of(found),
        )
    _keep(found, sums, piece)


def mask_sum(
    request: Relaxed, sums: BlockSums, piece: Piece, logits: TensorView, *, compute: DType, threads: int
) -> None:
    """See dispatch.LearnedBackend. `threads` has no effect."""
    if piece.numel == 0:
        return
    z = operands(None, [logits], compute)
    found = _room(1, piece, z)
    with launches.launching():
        launches.native().mask_sum(
            _mask(request), launches.box(piece), _side(z), compute.code, found.data_ptr(), *launches.queue_of(found)
        )
    _keep(found, sums, piece)


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
    """See dispatch.LearnedBackend. `threads` has no effect."""
    import torch

    if piece.numel == 0:
        return
    inputs = operands(base, models, compute)
    slope, z = _one(gradient, compute), _one(logits, compute)
    target = to_torch(out)
    result = target if target.is_contiguous() else torch.empty(target.shape, dtype=target.dtype, device=target.device)
    with launches.launching():
        launches.native().mask_merge(
            request.weights,
            request.shift,
            _mask(request.mask),
            launches.box(piece),
            address(inputs.base),
            [address(x) for x in inputs.models],
            _side(slope),
            _side(z),
            (address(result), out.dtype.code),
            inputs.dtype.code,
            compute.code,
            *launches.queue_of(result),
        )
    if result is not target:
        target.copy_(result)


def _one(view: TensorView | None, compute: DType) -> Operands | None:
    return None if view is None else operands(None, [view], compute)


def _side(found: Operands | None) -> tuple[int, int]:
    """Address and dtype of an input with a dtype of its own."""
    return (0, F32.code) if found is None else (address(found.present[0]), found.dtype.code)


def _mask(mask: Relaxed) -> tuple[float, float, int, int]:
    return (mask.temperature, mask.mean, mask.seed, mask.tensor)


def _room(slots: int, piece: Piece, inputs: Operands) -> torch.Tensor:
    """A number for each slot and canonical block."""
    import torch

    blocks = -(-piece.numel // CANONICAL_BLOCK)
    return torch.empty((slots, blocks), dtype=torch.float64, device=inputs.present[0].device)


def _keep(found: torch.Tensor, sums: BlockSums, piece: Piece) -> None:
    host = found.cpu()
    for slot in range(host.shape[0]):
        sums.set(slot, 0, piece.g0 // CANONICAL_BLOCK, memoryview(host[slot].numpy()))  # type: ignore[arg-type]
