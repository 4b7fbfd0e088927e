"""`divergence` in Triton: the sums behind the divergence of the softmax of each row, over canonical blocks."""

# mypy: ignore-errors
# Branches on constexpr stay statements, of which Triton compiles one; results are taken apart whole.

from __future__ import annotations

import triton
import triton.language as tl

from ._common import BASE, HEADER, divide, load
from ._lanes import fold_lanes
from ._transcendental import exp, log

__all__ = ["divergence_kernel"]

_ROWS = tl.constexpr(15)
_COLS = tl.constexpr(16)


@triton.jit
def _grown(x, largest):
    """E = C(exp(x - the largest of the row)), largest [rows] for x [rows, 256]."""
    return exp((x - largest[:, None]).to(tl.float64)).to(x.dtype)


@triton.jit
def _share(x, largest, total):
    """C(e / Z) + C(1e-8)."""
    e = _grown(x, largest)
    zero = tl.zeros(x.shape, x.dtype)
    # A double, rounded to the compute dtype once.
    small = tl.full(x.shape, 1e-8, tl.float64).to(x.dtype)
    return divide(e, zero + total[:, None]) + small


@triton.jit
def divergence_kernel(
    table,
    maxima,
    totals,
    sums_ptr,
    TERMS: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Block sums of e of the model and of the base, or with TERMS of p * log(p / q); see `dispatch.Backend`.

    Reads 2 * itemsize bytes per element, writes 16 (with TERMS 8) bytes per block.

    table : int64 header, with the rows and columns, and the row (address) of the model. maxima, totals : compute dtype
    [2, rows], the model's first. sums : float64 [2 or 1, rows, blocks of a row].
    """
    rows = tl.load(table + _ROWS)
    cols = tl.load(table + _COLS)
    blocks = (cols + 4095) // 4096
    k = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS).to(tl.int64)
    row = k // blocks
    block = k % blocks
    there = row < rows
    left = cols - block * 4096
    longest = tl.minimum(cols, 4096)
    lane = tl.arange(0, 256).to(tl.int64)
    largest = tl.load(maxima + row, mask=there, other=0)
    largest_base = tl.load(maxima + rows + row, mask=there, other=0)
    if TERMS:
        total = tl.load(totals + row, mask=there, other=1)
        total_base = tl.load(totals + rows + row, mask=there, other=1)
    zero = tl.zeros([BLOCKS, 256], tl.float64)
    lanes = zero
    lanes_base = zero
    for i in range(0, (longest + 255) // 256):
        at = i * 256 + lane
        e = (row * cols + block * 4096)[:, None] + at[None, :]
        mask = there[:, None] & (at[None, :] < left[:, None])
        x = load(tl.load(table + HEADER), e, mask, DTYPE, COMPUTE, True, ALIGNED)[1]
        x0 = load(tl.load(table + BASE), e, mask, DTYPE, COMPUTE, True, ALIGNED)[1]
        if TERMS:
            p = _share(x, largest, total)
            q = _share(x0, largest_base, total_base)
            ratio = log(divide(p, q).to(tl.float64)).to(x.dtype)
            lanes = lanes + tl.where(mask, (p * ratio).to(tl.float64), zero)
        else:
            lanes = lanes + tl.where(mask, _grown(x, largest).to(tl.float64), zero)
            lanes_base = lanes_base + tl.where(mask, _grown(x0, largest_base).to(tl.float64), zero)
    tl.store(sums_ptr + k, fold_lanes(lanes), mask=there)
    if TERMS == 0:
        tl.store(sums_ptr + rows * blocks + k, fold_lanes(lanes_base), mask=there)
