"""Rules that say which entries of a task vector are kept: plain numbers that every backend evaluates alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..errors import ArgumentError
from .arguments import check_bool, check_choice, check_integer

__all__ = ["KEEP_NOTHING", "MAX_KEY", "Band", "Draw", "Keep", "KeepRule", "Marked", "RankBand", "RankDraw", "Rows"]

MAX_KEY = {"F32": 0x7F800001, "F64": 0x7FF0000000000001}
"""Largest key per compute dtype. A key is the bit pattern of |delta|; every NaN has this key, one above infinity."""


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
class Band:
    """Kept iff it passes `wide` and does not pass `top`: all but the smallest and the largest entries.

    wide : None keeps everything. top : the point that the entries to cut pass.

    Raises
    ------
    ArgumentError : a field is not a point.
    """

    wide: Keep | None
    top: Keep

    def __post_init__(self) -> None:
        for name, value in (("wide", self.wide), ("top", self.top)):
            if not isinstance(value, Keep) and (name == "top" or value is not None):
                raise _refusal(name, "a Keep", value)


@dataclass(frozen=True)
class Draw:
    """Kept iff the element's Philox word (purpose 0) is below `threshold` = floor(density * 2^32).

    point : what is kept must pass it too; see the key "drawn" of `Sweep`.

    Raises
    ------
    ArgumentError : threshold outside [0, 2^32], or a point of another type.
    """

    threshold: int
    point: Keep | None = None

    def __post_init__(self) -> None:
        check_integer(self.threshold, 0, (1 << 32) + 1, "threshold")
        if self.point is not None and not isinstance(self.point, Keep):
            raise _refusal("point", "a Keep or None", self.point)


@dataclass(frozen=True)
class RankDraw:
    """Kept iff the Philox word (purpose 0) is below a threshold that rises with the rank of |delta| in its row.

    With rank r = 1 (smallest) to m (see `Rows`): threshold(r) = low + ((r - 1) * span) // (m - 1); in a row of one
    element it is `single`. `divide`: a kept delta is divided by C(threshold(r)) * 2^-32 (C: the compute dtype; the
    product is exact).

    Raises
    ------
    ArgumentError : a threshold outside [0, 2^32].
    """

    low: int
    span: int
    single: int
    divide: bool = False

    def __post_init__(self) -> None:
        for name in ("low", "span", "single"):
            check_integer(getattr(self, name), 0, (1 << 32) + 1, name)
        check_integer(self.low + self.span, 0, (1 << 32) + 1, "low + span")
        check_bool(self.divide, "divide")


@dataclass(frozen=True)
class RankBand:
    """Kept iff the place q = m + 1 - r of the element, counted from the largest of its row, has first < q <= last.

    Raises
    ------
    ArgumentError : not 0 <= first <= last < 2^31.
    """

    first: int
    last: int

    def __post_init__(self) -> None:
        check_integer(self.last, 0, 1 << 31, "last")
        check_integer(self.first, 0, self.last + 1, "first")


@dataclass(frozen=True)
class Marked:
    """Kept iff the element's bit is set in the marks that are given beside the models.

    Marks are packed: the bit of flat index g is bit g % 8 of byte g // 8.
    """


KeepRule = Keep | Band | Draw | RankDraw | RankBand | Marked
"""Any of the rules."""


@dataclass(frozen=True)
class Rows:
    """What a row is for `RankDraw` and `RankBand`: `length` elements, `stride` apart.

    Element g of the tensor belongs to row (g // (length * stride), g % stride). Ranks order by (key ascending, Philox
    word of purpose 2 descending, index descending): whichever of two equals comes first in a selection counts as the
    larger. Pieces of programs with such rules are flat and hold whole slabs of length * stride elements.

    Raises
    ------
    ArgumentError : a field below 1, or a length of 2^31 or more.
    """

    length: int
    stride: int = 1

    def __post_init__(self) -> None:
        check_integer(self.length, 1, 1 << 31, "length")
        check_integer(self.stride, 1, 1 << 62, "stride")


def _refusal(name: str, expected: str, got: Any) -> ArgumentError:
    return ArgumentError(f"{name} is not usable", code=f"keep.{name}", expected=expected, got=repr(got))
