"""What a program computes, as digits of one number that kernels know at compile time.

A switch is worth 0 to 7 times its unit; `PROGRAM // UNIT % 8` reads it, `pack` writes them.
"""

from __future__ import annotations

import triton.language as tl

__all__ = ["pack"]

_NAMES = (
    "POINTS",
    "BANDS",
    "DRAWS",
    "MASKS",
    "BITS",
    "DIVIDES",
    "TIES",
    "JOINT",
    "FACTORS",
    "TABLE",
    "VOTE",
    "ZERO_VOTE",
    "MERGE",
    "DIVISOR",
    "FLOOR",
    "ALONE",
    "LIMIT",
    "USEFUL",
    "SCALE",
    "ANCHOR",
    "BASE_THERE",
    "SUBTRACT",
    "COPY",
)

# Rules that some model has: points (wide ones of bands too), bands, draws, rank masks in bytes, marks in bits.
POINTS = tl.constexpr(8**0)
BANDS = tl.constexpr(8**1)
DRAWS = tl.constexpr(8**2)
MASKS = tl.constexpr(8**3)
BITS = tl.constexpr(8**4)
# Some model's kept deltas are divided by their thresholds.
DIVIDES = tl.constexpr(8**5)
# The dearest rule of a tie: 0 none, 1 by index, 2 by word.
TIES = tl.constexpr(8**6)
# 0 none, 1 a point on the variance, 2 on the product with a number per row.
JOINT = tl.constexpr(8**7)
FACTORS = tl.constexpr(8**8)
# Weights: 0 one number per model, or a table by 1 rows, 2 columns, 3 groups.
TABLE = tl.constexpr(8**9)
# 0 none, 1 weighted, 2 plain, 3 count.
VOTE = tl.constexpr(8**10)
# The sign where v is 0: 0 none, 1 plus, 2 minus.
ZERO_VOTE = tl.constexpr(8**11)
# 0 sum, 1 max, 2 largest, 3 importance, 4 balance.
MERGE = tl.constexpr(8**12)
# 0 none, 1 value, 2 agreeing weights, 3 agreeing count, 4 kept count.
DIVISOR = tl.constexpr(8**13)
FLOOR = tl.constexpr(8**14)
ALONE = tl.constexpr(8**15)
# 0 none, 1 clipped, 2 clipped with a limit below 1e-6: small ones are scaled instead.
LIMIT = tl.constexpr(8**16)
USEFUL = tl.constexpr(8**17)
SCALE = tl.constexpr(8**18)
# 1 the first model in place of the base.
ANCHOR = tl.constexpr(8**19)
BASE_THERE = tl.constexpr(8**20)
SUBTRACT = tl.constexpr(8**21)
COPY = tl.constexpr(8**22)

# The coefficients of a program, in the compute dtype: these, then PER_MODEL numbers for each model.
DIVISOR_VALUE = tl.constexpr(0)
SCALE_VALUE = tl.constexpr(1)
FLOOR_VALUE = tl.constexpr(2)
LIMIT_VALUE = tl.constexpr(3)
SMALL_FACTOR = tl.constexpr(4)
SMALL = tl.constexpr(5)
EPSILON = tl.constexpr(6)
COMMON = tl.constexpr(8)
WEIGHT = tl.constexpr(0)
FACTOR = tl.constexpr(1)
ALONE_FACTOR = tl.constexpr(2)
USEFUL_THRESHOLD = tl.constexpr(3)
BALANCE = tl.constexpr(4)  # lo, hi, spread, cut, top
PER_MODEL = tl.constexpr(16)

# Values of RULE in a row of the table; anything else is a point or none.
DRAW_RULE = tl.constexpr(1)
MASK_RULE = tl.constexpr(2)
BITS_RULE = tl.constexpr(3)


def pack(**switches: int) -> int:
    """The number for these switches; those left out are 0.

    Raises
    ------
    ValueError : no such switch, or a digit that does not fit.
    """
    unknown = set(switches) - set(_NAMES)
    if unknown or not all(0 <= int(v) < 8 for v in switches.values()):
        raise ValueError(f"not switches: {switches}")
    return sum(int(switches.get(name, 0)) * 8**place for place, name in enumerate(_NAMES))
