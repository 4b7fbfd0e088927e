"""`gram` in Triton: dot products of all pairs of models, as sums over canonical blocks."""

# mypy: ignore-errors
# Branches on constexpr stay statements, of which Triton compiles one; results are taken apart whole.
# ruff: noqa: SIM108

from __future__ import annotations

import triton
import triton.language as tl

from ._common import ADDRESS, BASE, BF16, F16, F32, F64, HEADER, ROW, load
from ._lanes import fold_lanes

__all__ = ["gram_kernel", "tile"]


def tile(num_models: int, columns: bool) -> tuple[int, int]:
    """SIDE and BLOCKS: as many sums of lanes as fit into registers; adjacent columns fill what one access brings."""
    if columns or num_models == 1:
        return 1, 8 if columns else 4
    return (2, 4) if num_models == 2 else (4, 1)


_ROWS = tl.constexpr(15)
_COLS = tl.constexpr(16)


@triton.jit
def _vectors(
    table,
    first,
    x0,
    e,
    mask,
    SIDE: tl.constexpr,
    NUM_MODELS: tl.constexpr,
    HAS_BASE: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The vectors of models first .. first + SIDE - 1 as float64 [SIDE, ...]; models that are not there are zero."""
    t = first + tl.arange(0, SIDE)
    there = t < NUM_MODELS
    address = tl.load(table + HEADER + t * ROW + ADDRESS, mask=there, other=0)
    if DTYPE == BF16:
        p = address.to(tl.pointer_type(tl.int16))
    elif DTYPE == F16:
        p = address.to(tl.pointer_type(tl.float16))
    elif DTYPE == F32:
        p = address.to(tl.pointer_type(tl.float32))
    else:
        p = address.to(tl.pointer_type(tl.float64))
    use = there[:, None, None] & mask[None, :, :]
    raw = tl.load(p[:, None, None] + e[None, :, :], mask=use, other=0)
    x = raw
    if DTYPE == BF16:
        x = (raw.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    if COMPUTE == F64:
        x = x.to(tl.float64)
    else:
        x = x.to(tl.float32)
    if HAS_BASE:
        x = tl.where(use, x - x0[None, :, :], x)
    return x.to(tl.float64)


@triton.jit
def gram_kernel(
    table,
    sums_ptr,
    NUM_MODELS: tl.constexpr,
    SIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    HAS_BASE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """sums[pair, segment, block] = sum of vi * vj over a canonical block of a segment, float64; v = x - base or x.

    A segment is a row of the box, or with COLUMNS a column. Lane i mod 256 adds its 16 elements in order; the lanes are
    combined by a tree of strides 128, 64, ... 1. A program takes SIDE x SIDE pairs and BLOCKS blocks: consecutive
    blocks of rows, or with COLUMNS the same block of consecutive columns.
    Reads (2 * SIDE + HAS_BASE) * itemsize bytes per element and pair of sides, all but the first from the cache (the
    pairs of a block run side by side); writes 8 bytes per block and pair.

    Grid: sides i, the fastest, times sides j times programs of BLOCKS blocks; programs with i > j do nothing.
    table : int64 header, with the rows and columns of the box, and one row (address) per model.
    """
    rows = tl.load(table + _ROWS)
    cols = tl.load(table + _COLS)
    work = tl.program_id(0).to(tl.int64)
    sides = (NUM_MODELS + SIDE - 1) // SIDE
    side_i = (work % sides).to(tl.int32) * SIDE
    side_j = (work // sides % sides).to(tl.int32) * SIDE
    k = work // (sides * sides) * BLOCKS + tl.arange(0, BLOCKS).to(tl.int64)
    if COLUMNS:
        segments = cols
        length = rows
        blocks = (length + 4095) // 4096
        segment = k % segments
        block = k // segments
        start = block * 4096 * cols + segment
        step = cols
    else:
        segments = rows
        length = cols
        blocks = (length + 4095) // 4096
        segment = k // blocks
        block = k % blocks
        start = segment * cols + block * 4096
        step = 1
    there = k < segments * blocks
    left = length - block * 4096
    longest = tl.minimum(length, 4096)
    lane = tl.arange(0, 256).to(tl.int64)
    if side_i <= side_j:
        lanes = tl.zeros([SIDE, SIDE, BLOCKS, 256], tl.float64)
        for i in range(0, (longest + 255) // 256):
            at = i * 256 + lane
            e = start[:, None] + at[None, :] * step
            mask = there[:, None] & (at[None, :] < left[:, None])
            x0 = tl.zeros([BLOCKS, 256], tl.float64 if COMPUTE == F64 else tl.float32)
            if HAS_BASE:
                x0 = load(tl.load(table + BASE), e, mask, DTYPE, COMPUTE, True, ALIGNED)[1]
            vi = _vectors(table, side_i, x0, e, mask, SIDE, NUM_MODELS, HAS_BASE, DTYPE, COMPUTE)
            vj = _vectors(table, side_j, x0, e, mask, SIDE, NUM_MODELS, HAS_BASE, DTYPE, COMPUTE)
            lanes = lanes + vi[:, None, :, :] * vj[None, :, :, :]
        sums = tl.reshape(fold_lanes(tl.reshape(lanes, [SIDE * SIDE * BLOCKS, 256])), [SIDE, SIDE, BLOCKS])
        first = side_i + tl.arange(0, SIDE)[:, None].to(tl.int64)
        second = side_j + tl.arange(0, SIDE)[None, :].to(tl.int64)
        pair = first * NUM_MODELS - first * (first - 1) // 2 + second - first
        wanted = (first <= second) & (second < NUM_MODELS)
        target = sums_ptr + (pair * segments * blocks)[:, :, None] + (segment * blocks + block)[None, None, :]
        tl.store(target, sums, mask=wanted[:, :, None] & there[None, None, :])
