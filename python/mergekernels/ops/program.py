"""The declarative program that backends run as one fused element-wise pass.

A program holds numbers only. Methods build it on the host; a backend turns it into one pass.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import ArgumentError
from .arguments import check_bool, check_choice, check_integer, check_number
from .keep import KEEP_NOTHING, Keep, KeepRule, RankBand, RankDraw, Rows

__all__ = ["KEEP_NOTHING", "Balance", "Keep", "Program", "Table", "Useful"]

_VOTES = ("none", "weighted", "plain", "count")
_MERGES = ("sum", "max", "largest", "importance", "balance")
_DIVISORS = ("none", "value", "agreeing_weights", "agreeing_count", "kept_count")


@dataclass(frozen=True)
class Table:
    """Numbers that belong to segments of a tensor instead of the whole.

    axis "rows": the element with flat index g belongs to segment g // length; "columns": to g % length; "groups": to
    (word * length) >> 32 with its Philox word of purpose 3 (stream 3) under the program's seed and `tensor`.
    values : float64, [segments], or [models, segments] where they are weights; rounded to the compute dtype once.
    """

    axis: Literal["rows", "columns", "groups"]
    length: int
    values: array[float]
    tensor: int = 0

    def __post_init__(self) -> None:
        check_choice(self.axis, ("rows", "columns", "groups"), "axis")
        check_integer(self.length, 1, 1 << 62 if self.axis != "groups" else 257, "length")
        check_integer(self.tensor, 0, 1 << 32, "tensor")
        if not isinstance(self.values, array) or self.values.typecode != "d":
            raise _refusal("values", "an array of doubles (typecode d)", repr(self.values)[:40])


@dataclass(frozen=True)
class Useful:
    """Keep the merged delta only where at least `at_least` models use it: |dt| > thresholds[t] * |q - dt|.

    q : the merged delta after the divisor, dt : the model's own delta, untrimmed; operations in C, in this order.
    """

    thresholds: tuple[float, ...]
    at_least: int

    def __post_init__(self) -> None:
        for t in range(_length(self.thresholds, "thresholds")):
            check_number(self.thresholds[t], f"thresholds[{t}]")
        check_integer(self.at_least, 0, 1 << 31, "at_least")


@dataclass(frozen=True)
class Balance:
    """How one model competes in merge "balance" (PCB), in the compute dtype C, every operation rounded::

    a  = |dt| clipped to [lo, hi]
    m  = (a - lo) / (hi - lo)                           (0 if hi == lo)
    z  = exp(spread * (m * m)) * tanh(dt * S)           (S = +0 + d1 + ... + dT; z = 0 where negative, NaN stays)
    ct = (max(z, cut) - cut) / (top - cut)              (0 if top == cut)
    """

    lo: float
    hi: float
    spread: float
    cut: float = 0.0
    top: float = 0.0

    def __post_init__(self) -> None:
        for name in ("lo", "hi", "spread", "cut", "top"):
            check_number(getattr(self, name), name)


@dataclass(frozen=True)
class Program:
    """The fused element-wise pass. All arithmetic in the compute dtype C, without contraction, models in order.

    For each element, with x0 the base and xt model t (T models)::

        dt = xt - x0                      (dt = xt if not subtract, or without a base)
        et = dt if kept by keep[t] and by joint, else +0
        et = et * factors[t]              (only if factors[t] != 1)
        wt = weights[t] * et              (weights of `table` if there is one)
        s  = +0 + w1 + w2 + ... + wT

        vote "none":      no election
        vote "weighted":  v = s,                              and model t stands for the sign of wt
        vote "plain":     v = +0 + e1 + ... + eT,             and model t stands for the sign of et
        vote "count":     v = +0 + sgn(e1) + ... + sgn(eT),   and model t stands for the sign of et
        sign = +1 if v > 0, -1 if v < 0, zero_vote if v == 0; model t agrees if it stands for `sign`, which is not 0

        merge "sum":      num = s; with a vote num = +0 + sum of the wt that agree, in order
        merge "max":      num = sign * (largest |wt| among those that agree, else +0)          (needs a vote)
        merge "largest":  num = wt of the largest |et|, the later among equals; +0 if every et is 0
        merge "importance": x1..xT are followed by F1..FT; at = weights[t] * (Ft + epsilon),
                          num = (+0 + a1 x1 + ... + aT xT) / (+0 + a1 + ... + aT)
        merge "balance":  num = (+0 + c1 b1 + ... + cT bT) / max(+0 + c1 + ... + cT, epsilon), bt = a of `Balance` with
                          the sign of dt (+0 where dt is 0)

        divisor "none": q = num
        "value": q = num / divisor_value
        "agreeing_weights": q = num / u, u = +0 + sum of the weights[t] that agree, in order; exact 0 becomes 1, or
                            with divisor_floor > 0 what is below it becomes divisor_floor
        "agreeing_count": q = num / max(1, number that agree)
        "kept_count":     q = num / max(1, number of et that are not 0)
        alone: where exactly one et is not 0, q = alone[t] * et instead
        limit: q = q clipped to [-limit, limit]; but with limit < 1e-6 and |q| < C(1e-6), q = q * C(limit * 1e6)
        useful: q = +0 where too few models use it, see `Useful`
        y  = q * scale (only if scale != 1)
        y  = anchor + y   (the base or the first model; only with a base)
        out = round to nearest even to the output dtype; NaN becomes the canonical NaN; if s (or, for "importance" and
              "balance", num) is NaN, y is NaN

    With `copy` there is one model and only the scale: y = x1 * scale (if scale != 1), which preserves -0; without
    scale, load cast and change of dtype the bits are copied.

    A comparison with a NaN is false: a NaN stands for no sign, is never the largest, and passes a clip unchanged.
    `sign` is -1, 0 or 1 in C, so that "max" gives -0 where it is -1 and nobody agrees.

    Statistics: kept counts et that are not 0 per model (0 for F1..FT), conflicts the elements with wt of both signs,
    votes v > 0 and v < 0 (s without a vote); an Ft below 0 is reported like one that is not finite; norms are of dt.

    weights, factors, alone, divisor_value, divisor_floor, limit, scale, epsilon : doubles; a backend rounds each to C
    once.
    keep : one entry per model, None keeps everything (no trimming). joint : a point on the variance key of `Sweep`,
    shared by all models (Philox stream of model 0), or with `importance` on that key (one model).
    importance : one number per row, for `joint`. rows : for the rank rules in `keep`.
    zero_vote : sign used where v == 0; 0 lets the coordinate stay at the base.
    seed, tensor : 64-bit seed and 32-bit tensor id of the Philox counter.

    Raises
    ------
    ArgumentError : a field is of another type or out of its range, fields do not fit together or differ in length.
    """

    weights: tuple[float, ...]
    keep: tuple[KeepRule | None, ...]
    base: bool = True
    subtract: bool = True
    vote: Literal["none", "weighted", "plain", "count"] = "none"
    zero_vote: int = 1
    merge: Literal["sum", "max", "largest", "importance", "balance"] = "sum"
    divisor: Literal["none", "value", "agreeing_weights", "agreeing_count", "kept_count"] = "none"
    divisor_value: float = 1.0
    divisor_floor: float = 0.0
    scale: float = 1.0
    copy: bool = False
    seed: int = 0
    tensor: int = 0
    factors: tuple[float, ...] = ()
    alone: tuple[float, ...] = ()
    limit: float | None = None
    useful: Useful | None = None
    balance: tuple[Balance, ...] = ()
    joint: Keep | None = None
    importance: Table | None = None
    rows: Rows | None = None
    table: Table | None = None
    epsilon: float = 0.0
    anchor: Literal["base", "first"] = "base"

    def __post_init__(self) -> None:
        num_models = _length(self.weights, "weights")
        if not 1 <= num_models <= 64:
            raise _refusal("weights", "1 to 64 numbers, one per model", f"{num_models}")
        _check_numbers(self.weights, "weights")
        if _length(self.keep, "keep") != num_models:
            raise _refusal("keep", f"{num_models} entries, one per weight", f"{len(self.keep)}")
        for t, keep in enumerate(self.keep):
            if keep is not None and not isinstance(keep, KeepRule):
                raise _refusal(f"keep[{t}]", "a rule of ops.keep or None", repr(keep))
        check_choice(self.vote, _VOTES, "vote")
        check_choice(self.merge, _MERGES, "merge")
        check_choice(self.divisor, _DIVISORS, "divisor")
        check_integer(self.zero_vote, -1, 2, "zero_vote")
        for name in ("divisor_value", "divisor_floor", "scale", "epsilon"):
            check_number(getattr(self, name), name)
        for name in ("factors", "alone"):
            values = getattr(self, name)
            if _length(values, name) not in (0, num_models):
                raise _refusal(name, f"{num_models} numbers, one per weight, or none", f"{len(values)}")
            _check_numbers(values, name)
        for name in ("base", "subtract", "copy"):
            check_bool(getattr(self, name), name)
        check_integer(self.seed, 0, 1 << 64, "seed")
        check_integer(self.tensor, 0, 1 << 32, "tensor")
        check_choice(self.anchor, ("base", "first"), "anchor")
        if self.copy and num_models != 1:
            raise _refusal("copy", "one model to copy", f"{num_models} models")
        self._check_parts(num_models)

    def _check_parts(self, num_models: int) -> None:
        if self.limit is not None:
            check_number(self.limit, "limit")
            if self.limit < 0:
                raise _refusal("limit", "a number of at least 0", repr(self.limit))
        if self.merge == "max" and self.vote == "none":
            raise _refusal("merge", "a vote, for max", "vote 'none'")
        if self.divisor.startswith("agreeing") and self.vote == "none":
            raise _refusal("divisor", f"a vote, for {self.divisor}", "vote 'none'")
        if self.useful is not None and len(self.useful.thresholds) != num_models:
            raise _refusal("useful", f"{num_models} thresholds, one per weight", f"{len(self.useful.thresholds)}")
        if (self.merge == "balance") != bool(self.balance) or len(self.balance) not in (0, num_models):
            raise _refusal("balance", "one entry per weight with merge 'balance', else none", f"{len(self.balance)}")
        if self.merge == "importance" and (self.base or 2 * num_models > 64):
            raise _refusal("merge", "for importance no base and at most 32 models", f"{num_models} models")
        if self.rows is None and any(isinstance(k, (RankDraw, RankBand)) for k in self.keep):
            raise _refusal("rows", "Rows, for rank rules in keep", "None")
        if self.importance is not None and (self.joint is None or num_models != 1 or self.importance.axis != "rows"):
            raise _refusal("importance", "one number per row, one model and a joint point", "another combination")

    @property
    def num_inputs(self) -> int:
        """Tensors that the pass reads besides the base: the models, and with merge "importance" as many weights."""
        return len(self.weights) * (2 if self.merge == "importance" else 1)

    @property
    def slab(self) -> int:
        """Elements that must come together in one piece: those of a row (of all interleaved rows), else 1."""
        return 1 if self.rows is None else self.rows.length * self.rows.stride

    @property
    def features(self) -> frozenset[str]:
        """What the program needs of a backend beyond points, weights, the weighted vote and plain divisors.

        Of "band", "draw", "rank", "marked", "joint", "importance_key", "factors", "vote", "merge", "divisor", "alone",
        "limit", "useful", "balance", "importance", "table", "groups", "subtract", "anchor".
        """
        found = {_RULES[type(k).__name__] for k in self.keep if k is not None and not isinstance(k, Keep)}
        checks = {
            "joint": self.joint is not None and self.importance is None,
            "importance_key": self.importance is not None,
            "factors": any(f != 1.0 for f in self.factors),
            "vote": self.vote in ("plain", "count"),
            "merge": self.merge in ("max", "largest"),
            "balance": self.merge == "balance",
            "importance": self.merge == "importance",
            "divisor": self.divisor == "kept_count" or self.divisor_floor > 0,
            "alone": bool(self.alone),
            "limit": self.limit is not None,
            "useful": self.useful is not None,
            "table": self.table is not None and self.table.axis != "groups",
            "groups": self.table is not None and self.table.axis == "groups",
            "subtract": self.base and not self.subtract,
            "anchor": self.anchor != "base",
        }
        return frozenset(found | {name for name, needed in checks.items() if needed})


_RULES = {"Band": "band", "Draw": "draw", "RankDraw": "rank", "RankBand": "rank", "Marked": "marked"}


def _length(values: Any, name: str) -> int:
    if not isinstance(values, tuple):
        raise _refusal(name, "a tuple, one entry per model", type(values).__name__)
    return len(values)


def _check_numbers(values: tuple[float, ...], name: str) -> None:
    for t, value in enumerate(values):
        check_number(value, f"{name}[{t}]")


def _refusal(name: str, expected: str, got: str) -> ArgumentError:
    return ArgumentError(f"{name} is not usable", code=f"program.{name.partition('[')[0]}", expected=expected, got=got)
