"""The passes behind learned coefficients and masks in Triton; see ops/learned.py for the formulas."""

# mypy: ignore-errors
# Branches on constexpr stay statements, of which Triton compiles one; results are taken apart whole.

from __future__ import annotations

import triton
import triton.language as tl

from ._common import F64, GROUP_PURPOSE, divide, load, narrow, words
from ._lanes import fold_lanes
from ._transcendental import exp, log

__all__ = ["HEADER_SIZE", "SUM_BLOCKS", "mask_merge_kernel", "mask_sum_kernel", "seg_dot_kernel"]

SUM_BLOCKS = 4
"""Canonical blocks per program of the kernels that sum: one for each warp."""

HEADER_SIZE = 16
"""Numbers of the table before the addresses of the models."""

_N = tl.constexpr(0)
_G0 = tl.constexpr(1)
_START = tl.constexpr(2)
_BASE = tl.constexpr(3)
_GRADIENT = tl.constexpr(4)
_LOGITS = tl.constexpr(5)
_GROUP_SEED = tl.constexpr(6)  # seed, tensor id
_MASK_SEED = tl.constexpr(8)  # seed, tensor id
_MODELS = tl.constexpr(16)

_TEMPERATURE = tl.constexpr(0)
_MEAN = tl.constexpr(1)
_SHIFT = tl.constexpr(2)
_WEIGHTS = tl.constexpr(4)

_MASK_PURPOSE = tl.constexpr(1)


@triton.jit
def _mask(table, coefficients, e, quad, mask, LOGITS: tl.constexpr, COMPUTE: tl.constexpr, MASKED: tl.constexpr):
    """The relaxed mask m at elements e, in the compute dtype."""
    compute = tl.float64 if COMPUTE == F64 else tl.float32
    z = load(tl.load(table + _LOGITS), e, mask, LOGITS, COMPUTE, MASKED, False)[1]
    word = words(tl.load(table + _MASK_SEED), tl.load(table + _MASK_SEED + 1), _MASK_PURPOSE, e, quad, True)
    # Exact in float32: 23 bits and a half.
    u = ((word >> 9).to(tl.int32).to(compute) + 0.5) * 1.1920928955078125e-07
    r = (z + log(u.to(tl.float64)).to(compute)) - log((1 - u).to(tl.float64)).to(compute)
    r = divide(r, tl.load(coefficients + _TEMPERATURE) + tl.zeros(r.shape, compute)).to(tl.float64)
    one = tl.full(r.shape, 1.0, tl.float64)
    return (one / (one + exp(r * tl.full(r.shape, -1.0, tl.float64)))).to(compute)


@triton.jit
def _normalised(coefficients, m):
    """The mask over its mean; 0 where that is 0."""
    mean = tl.load(coefficients + _MEAN) + tl.zeros(m.shape, m.dtype)
    return tl.where(mean == 0, tl.zeros(m.shape, m.dtype), divide(m, mean))


