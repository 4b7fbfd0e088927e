"""exp, log, tanh and sigmoid of the reference: the native bits, and the distance from decimals."""

from __future__ import annotations

import math
import random
import struct
from decimal import Decimal, localcontext

import pytest
import torch

from mergekernels import _cpu
from mergekernels._backends.reference import transcendental

FUNCTIONS = ("exp", "log", "tanh", "sigmoid")
SPECIAL = [
    *(0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -1.0, 0.5, -0.5, 0.49999999999999994, 709.0, 709.79, 710.0, 711.0),
    *(-708.4, -745.13, -745.14, -746.0, -747.0, 5e-324, -5e-324, 1e-310, 2.2250738585072014e-308, 2.225e-308),
    *(1.7976931348623157e308, -1.7976931348623157e308, math.sqrt(0.5), math.sqrt(2.0), 1.0 - 2**-53, 1.0 + 2**-52),
]


def bits_of(x: float) -> bytes:
    return b"nan" if x != x else struct.pack("<d", x)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_transcendental_functions_equal_the_native_ones(name: str) -> None:
    rng = random.Random(name)
    xs = [*SPECIAL, *(rng.gauss(0, 1) * 10 ** rng.uniform(-20, 3) for _ in range(5000))]
    xs += [struct.unpack("<d", rng.randbytes(8))[0] for _ in range(5000)]
    found = getattr(transcendental, name)(torch.tensor(xs, dtype=torch.float64)).tolist()
    for x, y in zip(xs, found, strict=True):
        assert bits_of(y) == bits_of(_cpu.transcendental(name, x)), x


def decimal(name: str, x: float) -> Decimal:
    """The function to some fifty digits."""
    d = Decimal(x)
    if name == "log":
        return d.ln()
    if name == "exp":
        return d.exp()
    if name == "sigmoid":
        return 1 / (1 + (-d).exp())
    e = (2 * abs(d)).exp()
    return ((e - 1) / (e + 1)).copy_sign(d)


@pytest.mark.parametrize(
    ("name", "low", "high", "bound"),
    [("exp", -6, 2.8, 2), ("log", -300, 300, 2), ("tanh", -6, 1.5, 4), ("sigmoid", -6, 2.8, 3)],
)
def test_transcendental_functions_are_accurate(name: str, low: float, high: float, bound: int) -> None:
    """Within `bound` units in the last place, over many magnitudes."""
    rng = random.Random(name)
    xs = [rng.uniform(1, 9.99) * 10 ** rng.uniform(low, high) for _ in range(400)]
    xs += [-x for x in xs] if name != "log" else [rng.uniform(0.5, 2) for _ in range(200)]
    xs = [x for x in xs if abs(x) < 700] if name != "log" else xs
    found = getattr(transcendental, name)(torch.tensor(xs, dtype=torch.float64)).tolist()
    with localcontext() as context:
        context.prec = 60
        for x, y in zip(xs, found, strict=True):
            exact = decimal(name, x)
            assert abs(Decimal(y) - exact) <= bound * Decimal(math.ulp(float(exact))), (x, y)


def test_transcendental_functions_at_the_ends() -> None:
    inf, nan = math.inf, math.nan
    for name, x, expected in [
        *(("exp", inf, inf), ("exp", -inf, 0.0), ("exp", nan, nan), ("exp", 710.0, inf), ("exp", -0.0, 1.0)),
        *(("log", 0.0, -inf), ("log", -0.0, -inf), ("log", -1.0, nan), ("log", inf, inf), ("log", nan, nan)),
        *(("log", 1.0, 0.0), ("tanh", inf, 1.0), ("tanh", -inf, -1.0), ("tanh", -0.0, -0.0), ("tanh", nan, nan)),
        *(("sigmoid", 0.0, 0.5), ("sigmoid", -inf, 0.0), ("sigmoid", inf, 1.0), ("sigmoid", nan, nan)),
    ]:
        y = float(getattr(transcendental, name)(torch.tensor([x], dtype=torch.float64))[0])
        assert bits_of(y) == bits_of(expected), (name, x)
