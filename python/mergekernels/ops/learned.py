"""Requests of the passes behind learned coefficients and masks; `mergekernels.ops.combine` and `concrete` run them.

C is the compute dtype; every operation is rounded, in the order written. exp and log are those of
csrc/common/transcendental.h. Sums are T1: products in float64, over canonical blocks, see `ops.sums`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from ..errors import ArgumentError
from .arguments import check_integer, check_number

__all__ = ["GROUP_PURPOSE", "MASK_PURPOSE", "MAX_GROUPS", "MaskMerge", "Relaxed", "SegDot", "step_seed"]

MASK_PURPOSE = 1
GROUP_PURPOSE = 3
MAX_GROUPS = 256


@dataclass(frozen=True)
class Relaxed:
    """A relaxed Bernoulli mask (Concrete distribution), drawn anew for each seed. For an element with logit z::

        u  = ((word >> 9) + 0.5) * 2^-23              (its Philox word of purpose 1, stream 1)
        m  = C(sigmoid(((z + C(log u)) - C(log(1 - u))) / temperature))
        m^ = m / mean                                 (0 if mean is 0)

    temperature, mean : doubles, rounded to C once. mean : of m over the tensor; it plays no part where m is summed.
    seed, tensor : 64-bit seed and 32-bit tensor id of the Philox counter.
    """

    temperature: float
    seed: int = 0
    tensor: int = 0
    mean: float = 1.0

    def __post_init__(self) -> None:
        check_number(self.temperature, "temperature")
        if self.temperature <= 0:
            raise ArgumentError(
                "temperature is not usable",
                code="temperature",
                expected="a positive number",
                got=repr(self.temperature),
            )
        check_integer(self.seed, 0, 1 << 64, "seed")
        check_integer(self.tensor, 0, 1 << 32, "tensor")


@dataclass(frozen=True)
class SegDot:
    """Dot products of a gradient g with the deltas: sum over a group of g * vt, dt = C(xt - x0) (xt without a base).

    vt = dt, or with a mask vt = C(m^ * dt). The element with Philox word w (purpose 3, stream 3, under `seed` and
    `tensor`) is in group (w * groups) >> 32; what is in another group counts +0. Slot t * groups + group.
    """

    groups: int = 1
    seed: int = 0
    tensor: int = 0
    mask: Relaxed | None = None

    def __post_init__(self) -> None:
        check_integer(self.groups, 1, MAX_GROUPS + 1, "groups")
        check_integer(self.seed, 0, 1 << 64, "seed")
        check_integer(self.tensor, 0, 1 << 32, "tensor")


@dataclass(frozen=True)
class MaskMerge:
    """Merging inside a relaxed mask, or the gradient of that with respect to the logits::

        s  = +0 + w1 d1 + ... + wT dT
        y  = x0 + m^ * s                              (y = m^ * s without a base)
        dz = (((g * s - shift) / mean) * m) * (1 - m) / temperature     (0 if mean is 0)

    shift None asks for y; a number, the mean of g * s * m^ over the tensor, asks for dz.
    weights, shift : doubles, rounded to C once.
    """

    weights: tuple[float, ...]
    mask: Relaxed
    shift: float | None = None


def step_seed(seed: int, step: int) -> int:
    """The seed of a repeated draw: the first 8 bytes, little endian, of SHA-256 over seed and step, 8 bytes each."""
    return int.from_bytes(
        hashlib.sha256(seed.to_bytes(8, "little") + step.to_bytes(8, "little")).digest()[:8], "little"
    )
