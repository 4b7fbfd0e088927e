"""The declarative programs that backends run: what `stream` writes and what a `select` sweep counts.

A program holds numbers only. Methods build it on the host; a backend turns it into one fused pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..errors import ArgumentError
from .arguments import check_bool, check_choice, check_integer, check_number

__all__ = ["KEEP_NOTHING", "MAX_KEY", "NUM_BINS", "Interval", "Keep", "Program", "Sweep", "bin_shift"]

MAX_KEY = {"F32": 0x7F800001, "F64": 0x7FF0000000000001}
"""Largest key per compute dtype. A key is the bit pattern of |delta|; every NaN has this key, one above infinity."""

NUM_BINS = 4096
"""Bins of the histogram that a sweep keeps where its interval holds more entries than its capacity."""


@dataclass(frozen=True)
class Keep:
    """The point `(tau, word, index)` to which a selection resolves.

    An element with key k and flat index g is kept iff k > tau, or k == tau and its tie rule says so:
    "all": kept; "none": not kept; "hash": (Philox word, g) <= (word, index); "index": g <= index.

    tau : key, the bits of |delta| in the compute dtype. word : 32 bits. index : flat index in the tensor,
    -1 for none at that word.

    Raises
    ------
    ArgumentError : a field is of another type or out of its range.
    """

    tau: int
    ties: Literal["all", "none", "hash", "index"] = "all"
    word: int = 0
    index: int = -1

    def __post_init__(self) -> None:
        check_integer(self.tau, 0, 1 << 64, "tau")
        check_choice(self.ties, ("all", "none", "hash", "index"), "ties")
        check_integer(self.word, 0, 1 << 32, "word")
        check_integer(self.index, -1, 1 << 63, "index")


KEEP_NOTHING = Keep(tau=2**64 - 1, ties="none")
"""The point that no element passes (density 0)."""


@dataclass(frozen=True)
class Program:
    """The fused element-wise pass. All arithmetic in the compute dtype C, without contraction, models in order.

    For each element, with x0 the base and xt model t (T models)::

        dt = xt - x0                      (dt = xt without a base)
        et = dt if kept by keep[t] else +0
        wt = weights[t] * et
        s  = +0 + w1 + w2 + ... + wT
        consensus "none":  num = s
        consensus "sum":   sign = +1 if s > 0, -1 if s < 0, zero_vote if s == 0
                           agree_t = (wt > 0 and sign > 0) or (wt < 0 and sign < 0)
                           num = +0 + sum of the wt that agree, in order
        divisor "none": q = num
        "value": q = num / divisor_value
        "agreeing_weights": q = num / (+0 + sum of weights[t] that agree, in order; exact 0 becomes 1)
        "agreeing_count": q = num / max(1, number that agree)
        y  = q * scale (only if scale != 1)
        y  = x0 + y   (only with a base)
        out = round to nearest even to the output dtype; NaN becomes the canonical NaN; if s is NaN, y is NaN

    With `copy` there is one model and only the scale: y = x1 * scale (if scale != 1), which preserves -0; without
    scale, load cast and change of dtype the bits are copied.

    weights, divisor_value, scale : doubles; a backend rounds each to C once.
    keep : one entry per model, None keeps everything (no trimming).
    zero_vote : sign used where s == 0; 0 lets the coordinate stay at the base.
    seed, tensor : 64-bit seed and 32-bit tensor id of the Philox counter, for "hash" ties.

    Raises
    ------
    ArgumentError : a field is of another type or out of its range, or weights and keep differ in length.
    """

    weights: tuple[float, ...]
    keep: tuple[Keep | None, ...]
    base: bool = True
    consensus: Literal["none", "sum"] = "none"
    zero_vote: int = 1
    divisor: Literal["none", "value", "agreeing_weights", "agreeing_count"] = "none"
    divisor_value: float = 1.0
    scale: float = 1.0
    copy: bool = False
    seed: int = 0
    tensor: int = 0

    def __post_init__(self) -> None:
        num_models = _length(self.weights, "weights")
        if not 1 <= num_models <= 64:
            raise _refusal("weights", "1 to 64 numbers, one per model", f"{num_models}")
        for t, weight in enumerate(self.weights):
            check_number(weight, f"weights[{t}]")
        if _length(self.keep, "keep") != num_models:
            raise _refusal("keep", f"{num_models} entries, one per weight", f"{len(self.keep)}")
        for t, keep in enumerate(self.keep):
            if keep is not None and not isinstance(keep, Keep):
                raise _refusal(f"keep[{t}]", "a Keep or None", repr(keep))
        check_choice(self.consensus, ("none", "sum"), "consensus")
        check_choice(self.divisor, ("none", "value", "agreeing_weights", "agreeing_count"), "divisor")
        check_integer(self.zero_vote, -1, 2, "zero_vote")
        check_number(self.divisor_value, "divisor_value")
        check_number(self.scale, "scale")
        check_bool(self.base, "base")
        check_bool(self.copy, "copy")
        check_integer(self.seed, 0, 1 << 64, "seed")
        check_integer(self.tensor, 0, 1 << 32, "tensor")
        if self.copy and num_models != 1:
            raise _refusal("copy", "one model to copy", f"{num_models} models")


def _length(values: Any, name: str) -> int:
    if not isinstance(values, tuple):
        raise _refusal(name, "a tuple, one entry per model", type(values).__name__)
    return len(values)


def _refusal(name: str, expected: str, got: str) -> ArgumentError:
    return ArgumentError(f"{name} is not usable", code=f"program.{name.partition('[')[0]}", expected=expected, got=got)


@dataclass(frozen=True)
class Interval:
    """What one model looks for in a sweep.

    stage "key": the ordinal is the key of every element; larger is ahead.
    stage "tie": only elements whose key equals `tau` count; the ordinal is the Philox word (order "hash", purpose 2)
        or the scope index (order "index"); smaller is ahead.
    lo, hi : inclusive bounds of the ordinals of interest, 1 <= lo <= hi for keys.
    """

    stage: Literal["key", "tie"]
    lo: int
    hi: int
    tau: int = 0


@dataclass(frozen=True)
class Sweep:
    """One counting pass of a selection, for all models at once; a None interval leaves that model out.

    For each model the pass yields: `before`, the number of elements ahead of the interval; `inside`, the number in it;
    the entries (ordinal, scope index) inside as long as there are at most `capacity`, else a histogram of NUM_BINS
    bins, bin = (ordinal - lo) >> bin_shift(lo, hi).

    base : deltas are taken from a base. order : the tie order. seed : Philox seed.
    """

    intervals: tuple[Interval | None, ...]
    order: Literal["hash", "index"] = "hash"
    base: bool = True
    seed: int = 0


def bin_shift(lo: int, hi: int) -> int:
    """The smallest shift for which (hi - lo) >> shift is below NUM_BINS."""
    return max(0, (hi - lo).bit_length() - NUM_BINS.bit_length() + 1)
