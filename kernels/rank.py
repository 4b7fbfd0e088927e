"""`row_rank` in Triton: exact ranks of the deltas of a row by their size, and what rank rules keep.

Ranks order by (key ascending, word descending, index descending). Two kernels take turns. `sort_kernel` sorts chunks of
rows by one 64-bit number per element; `search_kernel` counts, by binary search in every chunk of its row, how many
numbers are smaller than the element's own: its place. Where the number does not decide (rows that hold equal ones are
flagged), the next stage sorts by place and what comes next in the order:

    stage 0 (float64 only)   key
    stage 1                  key (the place, for float64), then word
    stage 2                  place, then index; only rows that still hold equals

All ranks are exact whatever the chunks. Rows are handled in groups of slabs, so that what is written between the
kernels stays in the cache.
"""

# mypy: ignore-errors
# Branches on constexpr stay statements, of which Triton compiles one; results are taken apart whole.

from __future__ import annotations

import triton
import triton.language as tl

from ._common import (
    BASE,
    DRAW_PURPOSE,
    F64,
    G0,
    LENGTH,
    SEED,
    SEGMENTS,
    TENSOR,
    TIE_PURPOSE,
    delta,
    key_of,
    load,
    words,
)

__all__ = ["PLAN", "search_kernel", "sort_kernel"]

# What one launch works on: its model, the first row and number of rows, and the rule of the model.
_MODEL = tl.constexpr(0)
_FIRST_ROW = tl.constexpr(1)
_NUM_ROWS = tl.constexpr(2)
_IS_BAND = tl.constexpr(3)
_LOW = tl.constexpr(4)  # of a band: first
_SPAN = tl.constexpr(5)  # of a band: last
_SINGLE = tl.constexpr(6)
PLAN = 8
"""Numbers per launch: model, first row, rows, 1 for a band, low or first, span or last, single, 0."""


