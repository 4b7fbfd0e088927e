"""exp, log, tanh and sigmoid as csrc/common/transcendental.h computes them: the same operations, in torch doubles."""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["exp", "in_compute", "log", "sigmoid", "tanh"]

_LN2_HIGH, _LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
_INVERSE_LN2 = 1.44269504088896338700e00
_SHIFT = 6755399441055744.0  # 1.5 * 2^52: what is added to it is rounded to an integer, to nearest even
_EXP = (6227020800.0, 479001600.0, 39916800.0, 3628800.0, 362880.0, 40320.0, 5040.0, 720.0, 120.0, 24.0, 6.0)
_SQRT_HALF = 0x3FE6A09E667F3BCD


def _power_of_two(k: torch.Tensor) -> torch.Tensor:
    return ((k + 1023) << 52).view(torch.float64)


def exp(x: torch.Tensor) -> torch.Tensor:
    """exp(x) of a float64 tensor."""
    clamped = torch.where(x.isnan(), torch.zeros_like(x), x.clamp(-746.0, 710.0))
    k = (clamped * _INVERSE_LN2 + _SHIFT) - _SHIFT
    r = (clamped - k * _LN2_HIGH) - k * _LN2_LOW
    p = torch.full_like(x, 1.0 / _EXP[0])
    for factorial in _EXP[1:]:
        p = p * r + 1.0 / factorial
    for c in (0.5, 1.0, 1.0):
        p = p * r + c
    whole = k.to(torch.int64)
    half = whole >> 1
    y = (p * _power_of_two(half)) * _power_of_two(whole - half)
    return torch.where(x.isnan(), x, y)


def log(x: torch.Tensor) -> torch.Tensor:
    """log(x) of a float64 tensor."""
    tiny = x < 2.2250738585072014e-308
    bits = torch.where(tiny, x * 18014398509481984.0, x).view(torch.int64)
    e = (bits - _SQRT_HALF) >> 52
    m = (bits - (e << 52)).view(torch.float64)
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    p = torch.full_like(x, 1.0 / 21.0)
    for odd in (19.0, 17.0, 15.0, 13.0, 11.0, 9.0, 7.0, 5.0, 3.0):
        p = p * z + 1.0 / odd
    p = p * z + 1.0
    k = (e - 54 * tiny.to(torch.int64)).double()
    y = k * _LN2_HIGH + ((s + s) * p + k * _LN2_LOW)
    y = torch.where(x <= 1.7976931348623157e308, y, x)
    nothing = torch.where(x == 0.0, -torch.inf, torch.nan).to(x)
    return torch.where(x > 0.0, y, nothing)


def tanh(x: torch.Tensor) -> torch.Tensor:
    """tanh(x) of a float64 tensor."""
    a = torch.where(x < 0.0, -x, x)
    t = 1.0 - 2.0 / (exp(a + a) + 1.0)
    z = x * x
    q = torch.full_like(x, 17.0)
    for odd in (15.0, 13.0, 11.0, 9.0, 7.0, 5.0, 3.0, 1.0):
        q = odd + z / q
    return torch.where(a < 0.5, x / q, torch.where(x < 0.0, -t, t))


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    """1 / (1 + exp(-x)) of a float64 tensor."""
    return 1.0 / (1.0 + exp(-x))


def in_compute(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """A function of x in its dtype C: widened, computed in double, rounded to C once."""
    return function(x.double()).to(x.dtype)
