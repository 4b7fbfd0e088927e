"""`stream` in Triton: the fused pass of `mergekernels.ops.program.Program`, and the sums of squares beside it."""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from ._common import (
    BASE,
    F64,
    HEADER,
    ROW,
    N,
    divide,
    element_offsets,
    flat_index,
    is_nonfinite,
    key_of,
    load,
    narrow,
    report_nonfinite,
    tally2,
    tally3,
    tie_words,
)

__all__ = ["NORM_BLOCKS", "block_sums_kernel", "stream_kernel"]

NORM_BLOCKS = 4
"""Canonical blocks per program of `block_sums_kernel`: one for each warp."""

# Rules of a tie in the table.
_INDEX = tl.constexpr(1)
_HASH = tl.constexpr(2)


@triton.jit
def _keep(table, row, m, d, g, TIES: tl.constexpr, QUADS: tl.constexpr, BLOCK: tl.constexpr):
    """Which elements pass model m's point: key > tau, or key == tau and the tie rule holds."""
    key = key_of(d)
    tau = tl.load(row + 1).to(key.dtype)
    kept = key > tau
    if TIES > 0:
        mode = tl.load(row + 2)
        tied = (key == tau) & (mode > 0)
        # Most blocks hold no tie, and the words are by far the dearest part of the pass.
        if tl.max(tied.to(tl.int32), axis=0) > 0:
            first = g <= tl.load(row + 4)
            if TIES == _HASH:
                word = tie_words(table, m, g, QUADS, BLOCK)
                cut = tl.load(row + 3).to(tl.uint32)
                first = tl.where(mode == _HASH, (word < cut) | ((word == cut) & first), first)
            kept = kept | (tied & first)
    return kept


