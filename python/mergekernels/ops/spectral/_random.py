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


def normal(rows: int, cols: int, seed: int, draw: int, like: torch.Tensor) -> torch.Tensor:
    """A (rows, cols) block of standard normal numbers, computed in float64 from two Philox words each (Box-Muller)."""
    import math

    import torch

    from ..._backends.reference.common import philox

    count = rows * cols
    words = philox(seed, draw, PURPOSE + 1, torch.arange(2 * count)).to(torch.float64).view(count, 2)
    radius = (-2.0 * ((words[:, 0] + 0.5) * 2.0**-32).log()).sqrt()
    numbers = radius * (words[:, 1] * (2.0 * math.pi * 2.0**-32)).cos()
    return numbers.view(rows, cols).to(device=like.device, dtype=like.dtype)