@triton.jit
def seg_dot_kernel(
    table,
    coefficients,
    sums_ptr,
    NUM_MODELS: tl.constexpr,
    GROUPS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_BASE: tl.constexpr,
    DTYPE: tl.constexpr,
    GRADIENT: tl.constexpr,
    LOGITS: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """sums[model * GROUPS + group, b] = sum over canonical block b and a group of gradient * v, float64.

    v = x - base, times the mask if there is one. Lane i mod 256 adds its 16 elements in order; the lanes are combined
    by a tree of strides 128, 64, ... 1. What is in another group adds +0.
    Reads (2 + HAS_BASE + HAS_MASK) elements per element and slot, all but the first time from the cache (the slots of a
    block run side by side); writes 8 bytes per block and slot.

    Grid: the slots of BLOCKS canonical blocks, then those of the next.
    table : int64, header and the addresses of the models. coefficients : compute dtype, temperature, mean, shift.
    """
    n = tl.load(table + _N)
    num_blocks = (n + 4095) // 4096
    slots = NUM_MODELS * GROUPS
    slot = tl.program_id(0).to(tl.int64) % slots
    block = tl.program_id(0).to(tl.int64) // slots * BLOCKS + tl.arange(0, BLOCKS).to(tl.int64)
    address = tl.load(table + _MODELS + slot // GROUPS)
    lane = tl.arange(0, 256).to(tl.int64)
    quads = tl.arange(0, 64).to(tl.int64)
    lanes = tl.zeros([BLOCKS, 256], tl.float64)
    for i in range(16):
        e = block[:, None] * 4096 + i * 256 + lane[None, :]
        mask = e < n
        quad = tl.load(table + _G0) // 4 + block[:, None] * 1024 + i * 64 + quads[None, :]
        d = load(address, e, mask, DTYPE, COMPUTE, True, False)[1]
        if HAS_BASE:
            d = d - load(tl.load(table + _BASE), e, mask, DTYPE, COMPUTE, True, False)[1]
        if HAS_MASK:
            d = _normalised(coefficients, _mask(table, coefficients, e, quad, mask, LOGITS, COMPUTE, True)) * d
        g = load(tl.load(table + _GRADIENT), e, mask, GRADIENT, COMPUTE, True, False)[1]
        use = mask
        if GROUPS > 1:
            word = words(tl.load(table + _GROUP_SEED), tl.load(table + _GROUP_SEED + 1), GROUP_PURPOSE, e, quad, True)
            use = use & (((word.to(tl.int64) * GROUPS) >> 32) == slot % GROUPS)
        lanes = lanes + tl.where(use, g.to(tl.float64) * d.to(tl.float64), tl.zeros([BLOCKS, 256], tl.float64))
    tl.store(sums_ptr + slot * num_blocks + block, fold_lanes(lanes), mask=block < num_blocks)


@triton.jit
def mask_sum_kernel(table, coefficients, sums_ptr, LOGITS: tl.constexpr, COMPUTE: tl.constexpr, BLOCKS: tl.constexpr):
    """sums[b] = sum of the mask m over canonical block b, float64, in the order of `seg_dot_kernel`.

    Reads one logit per element, writes 8 bytes per block. Grid: programs of BLOCKS canonical blocks.
    """
    n = tl.load(table + _N)
    num_blocks = (n + 4095) // 4096
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS).to(tl.int64)
    lane = tl.arange(0, 256).to(tl.int64)
    quads = tl.arange(0, 64).to(tl.int64)
    lanes = tl.zeros([BLOCKS, 256], tl.float64)
    for i in range(16):
        e = block[:, None] * 4096 + i * 256 + lane[None, :]
        mask = e < n
        quad = tl.load(table + _G0) // 4 + block[:, None] * 1024 + i * 64 + quads[None, :]
        m = _mask(table, coefficients, e, quad, mask, LOGITS, COMPUTE, True)
        lanes = lanes + tl.where(mask, m.to(tl.float64), tl.zeros([BLOCKS, 256], tl.float64))
    tl.store(sums_ptr + block, fold_lanes(lanes), mask=block < num_blocks)


@triton.jit
def mask_merge_kernel(
    table,
    coefficients,
    out_ptr,
    SLOPE: tl.constexpr,
    NUM_MODELS: tl.constexpr,
    HAS_BASE: tl.constexpr,
    DTYPE: tl.constexpr,
    GRADIENT: tl.constexpr,
    LOGITS: tl.constexpr,
    COMPUTE: tl.constexpr,
    OUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write base + m / mean * s with s = sum of w (x - base), or with SLOPE the gradient of the logits.

    Reads NUM_MODELS + HAS_BASE elements and the logit (and gradient) per element, writes one.
    table, coefficients : as in `seg_dot_kernel`; the weights follow.
    """
    start = tl.multiple_of(tl.load(table + _START), 16) + tl.program_id(0).to(tl.int64) * BLOCK
    e = start + tl.arange(0, BLOCK).to(tl.int64)
    mask = e < tl.load(table + _N)
    compute = tl.float64 if COMPUTE == F64 else tl.float32
    quad = (tl.load(table + _G0) + start) // 4 + tl.arange(0, BLOCK // 4).to(tl.int64)
    zero = tl.zeros([BLOCK], compute)
    base = zero
    if HAS_BASE:
        base = load(tl.load(table + _BASE), e, mask, DTYPE, COMPUTE, MASKED, ALIGNED)[1]
    total = zero
    for t in tl.range(0, NUM_MODELS):
        d = load(tl.load(table + _MODELS + t), e, mask, DTYPE, COMPUTE, MASKED, ALIGNED)[1]
        if HAS_BASE:
            d = d - base
        total = total + d * tl.load(coefficients + _WEIGHTS + t)
    m = _mask(table, coefficients, e, quad, mask, LOGITS, COMPUTE, MASKED)
    if SLOPE:
        g = load(tl.load(table + _GRADIENT), e, mask, GRADIENT, COMPUTE, MASKED, False)[1]
        mean = tl.load(coefficients + _MEAN) + zero
        y = divide(g * total - tl.load(coefficients + _SHIFT), mean)
        y = divide((y * m) * (1 - m), tl.load(coefficients + _TEMPERATURE) + zero)
        y = tl.where(mean == 0, zero, y)
    else:
        y = _normalised(coefficients, m) * total
        if HAS_BASE:
            y = base + y
    out = narrow(y, OUT)[0]
    if MASKED:
        tl.store(out_ptr + e, out, mask=mask)
    else:
        tl.store(out_ptr + e, out)
