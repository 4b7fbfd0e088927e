"""Which entries of a task vector are kept, and the numbers that joint keys rank: parts of the Triton kernels."""

# mypy: ignore-errors
# Branches on constexpr stay statements, of which Triton compiles one; results are taken apart whole.
# ruff: noqa: SIM102, SIM108

from __future__ import annotations

import triton
import triton.language as tl

from ._common import (
    DRAW_PURPOSE,
    F64,
    G0,
    GROUP_PURPOSE,
    GROUP_TENSOR,
    HEADER,
    JOINT_POINT,
    LENGTH,
    MASK,
    POINT,
    ROW,
    ROW_FACTORS,
    ROW_LENGTH,
    RULE,
    SEED,
    TENSOR,
    THRESHOLD,
    THRESHOLDS,
    TIE_PURPOSE,
    TOP,
    delta,
    divide,
    is_nonfinite,
    key_of,
    words,
)
from ._switches import (
    BANDS,
    BITS,
    BITS_RULE,
    DIVIDES,
    DRAW_RULE,
    DRAWS,
    JOINT,
    MASK_RULE,
    MASKS,
    POINTS,
    SUBTRACT,
    TIES,
)
from ._transcendental import exp, tanh

__all__ = ["balance", "joint", "kept_delta", "passes", "row_factors", "segment_of", "total_delta", "variance"]

# Rules of a tie in the table.
_HASH = tl.constexpr(2)


@triton.jit
def passes(table, point, m, key, g, quads, RULES: tl.constexpr, QUADS: tl.constexpr):
    """Which keys pass a point: key > tau, or key == tau and the tie rule holds; words are those of model m.

    point : address of tau, tie rule, word, index. RULES : the dearest tie rule there may be.
    """
    tau = tl.load(point).to(key.dtype)
    kept = key > tau
    if RULES > 0:
        mode = tl.load(point + 1)
        tied = (key == tau) & (mode > 0)
        # Most blocks hold no tie, and the words are by far the dearest part of the pass.
        if tl.max(tied.to(tl.int32), axis=None) > 0:
            first = g <= tl.load(point + 3)
            if RULES == _HASH:
                word = words(tl.load(table + SEED), tl.load(table + TENSOR), m * 16 + TIE_PURPOSE, g, quads, QUADS)
                cut = tl.load(point + 2).to(tl.uint32)
                first = tl.where(mode == _HASH, (word < cut) | ((word == cut) & first), first)
            kept = kept | (tied & first)
    return kept


