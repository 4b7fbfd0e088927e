"""From what the models merge to, to the merged delta: divisor, limit, useful models; parts of the Triton kernels."""

# mypy: ignore-errors
# Branches on constexpr stay statements, of which Triton compiles one; results are taken apart whole.

from __future__ import annotations

import triton
import triton.language as tl

from ._common import AT_LEAST, delta, divide
from ._switches import (
    ALONE,
    COMMON,
    DIVISOR,
    DIVISOR_VALUE,
    FLOOR,
    FLOOR_VALUE,
    LIMIT,
    LIMIT_VALUE,
    PER_MODEL,
    SMALL,
    SMALL_FACTOR,
    SUBTRACT,
    USEFUL_THRESHOLD,
)

__all__ = ["enough", "quotient", "useful"]


@triton.jit
def quotient(coefficients, num, divisor, nonzero, lone, P: tl.constexpr):
    """From num to q, before `useful`."""
    zero = tl.zeros(num.shape, num.dtype)
    q = num
    if P // DIVISOR % 8 == 1:
        q = divide(q, zero + tl.load(coefficients + DIVISOR_VALUE))
    elif P // DIVISOR % 8 == 2:
        if P // FLOOR % 8:
            floor = zero + tl.load(coefficients + FLOOR_VALUE)
            q = divide(q, tl.where(divisor < floor, floor, divisor))
        else:
            q = divide(q, tl.where(divisor == 0, zero + 1, divisor))
    elif P // DIVISOR % 8 >= 3:
        q = divide(q, tl.where(divisor < 1, zero + 1, divisor))
    if P // ALONE % 8:
        q = tl.where(nonzero == 1, lone, q)
    if P // LIMIT % 8:
        limit = zero + tl.load(coefficients + LIMIT_VALUE)
        lowest = limit * -1.0
        clipped = tl.where(q > limit, limit, tl.where(q < lowest, lowest, q))
        if P // LIMIT % 8 == 2:
            small = tl.abs(q) < tl.load(coefficients + SMALL)
            clipped = tl.where(small, q * tl.load(coefficients + SMALL_FACTOR), clipped)
        q = clipped
    return q


@triton.jit
def useful(coefficients, m, d, q):
    """Whether model m uses the merged delta q (before `useful`)."""
    threshold = tl.load(coefficients + COMMON + m * PER_MODEL + USEFUL_THRESHOLD)
    return tl.abs(d) > tl.abs(q - d) * threshold


@triton.jit
def enough(
    table,
    coefficients,
    q,
    x0,
    e,
    mask,
    P: tl.constexpr,
    NUM_MODELS: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    MASKED: tl.constexpr,
    ALIGNED: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Q where enough models use it, else +0."""
    users = tl.zeros(q.shape, tl.int32)
    for m in tl.range(0, NUM_MODELS, loop_unroll_factor=UNROLL):
        d = delta(table, m, x0, e, mask, P // SUBTRACT % 8, DTYPE, COMPUTE, MASKED, ALIGNED)[1]
        users = users + useful(coefficients, m, d, q).to(tl.int32)
    return tl.where(users >= tl.load(table + AT_LEAST).to(tl.int32), q, tl.zeros(q.shape, q.dtype))
