"""Random signs from Philox, the same on every device."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PURPOSE = 0x53554253
"""Philox stream of start blocks, far from those of masks."""


def signs(rows: int, cols: int, seed: int, draw: int, like: torch.Tensor) -> torch.Tensor:
    """A (rows, cols) block of +1 and -1 in the dtype and on the device of `like`; `draw` tells blocks of a seed apart.

    Bit i % 32 of Philox word i // 32 decides element i, in row-major order.
    """
    import torch

    from ..._backends.reference.common import philox

    count = rows * cols
    words = philox(seed, draw, PURPOSE, torch.arange(-(-count // 32)))
    bits = (words[:, None] >> torch.arange(32)) & 1
    return (1 - 2 * bits.flatten()[:count]).view(rows, cols).to(device=like.device, dtype=like.dtype)
