"""`stream` in Triton: the fused pass of `mergekernels.ops.program.Program`."""

# mypy: ignore-errors
# Branches on constexpr stay statements, of which Triton compiles one; results are taken apart whole.

from __future__ import annotations

import triton
import triton.language as tl

from ._combine import merge
from ._common import (
    BASE,
    F64,
    HEADER,
    N,
    element_offsets,
    first_quads,
    flat_index,
    is_nonfinite,
    load,
    narrow,
    report_nonfinite,
    tally2,
    tally3,
)
from ._quotient import enough, quotient
from ._rules import joint, segment_of
from ._switches import ANCHOR, BASE_THERE, COPY, MERGE, SCALE, SCALE_VALUE, TABLE, USEFUL

__all__ = ["stream_kernel"]


@triton.jit
def stream_kernel(
    table,
    coefficients,
    out_ptr,
    counters,
    P: tl.constexpr,
    NUM_MODELS: tl.constexpr,
    NUM_INPUTS: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    OUT: tl.constexpr,
    HAS_OUT: tl.constexpr,
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
    """Write y = anchor + scale * q, with q = merge of the kept deltas / divisor, in one pass; see `Program`.

    Reads (NUM_INPUTS + base) * itemsize bytes per element, 1 more per rank mask, 1/8 more per mark, 4 more where kept
    deltas are divided; writes one output element. A joint point, the merge "balance" and `useful` each read the models
    again, from the cache.

    table : int64 header and one row per input (`_common`). coefficients : compute dtype (`_switches`).
    counters : int64 [SLOTS, 3 * NUM_INPUTS + 7]: kept; conflicts, positive, negative; counts and first indices of
        non-finite values in the inputs, the base and the result.
    P : the switches of the program. NUM_INPUTS : models and importances.
    RAW : a copy without change of dtype. UNROLL : models per iteration of the loop.
    ALIGNED : all addresses are multiples of 16.
    """
    e = element_offsets(table, BLOCK)
    mask = e < tl.load(table + N)
    g = flat_index(table, e, FLAT)
    quads = first_quads(table, BLOCK)
    compute = tl.float64 if COMPUTE == F64 else tl.float32
    zero = tl.zeros([BLOCK], compute)
    none = tl.zeros([BLOCK], tl.int32) != 0

    x0 = zero
    if P // BASE_THERE % 8:
        x0 = load(tl.load(table + BASE), e, mask, DTYPE, COMPUTE, MASKED, ALIGNED)[1]
    slot = counters + (tl.program_id(0) % SLOTS) * (3 * NUM_INPUTS + 7)
    bad_count = slot + NUM_INPUTS + 3
    bad_first = bad_count + NUM_INPUTS + 2

    if P // COPY % 8:
        raw, x = load(tl.load(table + HEADER), e, mask, DTYPE, COMPUTE, MASKED, ALIGNED)
        y = x
        if P // SCALE % 8:
            y = x * tl.load(coefficients + SCALE_VALUE)
        vote = y
        positive = y > 0
        negative = y < 0
        if STATS:
            bad = is_nonfinite(x) & mask
            kept, number = tally2((y != 0) & mask, bad)
            tl.atomic_add(slot, kept, sem="relaxed")
            report_nonfinite(bad_first, bad_count, number, bad, g)
    else:
        together = joint(table, x0, e, g, quads, mask, P, NUM_MODELS, DTYPE, COMPUTE, MASKED, QUADS, ALIGNED, UNROLL)
        at = g
        if P // TABLE % 8:
            at = segment_of(table, g, quads, P // TABLE % 8, QUADS)
        num, total, vote, divisor, nonzero, lone, positive, negative = merge(
            table,
            coefficients,
            slot,
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
            STATS,
            MASKED,
            QUADS,
            ALIGNED,
            UNROLL,
        )
        y = quotient(coefficients, num, divisor, nonzero, lone, P)
        if P // USEFUL % 8:
            y = enough(table, coefficients, y, x0, e, mask, P, NUM_MODELS, DTYPE, COMPUTE, MASKED, ALIGNED, UNROLL)
        if P // SCALE % 8:
            y = y * tl.load(coefficients + SCALE_VALUE)
        poison = total
        if P // MERGE % 8 >= 3:
            poison = num
        y = tl.where(poison != poison, poison, y)
        if P // BASE_THERE % 8:
            anchor = x0
            if P // ANCHOR % 8:
                anchor = load(tl.load(table + HEADER), e, mask, DTYPE, COMPUTE, MASKED, ALIGNED)[1]
            y = anchor + y

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
        conflicts, ups, downs = tally3(positive & negative & mask, (vote > 0) & mask, (vote < 0) & mask)
        tally = slot + NUM_INPUTS
        tl.atomic_add(tally, conflicts, sem="relaxed")
        tl.atomic_add(tally + 1, ups, sem="relaxed")
        tl.atomic_add(tally + 2, downs, sem="relaxed")
        bad = none
        if P // BASE_THERE % 8:
            bad = is_nonfinite(x0) & mask
        bad_base, bad_out = tally2(bad, spoiled)
        report_nonfinite(bad_first + NUM_INPUTS, bad_count + NUM_INPUTS, bad_base, bad, g)
        report_nonfinite(bad_first + NUM_INPUTS + 1, bad_count + NUM_INPUTS + 1, bad_out, spoiled, g)
