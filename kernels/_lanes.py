"""The tree over the lanes of canonical blocks: a part of the Triton kernels that sum."""

# mypy: ignore-errors
# Branches on constexpr stay statements, of which Triton compiles one; results are taken apart whole.

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["LANES", "fold_lanes"]

LANES = tl.constexpr(256)


@triton.jit
def _fold(lanes, WIDTH: tl.constexpr):
    """Adds the upper half of the lanes to the lower: [n, WIDTH] -> [n, WIDTH / 2].

    A sum of two numbers has no order, so that the reduction over an axis of two is exact in any layout.
    """
    halves = tl.reshape(lanes, [lanes.shape[0], 2, WIDTH // 2])
    return tl.sum(halves, axis=1)


@triton.jit
def fold_lanes(lanes):
    """The sums of rows of 256 lanes, combined by a tree of strides 128, 64, ... 1: [n, 256] -> [n]."""
    lanes = _fold(lanes, 256)
    lanes = _fold(lanes, 128)
    lanes = _fold(lanes, 64)
    lanes = _fold(lanes, 32)
    lanes = _fold(lanes, 16)
    lanes = _fold(lanes, 8)
    lanes = _fold(lanes, 4)
    lanes = _fold(lanes, 2)
    return tl.reshape(lanes, [lanes.shape[0]])
