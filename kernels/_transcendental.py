"""exp, log and tanh of float64 blocks: the operations of csrc/common/transcendental.h, in their order, and no others.

No mathematics library is called: its results differ between devices in the last bits. A bare number
takes the type of the block beside it, so that none of these is narrowed to float32.
"""

# mypy: ignore-errors
# Branches on constexpr stay statements, of which Triton compiles one; results are taken apart whole.

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["exp", "log", "tanh"]

_LN2_HIGH = tl.constexpr(6.93147180369123816490e-01)
_LN2_LOW = tl.constexpr(1.90821492927058770002e-10)
_INVERSE_LN2 = tl.constexpr(1.44269504088896338700e00)
_SHIFT = tl.constexpr(6755399441055744.0)  # 1.5 * 2^52: what is added to it is rounded to an integer, to nearest even


@triton.jit
def exp(x):
    """exp(x)."""
    clamped = tl.where(x < -746.0, -746.0, tl.where(x > 710.0, 710.0, tl.where(x == x, x, 0.0)))
    k = (clamped * _INVERSE_LN2 + _SHIFT) - _SHIFT
    r = (clamped - k * _LN2_HIGH) - k * _LN2_LOW
    p = 1.0 / 6227020800.0
    p = p * r + 1.0 / 479001600.0
    p = p * r + 1.0 / 39916800.0
    p = p * r + 1.0 / 3628800.0
    p = p * r + 1.0 / 362880.0
    p = p * r + 1.0 / 40320.0
    p = p * r + 1.0 / 5040.0
    p = p * r + 1.0 / 720.0
    p = p * r + 1.0 / 120.0
    p = p * r + 1.0 / 24.0
    p = p * r + 1.0 / 6.0
    p = p * r + 0.5
    p = p * r + 1.0
    p = p * r + 1.0
    whole = k.to(tl.int64)
    half = whole >> 1
    # 2^half and 2^(whole - half): each exponent is in range where that of 2^whole need not be.
    first = ((half + 1023) << 52).to(tl.float64, bitcast=True)
    second = ((whole - half + 1023) << 52).to(tl.float64, bitcast=True)
    y = (p * first) * second
    return tl.where(x == x, y, x)


@triton.jit
def log(x):
    """log(x)."""
    tiny = x < 2.2250738585072014e-308
    normal = tl.where(tiny, x * 18014398509481984.0, x)
    bits = normal.to(tl.int64, bitcast=True)
    e = (bits - 0x3FE6A09E667F3BCD) >> 52
    m = (bits - (e << 52)).to(tl.float64, bitcast=True)
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    p = 1.0 / 21.0
    p = p * z + 1.0 / 19.0
    p = p * z + 1.0 / 17.0
    p = p * z + 1.0 / 15.0
    p = p * z + 1.0 / 13.0
    p = p * z + 1.0 / 11.0
    p = p * z + 1.0 / 9.0
    p = p * z + 1.0 / 7.0
    p = p * z + 1.0 / 5.0
    p = p * z + 1.0 / 3.0
    p = p * z + 1.0
    k = (e - 54 * tiny.to(tl.int64)).to(tl.float64)
    y = k * _LN2_HIGH + ((s + s) * p + k * _LN2_LOW)
    y = tl.where(x <= 1.7976931348623157e308, y, x)
    nothing = tl.where(x == 0, float("-inf"), float("nan"))
    return tl.where(x > 0, y, nothing)


@triton.jit
def tanh(x):
    """tanh(x)."""
    negative = x < 0
    a = tl.where(negative, x * -1.0, x)
    t = 1.0 - 2.0 / (exp(a + a) + 1.0)
    z = x * x
    q = 17.0
    q = 15.0 + z / q
    q = 13.0 + z / q
    q = 11.0 + z / q
    q = 9.0 + z / q
    q = 7.0 + z / q
    q = 5.0 + z / q
    q = 3.0 + z / q
    q = 1.0 + z / q
    return tl.where(a < 0.5, x / q, tl.where(negative, t * -1.0, t))
