"""The passes behind learned coefficients on the CUDA backend; see dispatch.LearnedBackend.

Sums wait for the device, since their results are numbers on the host; `mask_merge` returns before it is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .._native import to_torch
from ..ops.learned import MaskMerge, Relaxed, SegDot
from ..tensors import F32, DType, Piece, TensorView
from . import _cuda_launches as launches
from ._cuda_plan import address
from ._device import Operands, operands
from ._gpu_learned import block_sums, hand_over, operand

if TYPE_CHECKING:
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
    slope, z = operand(gradient, compute), operand(logits, compute)
    found = block_sums(len(models) * request.groups, piece, inputs)
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
    hand_over(found, sums, piece)


def mask_sum(
    request: Relaxed, sums: BlockSums, piece: Piece, logits: TensorView, *, compute: DType, threads: int
) -> None:
    """See dispatch.LearnedBackend. `threads` has no effect."""
    if piece.numel == 0:
        return
    z = operands(None, [logits], compute)
    found = block_sums(1, piece, z)
    with launches.launching():
        launches.native().mask_sum(
            _mask(request), launches.box(piece), _side(z), compute.code, found.data_ptr(), *launches.queue_of(found)
        )
    hand_over(found, sums, piece)


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
    slope, z = operand(gradient, compute), operand(logits, compute)
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


def _side(found: Operands | None) -> tuple[int, int]:
    """Address and dtype of an input with a dtype of its own."""
    return (0, F32.code) if found is None else (address(found.present[0]), found.dtype.code)


def _mask(mask: Relaxed) -> tuple[float, float, int, int]:
    return (mask.temperature, mask.mean, mask.seed, mask.tensor)
