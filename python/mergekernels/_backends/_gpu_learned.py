"""What the GPU backends share in the passes behind learned coefficients: operands, and sums for the host."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..tensors import CANONICAL_BLOCK, DType, Piece, TensorView
from ._device import Operands, operands

if TYPE_CHECKING:
    import torch

    from .._cpu import BlockSums

__all__ = ["block_sums", "hand_over", "operand"]


def operand(view: TensorView | None, compute: DType) -> Operands | None:
    """One tensor with a dtype of its own, if it is there."""
    return None if view is None else operands(None, [view], compute)


def block_sums(slots: int, piece: Piece, inputs: Operands) -> torch.Tensor:
    """Room for a number of each slot and canonical block, [slots, blocks] in float64, uninitialised."""
    import torch

    blocks = -(-piece.numel // CANONICAL_BLOCK)
    return torch.empty((slots, blocks), dtype=torch.float64, device=inputs.present[0].device)


def hand_over(found: torch.Tensor, sums: BlockSums, piece: Piece) -> None:
    """Waits for the device and writes its numbers to their blocks."""
    host = found.cpu()
    for slot in range(host.shape[0]):
        sums.set(slot, 0, piece.g0 // CANONICAL_BLOCK, memoryview(host[slot].numpy()))  # type: ignore[arg-type]
