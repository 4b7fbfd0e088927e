"""Rounding of doubles to 16-bit floats in exact fractions, and doubles that two roundings in a row would get wrong."""

from __future__ import annotations

import math
import random
import struct
from fractions import Fraction

import torch

from mergekernels.tensors import BF16, F16, DType

# Bits of the mantissa, exponents of the smallest and the largest normal numbers.
FORMATS = {BF16: (7, -126, 127), F16: (10, -14, 15)}
SIGN = 0x8000


def rounded(x: float, dtype: DType) -> int:
    """The 16 bits of the value of a dtype nearest to x, ties to even; a NaN is canonical."""
    mantissa, low, high = FORMATS[dtype]
    infinity = (high - low + 2) << mantissa
    if math.isnan(x):
        return infinity | 1 << (mantissa - 1)
    sign = SIGN if math.copysign(1.0, x) < 0 else 0
    if math.isinf(x):
        return sign | infinity
    exponent = max(math.frexp(x)[1] - 1, low) if x else low
    units = round(abs(Fraction(x)) / Fraction(2) ** (exponent - mantissa))
    return sign | min(((exponent - low) << mantissa) + units, infinity)


def value(bits: int, dtype: DType) -> Fraction:
    """The value of a pattern without sign; that of infinity is where the next larger number would be."""
    mantissa, low, _ = FORMATS[dtype]
    field = bits >> mantissa
    units = (bits & ((1 << mantissa) - 1)) + ((1 << mantissa) if field else 0)
    return units * Fraction(2) ** (max(field, 1) - 1 + low - mantissa)


def doubles(dtype: DType, seed: int = 0, patterns: int = 150) -> list[float]:
    """Doubles of both signs: on and near the middles between neighbours of a dtype, edges of float32, any bits."""
    rng = random.Random(f"{dtype} {seed}")
    mantissa, low, high = FORMATS[dtype]
    infinity = (high - low + 2) << mantissa
    below = [rng.randrange(infinity) for _ in range(patterns)]  # each exponent is as likely
    below += [rng.randrange(1 << mantissa) for _ in range(patterns // 4)]  # subnormal
    below += [0, 1, 2, (1 << mantissa) - 1, 1 << mantissa, infinity - 2, infinity - 1]
    found = []
    for bits in below:
        middle = float((value(bits, dtype) + value(bits + 1, dtype)) / 2)
        found += [float(value(bits, dtype)), middle, math.nextafter(middle, 0.0), math.nextafter(middle, math.inf)]
        for power in (24, 25, 26, 33, 40, 51):
            found += [middle * (1 - 2.0**-power), middle * (1 + 2.0**-power)]
    largest = (2 - 2.0**-23) * 2.0**127  # of float32
    found += [largest, math.nextafter(largest, math.inf), 2.0**128 - 2.0**103, 2.0**128, 1e300, 1.7976931348623157e308]
    found += [5e-324, 1e-300, 2.0**-150, 2.0**-150 * (1 + 2.0**-30), 2.0**-149, 3 * 2.0**-150, 2.0**-126, 2.0**-127]
    found += [0.0, math.inf, math.nan]
    found += [struct.unpack("<d", rng.randbytes(8))[0] for _ in range(patterns)]
    found += [rng.gauss(0.0, 1.0) for _ in range(patterns)]
    return [sign * x for x in found for sign in (1.0, -1.0)]


def rounded_tensor(xs: list[float], dtype: DType) -> torch.Tensor:
    """The rounded values as a tensor of the dtype."""
    bits = torch.tensor([rounded(x, dtype) for x in xs], dtype=torch.int32).to(torch.int16)
    return bits.view(torch.bfloat16 if dtype is BF16 else torch.float16)


# (dtype, double, its rounding): the float32 nearest to each double is a middle, or the other side of one.
ONCE = [
    (BF16, 1 + 2.0**-8 + 2.0**-40, 1.0078125),
    (BF16, 1 + 2.0**-7 + 2.0**-8 - 2.0**-40, 1.0078125),
    (BF16, -(1 + 2.0**-8 + 2.0**-40), -1.0078125),
    (BF16, 2.0**-134 * (1 + 2.0**-40), 2.0**-133),
    (BF16, 3 * 2.0**-134 * (1 - 2.0**-40), 2.0**-133),
    (BF16, (2 - 2.0**-8) * 2.0**127 * (1 - 2.0**-40), (2 - 2.0**-7) * 2.0**127),
    (F16, 1 + 2.0**-11 + 2.0**-40, 1 + 2.0**-10),
    (F16, 1 + 2.0**-10 + 2.0**-11 - 2.0**-40, 1 + 2.0**-10),
    (F16, -(1 + 2.0**-11 + 2.0**-40), -(1 + 2.0**-10)),
    (F16, 2.0**-25 * (1 + 2.0**-40), 2.0**-24),
    (F16, 3 * 2.0**-25 * (1 - 2.0**-40), 2.0**-24),
    (F16, 65520 * (1 - 2.0**-40), 65504.0),
]