@triton.jit
def kept_delta(table, m, d, together, e, g, quads, mask, P: tl.constexpr, MASKED: tl.constexpr, QUADS: tl.constexpr):
    """Which entries of model m are kept, and what is left of its deltas: (flags, deltas, +0 where not kept).

    together : what the joint point keeps. m : int. P : the switches of the program.
    """
    row = table + HEADER + m * ROW
    kept = together
    if P // POINTS % 8:
        kept = kept & passes(table, row + POINT, m, key_of(d), g, quads, P // TIES % 8, QUADS)
    if P // BANDS % 8:
        cut = passes(table, row + TOP, m, key_of(d), g, quads, P // TIES % 8, QUADS)
        kept = kept & (cut == 0)
    rule = tl.load(row + RULE)
    if P // DRAWS % 8:
        if rule == DRAW_RULE:
            word = words(tl.load(table + SEED), tl.load(table + TENSOR), m * 16 + DRAW_PURPOSE, g, quads, QUADS)
            kept = kept & (word.to(tl.int64) < tl.load(row + THRESHOLD))
    if P // MASKS % 8:
        if rule == MASK_RULE:
            p = tl.load(row + MASK).to(tl.pointer_type(tl.uint8)) + e
            if MASKED:
                kept = kept & (tl.load(p, mask=mask, other=0) != 0)
            else:
                kept = kept & (tl.load(p) != 0)
    if P // BITS % 8:
        if rule == BITS_RULE:
            p = tl.load(row + MASK).to(tl.pointer_type(tl.uint8)) + ((g >> 3) - (tl.load(table + G0) >> 3))
            if MASKED:
                byte = tl.load(p, mask=mask, other=0)
            else:
                byte = tl.load(p)
            kept = kept & (((byte.to(tl.int64) >> (g & 7)) & 1) != 0)
    if P // DIVIDES % 8:
        address = tl.load(row + THRESHOLDS)
        if address != 0:
            p = address.to(tl.pointer_type(tl.int32)) + e
            if MASKED:
                stored = tl.load(p, mask=mask, other=0)
            else:
                stored = tl.load(p)
            # One less than the threshold is stored, as 32 bits without a sign.
            threshold = (stored.to(tl.int64) & 0xFFFFFFFF) + 1
            d = divide(d, threshold.to(d.dtype) * 2.3283064365386963e-10)
    return kept, tl.where(kept, d, tl.zeros(d.shape, d.dtype))


@triton.jit
def total_delta(
    table,
    x0,
    e,
    mask,
    NUM_MODELS: tl.constexpr,
    BASED: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    MASKED: tl.constexpr,
    ALIGNED: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """S = +0 + d1 + ... + dT, and where any model is not finite."""
    total = tl.zeros(x0.shape, x0.dtype)
    bad = tl.zeros(x0.shape, tl.int32) != 0
    for m in tl.range(0, NUM_MODELS, loop_unroll_factor=UNROLL):
        x, d = delta(table, m, x0, e, mask, BASED, DTYPE, COMPUTE, MASKED, ALIGNED)
        total = total + d
        bad = bad | is_nonfinite(x)
    return total, bad


@triton.jit
def variance(
    table,
    total,
    x0,
    e,
    mask,
    NUM_MODELS: tl.constexpr,
    BASED: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    MASKED: tl.constexpr,
    ALIGNED: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """The number of the key "variance": the mean square of what the deltas differ from their mean by."""
    count = tl.full(total.shape, NUM_MODELS, total.dtype)
    mean = divide(total, count)
    squares = tl.zeros(total.shape, total.dtype)
    for m in tl.range(0, NUM_MODELS, loop_unroll_factor=UNROLL):
        d = delta(table, m, x0, e, mask, BASED, DTYPE, COMPUTE, MASKED, ALIGNED)[1]
        squares = squares + (d - mean) * (d - mean)
    return divide(squares, count)


@triton.jit
def row_factors(address, g, length, mask, COMPUTE: tl.constexpr):
    """The number of the row of each element, from an array of the compute dtype."""
    if COMPUTE == F64:
        p = address.to(tl.pointer_type(tl.float64))
    else:
        p = address.to(tl.pointer_type(tl.float32))
    return tl.load(p + g // length, mask=mask, other=0)


@triton.jit
def segment_of(table, g, quads, AXIS: tl.constexpr, QUADS: tl.constexpr):
    """The segment of a table that each element belongs to; AXIS: 1 rows, 2 columns, 3 groups."""
    length = tl.load(table + LENGTH)
    if AXIS == 1:
        at = g // length
    elif AXIS == 2:
        at = g % length
    else:
        word = words(tl.load(table + SEED), tl.load(table + GROUP_TENSOR), GROUP_PURPOSE, g, quads, QUADS)
        at = (word.to(tl.int64) * length) >> 32
    return at


@triton.jit
def joint(
    table,
    x0,
    e,
    g,
    quads,
    mask,
    P: tl.constexpr,
    NUM_MODELS: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    MASKED: tl.constexpr,
    QUADS: tl.constexpr,
    ALIGNED: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Which elements the joint point of a program keeps; all without one."""
    based = P // SUBTRACT % 8
    if P // JOINT % 8 == 1:
        total = total_delta(table, x0, e, mask, NUM_MODELS, based, DTYPE, COMPUTE, MASKED, ALIGNED, UNROLL)[0]
        number = variance(table, total, x0, e, mask, NUM_MODELS, based, DTYPE, COMPUTE, MASKED, ALIGNED, UNROLL)
        kept = passes(table, table + JOINT_POINT, 0, key_of(number), g, quads, P // TIES % 8, QUADS)
    elif P // JOINT % 8 == 2:
        d = delta(table, 0, x0, e, mask, based, DTYPE, COMPUTE, MASKED, ALIGNED)[1]
        factor = row_factors(tl.load(table + ROW_FACTORS), g, tl.load(table + ROW_LENGTH), mask, COMPUTE)
        number = tl.abs(d) * factor
        kept = passes(table, table + JOINT_POINT, 0, key_of(number), g, quads, P // TIES % 8, QUADS)
    else:
        kept = tl.zeros(e.shape, tl.int32) == 0
    return kept


@triton.jit
def balance(numbers, d, total):
    """(a, z) of `Balance`: the clipped magnitude and how one model competes.

    numbers : address of lo, hi, spread. total : the sum of all deltas.
    """
    zero = tl.zeros(d.shape, d.dtype)
    lo = zero + tl.load(numbers)
    hi = zero + tl.load(numbers + 1)
    a = tl.abs(d)
    a = tl.where(a < lo, lo, tl.where(a > hi, hi, a))
    m = tl.where(lo == hi, zero, divide(a - lo, hi - lo))
    power = (zero + tl.load(numbers + 2)) * (m * m)
    grown = exp(power.to(tl.float64)).to(d.dtype)
    bent = tanh((d * total).to(tl.float64)).to(d.dtype)
    z = grown * bent
    return a, tl.where(z < 0, zero, z)
