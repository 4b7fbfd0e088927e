"""`reduce` in Triton: sums over canonical blocks of what a program computes on its way."""

# mypy: ignore-errors
# Branches on constexpr stay statements, of which Triton compiles one; results are taken apart whole.
# ruff: noqa: RUF059

from __future__ import annotations

import triton
import triton.language as tl

from ._combine import agrees, elected, merge, stands, term
from ._common import BASE, F64, G0, QUANTITY_SLOTS, N, delta, load
from ._lanes import fold_lanes
from ._quotient import enough, quotient
from ._rules import joint, segment_of, total_delta
from ._switches import BASE_THERE, COPY, MERGE, SCALE, SCALE_VALUE, SUBTRACT, TABLE, USEFUL

__all__ = ["MERGED", "NONE", "SINGLE", "TOTAL", "blocks_for", "reduce_kernel"]


def blocks_for(heavy: bool) -> int:
    """Canonical blocks per program: one per warp; fewer of `heavy` launches, the merge of doubles or by balance."""
    return 2 if heavy else 4


NONE = -1
"""No quantity: those of a launch come as four numbers, places in `ops.sums.QUANTITIES`."""

_ABS = tl.constexpr(0)
_SQUARES = tl.constexpr(1)
_KEPT_ABS = tl.constexpr(2)
_KEPT_SQUARES = tl.constexpr(3)
_AGREEING_ABS = tl.constexpr(4)
_IMPORTANCE_SQUARES = tl.constexpr(5)
_KEPT_COUNT = tl.constexpr(6)
_ALONE_COUNT = tl.constexpr(7)
_NEGATIVE_COUNT = tl.constexpr(8)
_TOTAL_ABS = tl.constexpr(9)
_MERGED_ABS = tl.constexpr(10)

MERGED = frozenset({4, 7, 10})
"""The quantities that need the merge of all models, so that each model's program reads them all."""
TOTAL = frozenset({9})
"""The quantities that need the sum of all deltas."""
SINGLE = frozenset({9, 10})
"""The quantities of which there is one, not one per model."""


@triton.jit
def _value(WHICH: tl.constexpr, mask, d, trimmed, et, f, agree, alone, q, y, total):
    """One quantity as float64, +0 beyond the piece."""
    zero = tl.zeros(d.shape, tl.float64)
    if WHICH == _ABS:
        v = tl.abs(d).to(tl.float64)
    elif WHICH == _SQUARES:
        v = d.to(tl.float64) * d.to(tl.float64)
    elif WHICH == _KEPT_ABS:
        v = tl.abs(trimmed).to(tl.float64)
    elif WHICH == _KEPT_SQUARES:
        v = trimmed.to(tl.float64) * trimmed.to(tl.float64)
    elif WHICH == _AGREEING_ABS:
        v = tl.where(agree, tl.abs(q).to(tl.float64), zero)
    elif WHICH == _IMPORTANCE_SQUARES:
        v = f.to(tl.float64) * f.to(tl.float64)
    elif WHICH == _KEPT_COUNT:
        v = (et != 0).to(tl.float64)
    elif WHICH == _ALONE_COUNT:
        v = (alone & (et != 0)).to(tl.float64)
    elif WHICH == _NEGATIVE_COUNT:
        v = (f < 0).to(tl.float64)
    elif WHICH == _TOTAL_ABS:
        v = tl.abs(total).to(tl.float64)
    elif WHICH == _MERGED_ABS:
        v = tl.abs(y).to(tl.float64)
    else:
        v = zero
    return tl.where(mask, v, zero)


@triton.jit
def _store(WHICH: tl.constexpr, table, sums_ptr, m, block, num_blocks, lanes):
    """Folds the lanes of a quantity and writes them to its slot."""
    if WHICH >= 0:
        slot = tl.load(table + QUANTITY_SLOTS + WHICH)
        write = block < num_blocks
        if WHICH >= _TOTAL_ABS:
            # There is one number: the first model's program writes it.
            write = block + m * num_blocks < num_blocks
        else:
            slot = slot + m
        tl.store(sums_ptr + slot * num_blocks + block, fold_lanes(lanes), mask=write)


