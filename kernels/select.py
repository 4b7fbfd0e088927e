"""`select` in Triton: the counting pass of `mergekernels.ops.sweeps.Sweep`."""

# mypy: ignore-errors
# Branches on constexpr stay statements, of which Triton compiles one; results are taken apart whole.
# ruff: noqa: SIM102, SIM109

from __future__ import annotations

import triton
import triton.language as tl

from ._common import (
    BASE,
    CAPACITY,
    DRAW_PURPOSE,
    F64,
    HEADER,
    OFFSET,
    ROW,
    ROW_FACTORS,
    ROW_LENGTH,
    SEED,
    TENSOR,
    TIE_PURPOSE,
    N,
    delta,
    element_offsets,
    first_quads,
    flat_index,
    is_nonfinite,
    key_of,
    load,
    report_nonfinite,
    tally2,
    tally3,
    words,
)
from ._rules import balance, row_factors, total_delta, variance

__all__ = ["select_kernel"]

# What is ranked.
_VARIANCE = tl.constexpr(1)
_IMPORTANCE = tl.constexpr(2)
_BALANCE = tl.constexpr(3)
_DRAWN = tl.constexpr(4)

# A row of the table: stage, interval, key of the ties, shift of the bins, model.
_STAGE = tl.constexpr(1)
_LO = tl.constexpr(2)
_HI = tl.constexpr(3)
_TAU = tl.constexpr(4)
_SHIFT = tl.constexpr(5)
_MODEL = tl.constexpr(6)
_TIE = tl.constexpr(2)


