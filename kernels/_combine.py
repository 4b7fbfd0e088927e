"""From the models to what they merge to: terms, election, merge; parts of the Triton kernels.

Every function takes the switches P of the program (`_switches`) and what places the elements: e in the piece, g in the
tensor, quads for the Philox words, mask.
"""

# mypy: ignore-errors
# Branches on constexpr stay statements, of which Triton compiles one; results are taken apart whole.
# ruff: noqa: RUF059, SIM108

from __future__ import annotations

import triton
import triton.language as tl

from ._common import F64, SEGMENTS, VALUES, delta, divide, is_nonfinite, report_nonfinite, tally2
from ._rules import balance, kept_delta, total_delta
from ._switches import (
    ALONE,
    ALONE_FACTOR,
    BALANCE,
    COMMON,
    DIVISOR,
    EPSILON,
    FACTOR,
    FACTORS,
    MERGE,
    PER_MODEL,
    SUBTRACT,
    TABLE,
    VOTE,
    WEIGHT,
    ZERO_VOTE,
)

__all__ = ["agrees", "elected", "merge", "stands", "term"]

_SUM = tl.constexpr(0)
_MAX = tl.constexpr(1)
_LARGEST = tl.constexpr(2)
_IMPORTANCE = tl.constexpr(3)
_BALANCE = tl.constexpr(4)