@triton.jit
def reduce_kernel(
    table,
    coefficients,
    sums_ptr,
    P: tl.constexpr,
    WHICH0: tl.constexpr,
    WHICH1: tl.constexpr,
    WHICH2: tl.constexpr,
    WHICH3: tl.constexpr,
    NEEDS_MERGE: tl.constexpr,
    NEEDS_TOTAL: tl.constexpr,
    NEEDS_IMPORTANCE: tl.constexpr,
    NUM_MODELS: tl.constexpr,
    NUM_INPUTS: tl.constexpr,
    MODELS: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    QUADS: tl.constexpr,
    ALIGNED: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """sums[slot, b] = sum over canonical block b of a quantity of model m, float64; up to four quantities.

    Lane i mod 256 adds its 16 elements in order; the lanes are combined by a tree of strides 128, 64, ... 1.
    Reads (1 + base) * itemsize bytes per element and model, (NUM_MODELS + base) * itemsize where the merge is needed
    (all but the first time from the cache: the models of a block run side by side); writes 8 bytes per block.

    Grid: MODELS (those that have sums of their own: all, or 1 for the quantities of which there is one), the fastest,
    times programs of BLOCKS canonical blocks. table, coefficients, P, UNROLL, ALIGNED : see `stream_kernel`.
    sums : float64 [slots, number of blocks].
    """
    n = tl.load(table + N)
    g0 = tl.load(table + G0)
    num_blocks = (n + 4095) // 4096
    # Divided as 32-bit numbers: with a model of 64 bits ptxas spills a pair of registers for sm_80.
    work = tl.program_id(0)
    block = (work // MODELS).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS).to(tl.int64)
    m = work % MODELS
    lane = tl.arange(0, 256).to(tl.int64)
    quad = tl.arange(0, 64).to(tl.int64)
    compute = tl.float64 if COMPUTE == F64 else tl.float32
    zero = tl.zeros([BLOCKS, 256], compute)
    none = tl.zeros([BLOCKS, 256], tl.int32) != 0
    lanes0 = tl.zeros([BLOCKS, 256], tl.float64)
    lanes1 = lanes0
    lanes2 = lanes0
    lanes3 = lanes0
    for i in range(16):
        e = block[:, None] * 4096 + i * 256 + lane[None, :]
        mask = e < n
        g = g0 + e
        quads = (g0 >> 2) + block[:, None] * 1024 + i * 64 + quad[None, :]
        x0 = zero
        if P // BASE_THERE % 8:
            x0 = load(tl.load(table + BASE), e, mask, DTYPE, COMPUTE, True, ALIGNED)[1]
        f = zero
        agree = none
        alone = none
        q = zero
        y = zero
        total = zero
        if P // COPY % 8:
            d = delta(table, m, x0, e, mask, False, DTYPE, COMPUTE, True, ALIGNED)[0]
            if P // SCALE % 8:
                d = d * tl.load(coefficients + SCALE_VALUE)
            trimmed = d
            et = d
        else:
            together = joint(table, x0, e, g, quads, mask, P, NUM_MODELS, DTYPE, COMPUTE, True, QUADS, ALIGNED, UNROLL)
            at = g
            if P // TABLE % 8:
                at = segment_of(table, g, quads, P // TABLE % 8, QUADS)
            x, d, kept, trimmed, et, weight, wt = term(
                table, coefficients, m, x0, together, at, e, g, quads, mask, P, DTYPE, COMPUTE, True, QUADS, ALIGNED
            )
            if NEEDS_IMPORTANCE:
                f = delta(table, NUM_MODELS + m, x0, e, mask, False, DTYPE, COMPUTE, True, ALIGNED)[0]
            if NEEDS_TOTAL:
                total = total_delta(
                    table, x0, e, mask, NUM_MODELS, P // SUBTRACT % 8, DTYPE, COMPUTE, True, ALIGNED, UNROLL
                )[0]
            if NEEDS_MERGE:
                num, summed, vote, divisor, nonzero, lone, positive, negative = merge(
                    table,
                    coefficients,
                    table,
                    x0,
                    together,
                    at,
                    e,
                    g,
                    quads,
                    mask,
                    P,
                    NUM_MODELS,
                    NUM_INPUTS,
                    DTYPE,
                    COMPUTE,
                    False,
                    True,
                    QUADS,
                    ALIGNED,
                    UNROLL,
                )
                alone = nonzero == 1
                up, down = elected(vote, P)
                agree = agrees(stands(et, wt, P), up, down)
                q = quotient(coefficients, num, divisor, nonzero, lone, P)
                if P // USEFUL % 8:
                    q = enough(
                        table, coefficients, q, x0, e, mask, P, NUM_MODELS, DTYPE, COMPUTE, True, ALIGNED, UNROLL
                    )
                y = q
                if P // SCALE % 8:
                    y = y * tl.load(coefficients + SCALE_VALUE)
                poison = summed
                if P // MERGE % 8 >= 3:
                    poison = num
                y = tl.where(poison != poison, poison, y)
        if WHICH0 >= 0:
            lanes0 = lanes0 + _value(WHICH0, mask, d, trimmed, et, f, agree, alone, q, y, total)
        if WHICH1 >= 0:
            lanes1 = lanes1 + _value(WHICH1, mask, d, trimmed, et, f, agree, alone, q, y, total)
        if WHICH2 >= 0:
            lanes2 = lanes2 + _value(WHICH2, mask, d, trimmed, et, f, agree, alone, q, y, total)
        if WHICH3 >= 0:
            lanes3 = lanes3 + _value(WHICH3, mask, d, trimmed, et, f, agree, alone, q, y, total)
    _store(WHICH0, table, sums_ptr, m, block, num_blocks, lanes0)
    _store(WHICH1, table, sums_ptr, m, block, num_blocks, lanes1)
    _store(WHICH2, table, sums_ptr, m, block, num_blocks, lanes2)
    _store(WHICH3, table, sums_ptr, m, block, num_blocks, lanes3)
