"""The host side of exact sums that the GPU backends share: block sums come to the host and are folded there.

Every function waits for the device: its result is numbers on the host.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .._native import torch_dtype
from ..ops.program import Program
from ..ops.sums import Gram, Reduce
from ..tensors import CANONICAL_BLOCK, DType, Piece, TensorView
from ._device import operands
from ._gpu import extras_for
from ._launches import Launches

if TYPE_CHECKING:
    import torch

    from .._cpu import BlockSums

__all__ = ["divergence", "gram", "reduce"]


def gram(
    launches: Launches,
    request: Gram,
    sums: BlockSums,
    piece: Piece,
    base: TensorView | None,
    models: Sequence[TensorView],
    *,
    compute: DType,
) -> None:
    """`Backend.gram` by the launches of a backend."""
    import torch

    if piece.numel == 0:
        return
    inputs = operands(base if request.subtract else None, models, compute)
    segments = request.segments
    columns = segments.axis == "columns"
    row_length = segments.count if columns else segments.length
    rows, cols = (1, piece.numel) if segments.axis == "tensor" else _box(piece, row_length)
    count, length = (cols, rows) if columns else (rows, cols)
    blocks = -(-length // CANONICAL_BLOCK)
    num_pairs = len(models) * (len(models) + 1) // 2
    found = torch.empty((num_pairs, count, blocks), dtype=torch.float64, device=inputs.present[0].device)
    launches.launch_gram(request.subtract, columns, inputs, rows, cols, compute, found)
    if segments.axis == "tensor":
        segment, block = 0, piece.g0 // CANONICAL_BLOCK
    else:
        row, column = divmod(piece.g0, row_length)
        segment, block = (column, row // CANONICAL_BLOCK) if columns else (row, column // CANONICAL_BLOCK)
    host = found.cpu()
    for slot in range(num_pairs):
        if blocks == sums.blocks_per_segment:
            sums.set(slot, segment, 0, _doubles(host[slot]))
        else:
            for s in range(count):
                sums.set(slot, segment + s, block, _doubles(host[slot, s]))


def reduce(
    launches: Launches,
    program: Program,
    request: Reduce,
    sums: BlockSums,
    piece: Piece,
    base: TensorView | None,
    models: Sequence[TensorView],
    *,
    compute: DType,
) -> None:
    """`Backend.reduce` by the launches of a backend."""
    import torch

    if piece.numel == 0:
        return
    inputs = operands(base, models, compute)
    num_slots = request.num_slots(len(program.weights))
    blocks = -(-piece.numel // CANONICAL_BLOCK)
    found = torch.empty((num_slots, blocks), dtype=torch.float64, device=inputs.present[0].device)
    extras = extras_for(launches, program, inputs, piece, compute, ())
    launches.launch_reduce(program, request.quantities, inputs, piece, compute, found, extras)
    host = found.cpu()
    for slot in range(num_slots):
        sums.set(slot, 0, piece.g0 // CANONICAL_BLOCK, _doubles(host[slot]))


def divergence(
    launches: Launches,
    row_length: int,
    piece: Piece,
    base: TensorView,
    model: TensorView,
    *,
    compute: DType,
) -> array[float]:
    """`Backend.divergence` by the launches of a backend."""
    import torch

    if piece.numel == 0:
        return array("d")
    inputs = operands(base, [model], compute)
    rows = piece.numel // row_length
    dtype = torch_dtype(compute)
    # The largest value of a row is exact in any dtype and order; torch keeps a NaN.
    maxima = torch.stack([x.view(rows, row_length).amax(1) for x in (inputs.models[0], inputs.base) if x is not None])
    maxima = maxima.to(dtype)
    blocks = -(-row_length // CANONICAL_BLOCK)
    found = torch.empty((2, rows, blocks), dtype=torch.float64, device=maxima.device)
    launches.launch_divergence(inputs, rows, row_length, compute, maxima, None, found)
    totals = _fold(found).to(dtype)
    launches.launch_divergence(inputs, rows, row_length, compute, maxima, totals, found[:1])
    result = _fold(found[0])
    # A NaN stays.
    return array("d", torch.where(result < 0, torch.zeros_like(result), result).tolist())


def _box(piece: Piece, row_length: int) -> tuple[int, int]:
    """Rows and columns of a piece; a flat run of whole rows counts as such."""
    if piece.rows == 1 and piece.cols > row_length:
        return piece.cols // row_length, row_length
    return piece.rows, piece.cols


def _fold(sums: torch.Tensor) -> torch.Tensor:
    """The tree over block numbers along the last axis: adjacent pairs, a missing right child passes the left one."""
    import torch

    while sums.shape[-1] > 1:
        even = sums.shape[-1] // 2 * 2
        pairs = sums[..., 0:even:2] + sums[..., 1:even:2]
        sums = torch.cat([pairs, sums[..., even:]], dim=-1)
    return sums[..., 0]


def _doubles(x: torch.Tensor) -> memoryview:
    return memoryview(x.reshape(-1).contiguous().numpy())  # type: ignore[arg-type]