@triton.jit
def select_kernel(
    table,
    counters,
    ordinals_ptr,
    indices_ptr,
    bins_ptr,
    numbers,
    KEY: tl.constexpr,
    NUM_SEARCHES: tl.constexpr,
    NUM_MODELS: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    HAS_BASE: tl.constexpr,
    TIES: tl.constexpr,
    HASH: tl.constexpr,
    BINS: tl.constexpr,
    FLAT: tl.constexpr,
    QUADS: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Count before[s] = |{ahead of s's interval}| and inside[s] = |{in it}|, and collect or bin what is inside.

    Reads (searches + HAS_BASE) * itemsize bytes per element, for joint keys (NUM_MODELS + HAS_BASE) * itemsize, and
    the models once more (balance: once per search) from the cache; writes 16 bytes per entry inside, or 4,096 counts.
    Integer atomics only: the order of the entries varies, their set does not.

    table : int64 header and rows of address, stage, lo, hi, tau, shift, model; stage 0 leaves a search out. The address
        is that of the search's tensor, or with a joint key that of the model of the same number.
    counters : int64 [4 * NUM_SEARCHES + 2]: before; inside; counts, then first indices of non-finite values, base last.
    ordinals, indices : int64 [NUM_SEARCHES, capacity]; entries beyond the capacity (in the table) are counted only.
    bins : int64 [NUM_SEARCHES, 4096], filled instead of the rest if BINS.
    numbers : KEY 3: compute dtype [NUM_MODELS, 5]; KEY 4: int64 [NUM_MODELS]. KEY : 0 delta, 1 variance, 2 importance,
        3 balance, 4 drawn.
    TIES : some search counts ties. HASH : ties are ordered by Philox word, else by scope index.
    """
    e = element_offsets(table, BLOCK)
    mask = e < tl.load(table + N)
    g = flat_index(table, e, FLAT)
    quads = first_quads(table, BLOCK)
    index = g + tl.load(table + OFFSET)
    bad_count = counters + 2 * NUM_SEARCHES
    bad_first = bad_count + NUM_SEARCHES + 1
    x0 = tl.zeros([BLOCK], tl.float64 if COMPUTE == F64 else tl.float32)
    if HAS_BASE:
        x0 = load(tl.load(table + BASE), e, mask, DTYPE, COMPUTE, MASKED, ALIGNED)[1]
        if not BINS:
            bad = is_nonfinite(x0) & mask
            number, _ = tally2(bad, bad)
            report_nonfinite(bad_first + NUM_SEARCHES, bad_count + NUM_SEARCHES, number, bad, index)
    total = x0
    spread = x0
    bad_any = mask
    if KEY == _VARIANCE or KEY == _BALANCE:
        total, bad_any = total_delta(table, x0, e, mask, NUM_MODELS, HAS_BASE, DTYPE, COMPUTE, MASKED, ALIGNED, 1)
    if KEY == _VARIANCE:
        spread = variance(table, total, x0, e, mask, NUM_MODELS, HAS_BASE, DTYPE, COMPUTE, MASKED, ALIGNED, 1)
    for s in range(NUM_SEARCHES):
        row = table + HEADER + s * ROW
        stage = tl.load(row + _STAGE)
        if stage > 0:
            lo = tl.load(row + _LO)
            hi = tl.load(row + _HI)
            if KEY == _VARIANCE:
                key = key_of(spread)
                bad = bad_any & mask
            elif KEY == _BALANCE:
                model = tl.load(row + _MODEL)
                d = delta(table, model, x0, e, mask, HAS_BASE, DTYPE, COMPUTE, MASKED, ALIGNED)[1]
                key = key_of(balance(numbers + model * 5, d, total)[1])
                bad = bad_any & mask
            else:
                x, d = delta(table, s, x0, e, mask, HAS_BASE, DTYPE, COMPUTE, MASKED, ALIGNED)
                if KEY == _IMPORTANCE:
                    d = tl.abs(d) * row_factors(
                        tl.load(table + ROW_FACTORS), g, tl.load(table + ROW_LENGTH), mask, COMPUTE
                    )
                if KEY == _DRAWN:
                    model = tl.load(row + _MODEL)
                    stream = model * 16 + DRAW_PURPOSE
                    word = words(tl.load(table + SEED), tl.load(table + TENSOR), stream, g, quads, QUADS)
                    d = tl.where(word.to(tl.int64) < tl.load(numbers + model), d, tl.zeros(d.shape, d.dtype))
                key = key_of(d)
                bad = is_nonfinite(x) & mask
            if TIES:
                ordinal = key.to(tl.int64)
                member = mask
                ahead = ordinal > hi
                if stage == _TIE:
                    member = mask & (ordinal == tl.load(row + _TAU))
                    ordinal = index
                    if HASH:
                        if tl.max(member.to(tl.int32), axis=0) > 0:
                            stream = tl.load(row + _MODEL) * 16 + TIE_PURPOSE
                            seed = tl.load(table + SEED)
                            ordinal = words(seed, tl.load(table + TENSOR), stream, g, quads, QUADS).to(tl.int64)
                    ahead = ordinal < lo
                inside = member & (ordinal >= lo) & (ordinal <= hi)
                ahead = ahead & member
            else:
                # Comparing in the width of the key keeps 64-bit arithmetic out of the common pass.
                ordinal = key
                ahead = mask & (key > hi.to(key.dtype))
                inside = mask & (key >= lo.to(key.dtype)) & (key <= hi.to(key.dtype))
            if BINS:
                bin_ = (ordinal.to(tl.int64) - lo) >> tl.load(row + _SHIFT)
                one = tl.full([BLOCK], 1, tl.int64)
                tl.atomic_add(bins_ptr + s * 4096 + bin_, one, mask=inside, sem="relaxed")
            else:
                before, found, number = tally3(ahead, inside, bad)
                tl.atomic_add(counters + s, before, sem="relaxed")
                report_nonfinite(bad_first + s, bad_count + s, number, bad, index)
                if found > 0:
                    first = tl.atomic_add(counters + NUM_SEARCHES + s, found, sem="relaxed")
                    place = first + tl.cumsum(inside.to(tl.int32), axis=0).to(tl.int64) - 1
                    capacity = tl.load(table + CAPACITY)
                    write = inside & (place < capacity)
                    tl.store(ordinals_ptr + s * capacity + place, ordinal.to(tl.int64), mask=write)
                    tl.store(indices_ptr + s * capacity + place, index, mask=write)
