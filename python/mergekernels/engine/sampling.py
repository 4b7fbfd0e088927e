"""Which blocks of a tensor a sample visits. The choice affects only how many sweeps follow, never a result."""

from __future__ import annotations

from ..ops.selection import SAMPLE_BLOCK

__all__ = ["sample_starts"]

_MASK = 2**64 - 1


def sample_starts(n: int, fraction: float, tensor: int) -> list[int]:
    """First elements of the sampled blocks: one block of 256 at a random place in each of equal strides.

    n : elements of the tensor. fraction : of them to visit. tensor : the tensor's id, which seeds the places. The
    places vary within a stride so that no period of the tensor (a row) can hide from them. A tensor below one block
    gives none.
    """
    if n < SAMPLE_BLOCK:
        return []
    blocks = max(1, min(n // SAMPLE_BLOCK, round(n * fraction / SAMPLE_BLOCK)))
    stride = n // blocks
    room = stride - SAMPLE_BLOCK + 1
    state = tensor
    starts = []
    for i in range(blocks):
        state = (state * 6364136223846793005 + 1442695040888963407) & _MASK
        starts.append(i * stride + (state >> 33) % room)
    return starts
