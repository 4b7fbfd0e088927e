"""The passes behind learned coefficients on the Triton backend; see dispatch.LearnedBackend.

Sums wait for the device, since their results are numbers on the host; `mask_merge` returns before it is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .._native import to_torch, torch_dtype
from ..ops.learned import MaskMerge, Relaxed, SegDot
from ..tensors import BF16, F32, DType, Piece, TensorView
from ._device import Operands, operands
from ._gpu_learned import block_sums, hand_over, operand
from ._triton_ranks import run
from ._triton_tables import interpreted, kernels

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
    slope, z = operands(None, [gradient], compute), operand(logits, compute)
    device = inputs.present[0].device
    num_slots = len(models) * request.groups
    found = block_sums(num_slots, piece, inputs)
    tables = _tables(piece, inputs, slope, z, (request.seed, request.tensor), request.mask, 0)
    constants = {
        "NUM_MODELS": len(models),
        "GROUPS": request.groups,
        "HAS_MASK": request.mask is not None,
        **_dtypes(inputs, slope, z, compute),
        "BLOCKS": kernels("learned").SUM_BLOCKS,
    }
    grid = (num_slots * -(-found.shape[1] // kernels("learned").SUM_BLOCKS),)
    arguments = (tables[0], _coefficients(request.mask, None, (), compute, device), found)
    run(kernels("learned").seg_dot_kernel, grid, arguments, constants)
    hand_over(found, sums, piece)


def mask_sum(
    request: Relaxed, sums: BlockSums, piece: Piece, logits: TensorView, *, compute: DType, threads: int
) -> None:
    """See dispatch.LearnedBackend. `threads` has no effect."""

    if piece.numel == 0:
        return
    z = operands(None, [logits], compute)
    device = z.present[0].device
    found = block_sums(1, piece, z)
    tables = _tables(piece, None, None, z, (0, 0), request, 0)
    constants = {"LOGITS": z.dtype.code, "COMPUTE": compute.code, "BLOCKS": kernels("learned").SUM_BLOCKS}
    grid = (-(-found.shape[1] // kernels("learned").SUM_BLOCKS),)
    arguments = (tables[0], _coefficients(request, None, (), compute, device), found)
    run(kernels("learned").mask_sum_kernel, grid, arguments, constants)
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

    inputs, z = operands(base, models, compute), operands(None, [logits], compute)
    slope = operand(gradient, compute)
    target = to_torch(out)
    result = target if target.is_contiguous() else torch.empty(target.shape, dtype=target.dtype, device=target.device)
    common = kernels("_common")
    block = common.block_size(inputs.dtype.itemsize, interpreted())
    tables = _tables(piece, inputs, slope, z, (0, 0), request.mask, piece.numel // block * block)
    constants = {
        "SLOPE": request.shift is not None,
        "NUM_MODELS": len(models),
        **_dtypes(inputs, slope, z, compute),
        "OUT": out.dtype.code,
        "ALIGNED": inputs.aligned,
        "BLOCK": block,
    }
    flat = result.view(-1)
    # bfloat16 is written as the integers that the kernel makes.
    written = flat.view(torch.int16) if out.dtype is BF16 else flat
    coefficients = _coefficients(request.mask, request.shift, request.weights, compute, target.device)
    kernel = kernels("learned").mask_merge_kernel
    if piece.numel >= block:
        run(kernel, (piece.numel // block,), (tables[0], coefficients, written), constants | {"MASKED": False})
    if piece.numel % block:
        run(kernel, (1,), (tables[1], coefficients, written), constants | {"MASKED": True})
    if result is not target:
        target.copy_(result)


def _dtypes(inputs: Operands, slope: Operands | None, z: Operands | None, compute: DType) -> dict[str, Any]:
    return {
        "HAS_BASE": inputs.base is not None,
        "DTYPE": inputs.dtype.code,
        "GRADIENT": F32.code if slope is None else slope.dtype.code,
        "LOGITS": F32.code if z is None else z.dtype.code,
        "COMPUTE": compute.code,
    }


def _tables(
    piece: Piece,
    inputs: Operands | None,
    slope: Operands | None,
    z: Operands | None,
    group: tuple[int, int],
    mask: Relaxed | None,
    tail: int,
) -> torch.Tensor:
    """The tables of the launch over whole blocks and of the tail that begins at `tail`: int64 [2, ...]."""
    import torch

    def address(found: Operands | None) -> int:
        return 0 if found is None else found.present[0].data_ptr()

    base = 0 if inputs is None or inputs.base is None else inputs.base.data_ptr()
    draw = (0, 0) if mask is None else (mask.seed, mask.tensor)
    header = [piece.numel, piece.g0, 0, base, address(slope), address(z), *group, *draw]
    header += [0] * (kernels("learned").HEADER_SIZE - len(header))
    row = header + ([] if inputs is None else [x.data_ptr() for x in inputs.models if x is not None])
    # Seeds are unsigned; int64 holds the same bits.
    row = [x - (1 << 64) if x >> 63 else x for x in row]
    tables = torch.tensor([row, row], dtype=torch.int64)
    tables[1, 2] = tail
    some = z if inputs is None else inputs
    assert some is not None
    return tables.to(some.present[0].device)


def _coefficients(
    mask: Relaxed | None, shift: float | None, weights: tuple[float, ...], compute: DType, device: torch.device
) -> torch.Tensor:
    import torch

    numbers = [1.0, 1.0] if mask is None else [mask.temperature, mask.mean]
    numbers += [0.0 if shift is None else shift, 0.0, *weights]
    return torch.tensor(numbers, dtype=torch.float64).to(torch_dtype(compute)).to(device)