@triton.jit
def _number(
    table,
    model,
    places,
    local,
    e,
    i,
    g,
    quads,
    mask,
    STAGE: tl.constexpr,
    HAS_BASE: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    QUADS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """What a stage sorts by, int64, not negative. local : place of the element among those of the launch."""
    if STAGE == 2 or (STAGE == 1 and COMPUTE == F64):
        high = tl.load(places + local, mask=mask, other=0).to(tl.int64)
    else:
        x0 = tl.zeros(e.shape, tl.float64 if COMPUTE == F64 else tl.float32)
        if HAS_BASE:
            x0 = load(tl.load(table + BASE), e, mask, DTYPE, COMPUTE, True, ALIGNED)[1]
        high = key_of(delta(table, model, x0, e, mask, HAS_BASE, DTYPE, COMPUTE, True, ALIGNED)[1]).to(tl.int64)
    if STAGE == 0:
        number = high
    elif STAGE == 1:
        word = words(tl.load(table + SEED), tl.load(table + TENSOR), model * 16 + TIE_PURPOSE, g, quads, QUADS)
        number = (high << 32) | (0xFFFFFFFF - word.to(tl.int64))
    else:
        number = (high << 32) | (0x7FFFFFFF - i)
    return number


@triton.jit
def _exchange(x, PAIRS: tl.constexpr, HALF: tl.constexpr, TURN: tl.constexpr):
    """Puts neighbours at distance HALF in order; every other of 2^TURN pairs of halves the other way round (-1: none).

    x : int64 of 2 * PAIRS * HALF numbers.
    """
    pairs = tl.reshape(x, [PAIRS, 2, HALF])
    # A sum of two that wraps around still gives the partner.
    partner = tl.sum(pairs, axis=1)[:, None, :] - pairs
    larger = tl.arange(0, 2)[None, :, None]
    if TURN >= 0:
        larger = larger ^ ((tl.arange(0, PAIRS) >> TURN) & 1)[:, None, None]
    return tl.reshape(tl.where((pairs > partner).to(tl.int32) == larger, pairs, partner), x.shape)


@triton.jit
def _in_order(x, ROWS: tl.constexpr, CHUNK: tl.constexpr, STEPS: tl.constexpr):
    """Rows of CHUNK = 2^STEPS numbers, each in ascending order, by a bitonic network."""
    for k in tl.static_range(1, STEPS + 1):
        for j in tl.static_range(0, k):
            x = _exchange(x, ROWS * CHUNK >> (k - j), 1 << (k - 1 - j), j if k < STEPS else -1)
    return x


@triton.jit
def sort_kernel(
    table,
    plan,
    places,
    flags,
    sorted_ptr,
    STAGE: tl.constexpr,
    HAS_BASE: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    QUADS: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Sorts the numbers of ROWS rows in one chunk of CHUNK positions each: sorted[row, chunk, CHUNK], padded.

    Reads (1 + HAS_BASE) * itemsize bytes per element in the first stage, then 4; writes 8.

    table : header and rows of the program, with LENGTH and SEGMENTS the length and stride of rows. plan : see PLAN.
    places : int32, from the stage before. flags : int32 per row; stage 2 leaves rows out whose flag is 0.
    STEPS : log2(CHUNK). QUADS : a row's flat indices are consecutive and begin at multiples of 4.
    """
    length = tl.load(table + LENGTH)
    stride = tl.load(table + SEGMENTS)
    num_rows = tl.load(plan + _NUM_ROWS)
    first_row = tl.load(plan + _FIRST_ROW)
    chunks = (length + CHUNK - 1) // CHUNK
    tile = tl.program_id(0).to(tl.int64)
    chunk = tile % chunks
    row = tile // chunks * ROWS + tl.arange(0, ROWS).to(tl.int64)  # within the launch
    wanted = row < num_rows
    if STAGE == 2:
        wanted = wanted & (tl.load(flags + row, mask=wanted, other=0) != 0)
    if tl.max(wanted.to(tl.int32), axis=0) > 0:
        i = chunk * CHUNK + tl.arange(0, CHUNK).to(tl.int64)[None, :]
        start = row // stride * (length * stride) + row % stride
        local = start[:, None] + i * stride
        mask = wanted[:, None] & (i < length)
        e = first_row * length + local
        g = tl.load(table + G0) + e
        quad = tl.arange(0, CHUNK // 4 if QUADS else 1).to(tl.int64)[None, :]
        quads = ((tl.load(table + G0) + first_row * length + start[:, None] + chunk * CHUNK) >> 2) + quad
        model = tl.load(plan + _MODEL)
        number = _number(
            table, model, places, local, e, i, g, quads, mask, STAGE, HAS_BASE, DTYPE, COMPUTE, QUADS, ALIGNED
        )
        number = tl.where(mask, number, tl.full(number.shape, 0x7FFFFFFFFFFFFFFF, tl.int64))
        number = _in_order(number, ROWS, CHUNK, STEPS)
        target = sorted_ptr + ((row * chunks + chunk) * CHUNK)[:, None] + tl.arange(0, CHUNK)[None, :]
        tl.store(target, number, mask=wanted[:, None] & (i >= 0))


@triton.jit
def search_kernel(
    table,
    plan,
    places,
    flags,
    sorted_ptr,
    new_places,
    new_flags,
    masks,
    thresholds,
    STAGE: tl.constexpr,
    HAS_BASE: tl.constexpr,
    DIVIDE: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    QUADS: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Counts the smaller numbers of each element's row; in stage 2 writes what the rule of the model keeps.

    Reads (1 + HAS_BASE) * itemsize bytes per element in the first stage, then 4, and 8 for each of log2(CHUNK) + 3
    probes per chunk, from the cache; writes 4 bytes per element, in stage 2 one (and 4 with DIVIDE).

    new_places : int32, places. new_flags : int32 per row, 1 where a row holds equal numbers. masks, thresholds : those
    of `Extras` for the model, of the whole piece. STEPS : log2(CHUNK). QUADS : as for `sort_kernel`.
    """
    length = tl.load(table + LENGTH)
    stride = tl.load(table + SEGMENTS)
    first_row = tl.load(plan + _FIRST_ROW)
    chunks = (length + CHUNK - 1) // CHUNK
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    local = begin + tl.arange(0, BLOCK).to(tl.int64)
    mask = local < tl.load(plan + _NUM_ROWS) * length
    slab = local // (length * stride)
    within = local - slab * (length * stride)
    i = within // stride
    row = slab * stride + within - i * stride
    e = first_row * length + local
    g = tl.load(table + G0) + e
    quads = ((tl.load(table + G0) + first_row * length + begin) >> 2) + tl.arange(0, BLOCK // 4).to(tl.int64)
    model = tl.load(plan + _MODEL)
    searched = mask
    if STAGE == 2:
        searched = mask & (tl.load(flags + row, mask=mask, other=0) != 0)
    place = tl.zeros([BLOCK], tl.int32)
    if STAGE == 2:
        place = tl.load(places + local, mask=mask, other=0)
    if tl.max(searched.to(tl.int32), axis=0) > 0:
        number = _number(
            table, model, places, local, e, i, g, quads, mask, STAGE, HAS_BASE, DTYPE, COMPUTE, QUADS, ALIGNED
        )
        smaller = tl.zeros([BLOCK], tl.int32)
        equal = tl.zeros([BLOCK], tl.int32)
        for c in range(0, chunks):
            chunk = sorted_ptr + (row * chunks + c) * CHUNK
            at = tl.zeros([BLOCK], tl.int32)
            for step in tl.static_range(STEPS):
                half = CHUNK >> (step + 1)
                at = tl.where(tl.load(chunk + at + (half - 1), mask=searched, other=0) < number, at + half, at)
            at = at + (tl.load(chunk + at, mask=searched, other=0) < number).to(tl.int32)
            smaller = smaller + at
            here = tl.load(chunk + at, mask=searched & (at < CHUNK), other=-1)
            after = tl.load(chunk + at + 1, mask=searched & (at + 1 < CHUNK), other=-1)
            equal = equal + (here == number).to(tl.int32) + (after == number).to(tl.int32)
        place = tl.where(searched, smaller, place)
        if STAGE < 2:
            tl.store(new_flags + row, tl.full([BLOCK], 1, tl.int32), mask=searched & (equal > 1))
    if STAGE < 2:
        tl.store(new_places + local, place, mask=mask)
    else:
        rank = place.to(tl.int64)  # from 0
        low = tl.load(plan + _LOW)
        span = tl.load(plan + _SPAN)
        if tl.load(plan + _IS_BAND) != 0:
            spot = length - rank
            kept = (spot > low) & (spot <= span)
            tl.store(masks + e, kept.to(tl.uint8), mask=mask)
        else:
            threshold = tl.full([BLOCK], 0, tl.int64) + tl.load(plan + _SINGLE)
            if length > 1:
                threshold = low + (rank * span) // (length - 1)
            seed = tl.load(table + SEED)
            word = words(seed, tl.load(table + TENSOR), model * 16 + DRAW_PURPOSE, g, quads, QUADS)
            tl.store(masks + e, (word.to(tl.int64) < threshold).to(tl.uint8), mask=mask)
            if DIVIDE:
                tl.store(thresholds + e, (threshold - 1).to(tl.int32), mask=mask)
