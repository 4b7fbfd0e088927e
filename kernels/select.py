"""`select` in Triton: the counting pass of `mergekernels.ops.program.Sweep`."""

# mypy: ignore-errors
# ruff: noqa: SIM102

from __future__ import annotations

import triton
import triton.language as tl

from ._common import (
    BASE,
    CAPACITY,
    HEADER,
    OFFSET,
    ROW,
    N,
    element_offsets,
    flat_index,
    is_nonfinite,
    key_of,
    load,
    report_nonfinite,
    tally2,
    tally3,
    tie_words,
)

__all__ = ["select_kernel"]

_TIE = tl.constexpr(2)


@triton.jit
def select_kernel(
    table,
    counters,
    ordinals_ptr,
    indices_ptr,
    bins_ptr,
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
    """Count before[m] = |{ahead of m's interval}| and inside[m] = |{in it}|, and collect or bin what is inside.

    Reads (NUM_MODELS + HAS_BASE) * itemsize bytes per element; writes 16 bytes per entry inside, or 4,096 counts.
    Integer atomics only: the order of the entries varies, their set does not.

    table : int64 header and one row (address, stage, lo, hi, tau, shift) per model; stage 0 leaves a model out.
    counters : int64 [4 * NUM_MODELS + 2]: before; inside; counts, then first indices of non-finite values, base last.
    ordinals, indices : int64 [NUM_MODELS, capacity]; entries beyond the capacity (in the table) are counted only.
    bins : int64 [NUM_MODELS, 4096], filled instead of the rest if BINS.
    TIES : some model counts ties. HASH : ties are ordered by Philox word, else by scope index.
    """
    e = element_offsets(table, BLOCK)
    mask = e < tl.load(table + N)
    g = flat_index(table, e, FLAT)
    index = g + tl.load(table + OFFSET)
    bad_count = counters + 2 * NUM_MODELS
    bad_first = bad_count + NUM_MODELS + 1
    if HAS_BASE:
        x0 = load(tl.load(table + BASE), e, mask, DTYPE, COMPUTE, MASKED, ALIGNED)[1]
        if not BINS:
            bad = is_nonfinite(x0) & mask
            number, _ = tally2(bad, bad)
            report_nonfinite(bad_first + NUM_MODELS, bad_count + NUM_MODELS, number, bad, index)
    for m in range(NUM_MODELS):
        row = table + HEADER + m * ROW
        stage = tl.load(row + 1)
        if stage > 0:
            lo = tl.load(row + 2)
            hi = tl.load(row + 3)
            x = load(tl.load(row), e, mask, DTYPE, COMPUTE, MASKED, ALIGNED)[1]
            d = x
            if HAS_BASE:
                d = x - x0
            key = key_of(d)
            if TIES:
                ordinal = key.to(tl.int64)
                member = mask
                ahead = ordinal > hi
                if stage == _TIE:
                    member = mask & (ordinal == tl.load(row + 4))
                    ordinal = index
                    if HASH:
                        if tl.max(member.to(tl.int32), axis=0) > 0:
                            ordinal = tie_words(table, m, g, QUADS, BLOCK).to(tl.int64)
                    ahead = ordinal < lo
                inside = member & (ordinal >= lo) & (ordinal <= hi)
                ahead = ahead & member
            else:
                # Comparing in the width of the key keeps 64-bit arithmetic out of the common pass.
                ordinal = key
                ahead = mask & (key > hi.to(key.dtype))
                inside = mask & (key >= lo.to(key.dtype)) & (key <= hi.to(key.dtype))
            if BINS:
                bin_ = (ordinal.to(tl.int64) - lo) >> tl.load(row + 5)
                one = tl.full([BLOCK], 1, tl.int64)
                tl.atomic_add(bins_ptr + m * 4096 + bin_, one, mask=inside, sem="relaxed")
            else:
                bad = is_nonfinite(x) & mask
                before, found, number = tally3(ahead, inside, bad)
                tl.atomic_add(counters + m, before, sem="relaxed")
                report_nonfinite(bad_first + m, bad_count + m, number, bad, index)
                if found > 0:
                    first = tl.atomic_add(counters + NUM_MODELS + m, found, sem="relaxed")
                    place = first + tl.cumsum(inside.to(tl.int32), axis=0).to(tl.int64) - 1
                    capacity = tl.load(table + CAPACITY)
                    write = inside & (place < capacity)
                    tl.store(ordinals_ptr + m * capacity + place, ordinal.to(tl.int64), mask=write)
                    tl.store(indices_ptr + m * capacity + place, index, mask=write)