@triton.jit
def stream_kernel(
    table,
    coefficients,
    out_ptr,
    counters,
    NUM_MODELS: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    OUT: tl.constexpr,
    HAS_OUT: tl.constexpr,
    HAS_BASE: tl.constexpr,
    COPY: tl.constexpr,
    TRIM: tl.constexpr,
    TIES: tl.constexpr,
    CONSENSUS: tl.constexpr,
    ZERO_VOTE: tl.constexpr,
    DIVISOR: tl.constexpr,
    SCALE: tl.constexpr,
    RAW: tl.constexpr,
    STATS: tl.constexpr,
    SLOTS: tl.constexpr,
    FLAT: tl.constexpr,
    QUADS: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write y = x0 + scale * elect(sum_t w_t keep_t(x_t - x0)) / divisor, in one pass.

    Reads (NUM_MODELS + HAS_BASE) * itemsize bytes per element and writes one output element.

    The sum over the agreeing models needs the sign of the whole sum first. Instead of a second loop, the sums over the
    positive and over the negative terms are kept side by side and one is chosen at the end: adding the +0 of a term
    left out changes no bit, so either is the sum that a second loop would give.

    table : int64 header and one row (address, tau, tie rule, word, index) per model.
    coefficients : compute dtype [2 + NUM_MODELS]: divisor, scale, weights.
    counters : int64 [SLOTS, 3 * NUM_MODELS + 7]: kept; conflicts, positive, negative; counts and first indices of
        non-finite values in the models, the base and the result.
    RAW : a copy without change of dtype. UNROLL : models per iteration of the loop.
    ALIGNED : all addresses are multiples of 16.
    """
    e = element_offsets(table, BLOCK)
    mask = e < tl.load(table + N)
    g = flat_index(table, e, FLAT)
    compute = tl.float64 if COMPUTE == F64 else tl.float32
    zero = tl.zeros([BLOCK], compute)
    none = tl.zeros([BLOCK], tl.int32) != 0

    x0 = zero
    if HAS_BASE:
        x0 = load(tl.load(table + BASE), e, mask, DTYPE, COMPUTE, MASKED, ALIGNED)[1]
    slot = counters + (tl.program_id(0) % SLOTS) * (3 * NUM_MODELS + 7)
    bad_count = slot + NUM_MODELS + 3
    bad_first = bad_count + NUM_MODELS + 2

    if COPY:
        raw, x = load(tl.load(table + HEADER), e, mask, DTYPE, COMPUTE, MASKED, ALIGNED)
        y = x
        if SCALE:
            y = x * tl.load(coefficients + 1)
        total = y
        positive = y > 0
        negative = y < 0
        if STATS:
            bad = is_nonfinite(x) & mask
            kept, number = tally2((y != 0) & mask, bad)
            tl.atomic_add(slot, kept, sem="relaxed")
            report_nonfinite(bad_first, bad_count, number, bad, g)
    else:
        total = zero
        plus = zero
        minus = zero
        plus_divisor = zero
        minus_divisor = zero
        positive = none
        negative = none
        for m in tl.range(0, NUM_MODELS, loop_unroll_factor=UNROLL):
            row = table + HEADER + m * ROW
            x = load(tl.load(row), e, mask, DTYPE, COMPUTE, MASKED, ALIGNED)[1]
            d = x
            if HAS_BASE:
                d = x - x0
            if TRIM:
                d = tl.where(_keep(table, row, m, d, g, TIES, QUADS, BLOCK), d, zero)
            weight = tl.load(coefficients + 2 + m)
            w = d * weight
            total = total + w
            above = w > 0
            below = w < 0
            if CONSENSUS:
                plus = plus + tl.where(above, w, zero)
                minus = minus + tl.where(below, w, zero)
                if DIVISOR == 2:
                    plus_divisor = plus_divisor + tl.where(above, weight, zero)
                    minus_divisor = minus_divisor + tl.where(below, weight, zero)
                elif DIVISOR == 3:
                    plus_divisor = plus_divisor + above.to(compute)
                    minus_divisor = minus_divisor + below.to(compute)
            if STATS:
                positive = positive | above
                negative = negative | below
                bad = is_nonfinite(x) & mask
                kept, number = tally2((d != 0) & mask, bad)
                tl.atomic_add(slot + m, kept, sem="relaxed")
                report_nonfinite(bad_first + m, bad_count + m, number, bad, g)
        y = total
        divisor = zero
        if CONSENSUS:
            if ZERO_VOTE > 0:
                up = (total < 0) == none
                down = total < 0
            elif ZERO_VOTE < 0:
                up = total > 0
                down = (total > 0) == none
            else:
                up = total > 0
                down = total < 0
            y = tl.where(up, plus, tl.where(down, minus, zero))
            divisor = tl.where(up, plus_divisor, tl.where(down, minus_divisor, zero))
        if DIVISOR == 1:
            y = divide(y, zero + tl.load(coefficients))
        elif DIVISOR == 2:
            y = divide(y, tl.where(divisor == 0, zero + 1, divisor))
        elif DIVISOR == 3:
            y = divide(y, tl.where(divisor < 1, zero + 1, divisor))
        if SCALE:
            y = y * tl.load(coefficients + 1)
        if HAS_BASE:
            y = x0 + y
        y = tl.where(total != total, total, y)

    spoiled = none
    if HAS_OUT:
        result, finite = narrow(y, OUT)
        if RAW:
            # A plain copy keeps the bits, those of a NaN too.
            result = raw
        spoiled = (finite == none) & mask
        o_ptr = out_ptr + e
        if MASKED:
            tl.store(o_ptr, result, mask=mask)
        else:
            tl.store(o_ptr, result)
    if STATS:
        conflicts, ups, downs = tally3(positive & negative & mask, (total > 0) & mask, (total < 0) & mask)
        tally = slot + NUM_MODELS
        tl.atomic_add(tally, conflicts, sem="relaxed")
        tl.atomic_add(tally + 1, ups, sem="relaxed")
        tl.atomic_add(tally + 2, downs, sem="relaxed")
        bad = none
        if HAS_BASE:
            bad = is_nonfinite(x0) & mask
        bad_base, bad_out = tally2(bad, spoiled)
        report_nonfinite(bad_first + NUM_MODELS, bad_count + NUM_MODELS, bad_base, bad, g)
        report_nonfinite(bad_first + NUM_MODELS + 1, bad_count + NUM_MODELS + 1, bad_out, spoiled, g)


@triton.jit
def _fold(lanes, WIDTH: tl.constexpr):
    """Adds the upper half of the lanes to the lower: [NORM_BLOCKS, WIDTH] -> [NORM_BLOCKS, WIDTH / 2].

    A sum of two numbers has no order, so that the reduction over an axis of two is exact in any layout.
    """
    halves = tl.reshape(lanes, [lanes.shape[0], 2, WIDTH // 2])
    return tl.sum(halves, axis=1)


@triton.jit
def block_sums_kernel(
    table,
    coefficients,
    sums_ptr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    HAS_BASE: tl.constexpr,
    COPY: tl.constexpr,
    SCALE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """sums[m, b] = sum of d * d over canonical block b of model m, float64, with d = x - x0 (or what a copy writes).

    Lane i mod 256 adds its 16 elements in order; the lanes are combined by a tree of strides 128, 64, ... 1.
    Reads (1 + HAS_BASE) * itemsize bytes per element and model, writes 8 bytes per block.

    Grid: (programs of BLOCKS canonical blocks, models). sums : float64 [models, number of blocks].
    """
    n = tl.load(table + N)
    num_blocks = (n + 4095) // 4096
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS).to(tl.int64)
    m = tl.program_id(1).to(tl.int64)
    address = tl.load(table + HEADER + m * ROW)
    lane = tl.arange(0, 256).to(tl.int64)
    lanes = tl.zeros([BLOCKS, 256], tl.float64)
    for i in range(16):
        e = block[:, None] * 4096 + i * 256 + lane[None, :]  # [BLOCKS, 256]
        mask = e < n
        d = load(address, e, mask, DTYPE, COMPUTE, True, ALIGNED)[1]
        if COPY:
            if SCALE:
                d = d * tl.load(coefficients + 1)
        elif HAS_BASE:
            d = d - load(tl.load(table + BASE), e, mask, DTYPE, COMPUTE, True, ALIGNED)[1]
        d = d.to(tl.float64)
        lanes = lanes + d * d
    lanes = _fold(lanes, 256)
    lanes = _fold(lanes, 128)
    lanes = _fold(lanes, 64)
    lanes = _fold(lanes, 32)
    lanes = _fold(lanes, 16)
    lanes = _fold(lanes, 8)
    lanes = _fold(lanes, 4)
    lanes = _fold(lanes, 2)
    sums = tl.reshape(lanes, [BLOCKS])
    tl.store(sums_ptr + m * num_blocks + block, sums, mask=block < num_blocks)