@triton.jit
def term(
    table,
    coefficients,
    m,
    x0,
    together,
    at,
    e,
    g,
    quads,
    mask,
    P: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    MASKED: tl.constexpr,
    QUADS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """What model m brings: (x, d, kept, trimmed, et, weight, wt); trimmed is et before `factors`.

    together : what the joint point keeps. at : segments of the table of weights.
    """
    own = coefficients + COMMON + m * PER_MODEL
    x, d = delta(table, m, x0, e, mask, P // SUBTRACT % 8, DTYPE, COMPUTE, MASKED, ALIGNED)
    kept, trimmed = kept_delta(table, m, d, together, e, g, quads, mask, P, MASKED, QUADS)
    et = trimmed
    if P // FACTORS % 8:
        # A factor of 1 changes no bit.
        et = et * tl.load(own + FACTOR)
    if P // TABLE % 8:
        if COMPUTE == F64:
            values = tl.load(table + VALUES).to(tl.pointer_type(tl.float64))
        else:
            values = tl.load(table + VALUES).to(tl.pointer_type(tl.float32))
        weight = tl.load(values + m * tl.load(table + SEGMENTS) + at, mask=mask, other=0)
    else:
        weight = tl.load(own + WEIGHT)
    return x, d, kept, trimmed, et, weight, et * weight


@triton.jit
def stands(et, wt, P: tl.constexpr):
    """The number whose sign a model stands for."""
    if P // VOTE % 8 <= 1:
        stand = wt
    else:
        stand = et
    return stand


@triton.jit
def elected(vote, P: tl.constexpr):
    """Where the sign is +1 and where it is -1; nowhere without a vote."""
    up = vote > 0
    down = vote < 0
    if P // ZERO_VOTE % 8 == 1:
        up = down == 0
    elif P // ZERO_VOTE % 8 == 2:
        down = up == 0
    if P // VOTE % 8 == 0:
        up = tl.zeros(vote.shape, tl.int32) != 0
        down = up
    return up, down


@triton.jit
def agrees(stand, up, down):
    """Where a model that stands for `stand` agrees with the elected sign."""
    return ((stand > 0) & up) | ((stand < 0) & down)


@triton.jit
def merge(
    table,
    coefficients,
    counters,
    x0,
    together,
    at,
    e,
    g,
    quads,
    mask,
    P: tl.constexpr,
    NUM_MODELS: tl.constexpr,
    NUM_INPUTS: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    STATS: tl.constexpr,
    MASKED: tl.constexpr,
    QUADS: tl.constexpr,
    ALIGNED: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Everything up to `num`: (num, s, v, divisor, nonzero, lone, positive, negative).

    The sum over the agreeing models needs the sign of the whole vote first. Instead of a second loop, the sums over the
    models that stand for plus and for minus are kept side by side and one is chosen at the end: adding the +0 of a term
    left out changes no bit, so either is the sum that a second loop would give.

    divisor : of the agreeing models, or how many et are not 0. nonzero : that number. lone : alone[t] * et of the last
    of them. positive, negative : some wt is. counters : those of this program with STATS, see `stream_kernel`.
    """
    zero = tl.zeros(x0.shape, x0.dtype)
    none = tl.zeros(x0.shape, tl.int32) != 0
    total = zero
    vote = zero
    plus = zero
    minus = zero
    plus_divisor = zero
    minus_divisor = zero
    nonzero = zero
    lone = zero
    best = zero
    num = zero
    shares = zero
    deltas = zero
    positive = none
    negative = none
    if P // MERGE % 8 == _BALANCE:
        deltas = total_delta(
            table, x0, e, mask, NUM_MODELS, P // SUBTRACT % 8, DTYPE, COMPUTE, MASKED, ALIGNED, UNROLL
        )[0]
    bad_count = counters + NUM_INPUTS + 3
    bad_first = bad_count + NUM_INPUTS + 2
    for m in tl.range(0, NUM_MODELS, loop_unroll_factor=UNROLL):
        x, d, kept, trimmed, et, weight, wt = term(
            table, coefficients, m, x0, together, at, e, g, quads, mask, P, DTYPE, COMPUTE, MASKED, QUADS, ALIGNED
        )
        own = coefficients + COMMON + m * PER_MODEL
        total = total + wt
        if P // VOTE % 8:
            stand = stands(et, wt, P)
            above = stand > 0
            below = stand < 0
            if P // VOTE % 8 == 2:
                vote = vote + et
            elif P // VOTE % 8 == 3:
                vote = vote + (above.to(zero.dtype) - below.to(zero.dtype))
            if P // MERGE % 8 == _SUM:
                plus = plus + tl.where(above, wt, zero)
                minus = minus + tl.where(below, wt, zero)
            elif P // MERGE % 8 == _MAX:
                size = tl.abs(wt)
                plus = tl.where(above & (size > plus), size, plus)
                minus = tl.where(below & (size > minus), size, minus)
            if P // DIVISOR % 8 == 2:
                plus_divisor = plus_divisor + tl.where(above, zero + weight, zero)
                minus_divisor = minus_divisor + tl.where(below, zero + weight, zero)
            elif P // DIVISOR % 8 == 3:
                plus_divisor = plus_divisor + above.to(zero.dtype)
                minus_divisor = minus_divisor + below.to(zero.dtype)
        nonzero = nonzero + (et != 0).to(zero.dtype)
        if P // ALONE % 8:
            lone = tl.where(et != 0, et * tl.load(own + ALONE_FACTOR), lone)
        if P // MERGE % 8 == _LARGEST:
            wins = (et != 0) & (tl.abs(et) >= best)
            best = tl.where(wins, tl.abs(et), best)
            num = tl.where(wins, wt, num)
        elif P // MERGE % 8 == _IMPORTANCE:
            f = delta(table, NUM_MODELS + m, x0, e, mask, False, DTYPE, COMPUTE, MASKED, ALIGNED)[0]
            share = (f + tl.load(coefficients + EPSILON)) * weight
            num = num + share * d
            shares = shares + share
            if STATS:
                bad_f = (is_nonfinite(f) | (f < 0)) & mask
                number_f, _ = tally2(bad_f, bad_f)
                report_nonfinite(bad_first + NUM_MODELS + m, bad_count + NUM_MODELS + m, number_f, bad_f, g)
        elif P // MERGE % 8 == _BALANCE:
            a, z = balance(own + BALANCE, d, deltas)
            cut = zero + tl.load(own + BALANCE + 3)
            top = zero + tl.load(own + BALANCE + 4)
            share = tl.where(cut == top, zero, divide(tl.where(z < cut, cut, z) - cut, top - cut))
            signed = tl.where(d == 0, zero, tl.where(d < 0, a * -1.0, a))
            num = num + share * signed
            shares = shares + share
        if STATS:
            positive = positive | (wt > 0)
            negative = negative | (wt < 0)
            bad = is_nonfinite(x) & mask
            count, number = tally2((et != 0) & mask, bad)
            tl.atomic_add(counters + m, count, sem="relaxed")
            report_nonfinite(bad_first + m, bad_count + m, number, bad, g)
    if P // VOTE % 8 <= 1:
        vote = total
    divisor = nonzero
    if P // VOTE % 8:
        up, down = elected(vote, P)
        divisor = tl.where(up, plus_divisor, tl.where(down, minus_divisor, zero))
        if P // MERGE % 8 == _MAX:
            # The sign times the size: an elected 0 gives +0, minus times +0 gives -0.
            minus = minus * -1.0
        if P // MERGE % 8 <= _MAX:
            num = tl.where(up, plus, tl.where(down, minus, zero))
        if P // DIVISOR % 8 == 4:
            divisor = nonzero
    elif P // MERGE % 8 == _SUM:
        num = total
    if P // MERGE % 8 == _IMPORTANCE:
        num = divide(num, shares)
    elif P // MERGE % 8 == _BALANCE:
        least = zero + tl.load(coefficients + EPSILON)
        num = divide(num, tl.where(shares < least, least, shares))
    return num, total, vote, divisor, nonzero, lone, positive, negative
