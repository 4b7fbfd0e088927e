"""Programs with every feature alone and in random combinations, over values of every dtype and kind."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from gpu_matrix import inputs, values
from mergekernels._backends.reference.common import delta, flat_index, keys, load, ordered_sum
from mergekernels._backends.reference.rules import balance, importance, variance
from mergekernels._native import torch_dtype, view_of
from mergekernels.ops.keep import Band, Draw, Keep, KeepRule, Marked, RankBand, RankDraw, Rows
from mergekernels.ops.program import Balance, Program, Table, Useful
from mergekernels.tensors import BF16, F16, F32, F64, DType, Piece, compute_dtype

MIXES: dict[str, tuple[DType, ...]] = {
    "bf16": (BF16,),
    "fp16": (F16,),
    "fp32": (F32,),
    "fp64": (F64,),
    "mixed": (BF16, F16, F32),
    "mixed64": (F32, BF16, F64),
}
"""Dtypes of the base and the models, in turn."""
KINDS = ("weights", "ties", "nasty")


@dataclass
class Setting:
    """What a program is made for. models : T tensors of the piece's elements; deltas : dt in the compute dtype C."""

    rng: random.Random
    piece: Piece
    base: torch.Tensor | None
    models: list[torch.Tensor]
    deltas: list[torch.Tensor]
    compute: DType

    @property
    def num_models(self) -> int:
        return len(self.models)

    @property
    def n(self) -> int:
        return self.piece.numel

    @property
    def g(self) -> torch.Tensor:
        return flat_index(self.piece, torch.device("cpu"))


def setting(rng: random.Random, mix: str, kind: str, num_models: int, piece: Piece, *, base: bool = True) -> Setting:
    """A base and models of one mix of dtypes and one kind of values."""
    dtypes, n = MIXES[mix], piece.numel
    x0, models = inputs(n, dtypes[0], num_models, kind, seed=rng.randrange(1 << 30), base=base)
    models = [x.to(torch_dtype(dtypes[(m + 1) % len(dtypes)])) for m, x in enumerate(models)]
    compute = compute_dtype([view_of(x).dtype for x in [*models, *([x0] if x0 is not None else [])]])
    loaded = None if x0 is None else load(view_of(x0), compute)
    return Setting(rng, piece, x0, models, [delta(load(view_of(x), compute), loaded) for x in models], compute)


def point(s: Setting, number: torch.Tensor) -> Keep:
    """A point near the numbers that are ranked, so that ties at it happen."""
    tau = s.rng.choice((0, 2**64 - 1))
    if s.n and s.rng.random() < 0.9:
        tau = int(keys(number)[s.rng.randrange(s.n)])
    ties = s.rng.choice(("all", "none", "hash", "hash", "index"))
    last = s.piece.g0 + max(s.piece.rows - 1, 0) * s.piece.ld + s.piece.cols
    middle = s.rng.choice((-1, s.piece.g0 + s.n // 2, s.rng.randrange(-1, last + 1)))
    return Keep(tau, ties, s.rng.choice((0, 2**31, s.rng.randrange(2**32), 2**32 - 1)), middle)


def weights(s: Setting, count: int | None = None) -> tuple[float, ...]:
    """Numbers of every kind, few of them 0."""
    pick = s.rng.choice
    count = s.num_models if count is None else count
    return tuple(
        pick((1.0, -0.7, 0.5, 1e-3, s.rng.gauss(0, 1), s.rng.random(), pick((0.0, 1.0)))) for _ in range(count)
    )


def a_rule(s: Setting, t: int, *, rows: bool, marks: bool) -> KeepRule | None:
    """Any rule that the piece allows."""
    rng = s.rng
    kinds = ["none", "keep", "keep", "band", "draw", *(["rank", "place"] if rows else []), *(["mark"] if marks else [])]
    kind = rng.choice(kinds)
    if kind == "keep":
        return point(s, s.deltas[t])
    if kind == "band":
        return Band(rng.choice((None, point(s, s.deltas[t]))), point(s, s.deltas[t]))
    if kind == "draw":
        return Draw(
            rng.choice((0, 1 << 32, 1 << 31, rng.randrange(1 << 32))), rng.choice((None, point(s, s.deltas[t])))
        )
    if kind == "rank":
        low = rng.choice((0, 1 << 32, rng.randrange(1 << 32)))
        span = rng.choice((0, (1 << 32) - low, rng.randrange((1 << 32) - low + 1)))
        return RankDraw(low, span, rng.choice((0, 1 << 31, 1 << 32)), rng.random() < 0.5)
    if kind == "place":
        last = rng.choice((0, 1, 3, 2**31 - 1))
        return RankBand(rng.randrange(min(last, 3) + 1), last)
    return Marked() if kind == "mark" else None


def rows_of(s: Setting) -> Rows:
    """Rows of which whole slabs make up the piece."""
    n = max(s.n, 1)
    lengths = [length for length in (1, 2, 5, 7, 16, 51, 64, 125, 1024, 3500, n, n) if n % length == 0]
    length = s.rng.choice(lengths)
    strides = [stride for stride in (1, 1, 2, 4, 5, 20, n // length) if (n // length) % stride == 0]
    return Rows(length, s.rng.choice(strides))


def table(s: Setting, axis: str) -> Table:
    """Weights by segment, some of them 0."""
    end = max(s.piece.g0 + max(s.piece.rows - 1, 0) * s.piece.ld + s.piece.cols, 1)
    length = s.rng.choice((1, 3, 64, 100, 256))
    count = length
    if axis == "rows":
        length = -(-end // s.rng.choice((1, 2, 7, 100)))
        count = -(-end // length)
    elif axis == "columns":
        length = count = s.rng.choice((1, 5, 100, 12345))
    numbers = array("d", weights(s, count * s.num_models))
    return Table(axis, length, numbers, s.rng.randrange(1 << 32))  # type: ignore[arg-type]


def row_table(s: Setting) -> Table:
    """Importances of rows."""
    found = table(s, "rows")
    return Table("rows", found.length, array("d", [abs(v) for v in found.values[: len(found.values) // s.num_models]]))


def quantile(x: torch.Tensor, at: float) -> float:
    """A number among the finite ones of x, 0 where there is none."""
    found = x[x.isfinite()].sort().values
    return float(found[min(len(found) - 1, int(at * len(found)))]) if len(found) else 0.0


def balances(s: Setting) -> tuple[Balance, ...]:
    """Ranges and cuts within the values, sometimes empty ones."""
    total, rules = ordered_sum(s.deltas), []
    for d in s.deltas:
        lo = quantile(d.abs(), s.rng.choice((0.0, 0.1, 0.5)))
        hi = s.rng.choice((lo, quantile(d.abs(), 0.9), quantile(d.abs(), 1.0)))
        first = Balance(lo, max(lo, hi), s.rng.choice((1.0, float(s.num_models), 100.0)))
        z = balance(first, d, total)[1]
        cut = quantile(z, s.rng.choice((0.0, 0.5)))
        top = s.rng.choice((cut, quantile(z, 1.0), quantile(z, 1.0)))
        rules.append(Balance(first.lo, first.hi, first.spread, cut, top))
    return tuple(rules)


def useful(s: Setting) -> Useful:
    """Thresholds around 1."""
    numbers = tuple(s.rng.choice((0.2, 0.7, 1.0, 1.6)) for _ in s.models)
    return Useful(numbers, s.rng.choice((0, 1, 2, s.num_models, s.num_models + 1)))


def limit(s: Setting) -> float:
    """Limits within the deltas and below 1e-6."""
    return s.rng.choice((0.0, 0.01, 1e-3, 3e-7, 9.9e-7, 1e-6, quantile(s.deltas[0].abs(), 0.5)))


_VOTED = ("none", "value", "agreeing_weights", "agreeing_count", "kept_count")


def _alone(name: str, s: Setting) -> dict[str, Any]:
    """The fields of a program in which one feature takes part."""
    rng, everyone = s.rng, range(s.num_models)
    if name in ("band", "draw", "draw_point", "rank", "place", "rank_divide"):
        rules: dict[str, Callable[[int], KeepRule]] = {
            "band": lambda t: Band(None if t == 0 else point(s, s.deltas[t]), point(s, s.deltas[t])),
            "draw": lambda t: Draw((0, 1 << 31, 1 << 32)[(t + s.n) % 3]),
            "draw_point": lambda t: Draw((1 << 31, 3 << 30, 1 << 32)[(t + s.n) % 3], point(s, s.deltas[t])),
            "rank": lambda t: RankDraw((1 << 30) * (t % 3), 1 << 31, 1 << 31),
            "rank_divide": lambda t: RankDraw((1 << 30) + t * 12345, (1 << 31) + 98765 * t, 3 << 30, True),
            "place": lambda t: RankBand(t % 2, 2 + t),
        }
        rows = {"rows": rows_of(s)} if name not in ("band", "draw", "draw_point") else {}
        return {"keep": tuple(rules[name](t) for t in everyone), **rows}
    if name == "marked":
        return {"keep": tuple(Marked() if t % 2 == 0 else point(s, s.deltas[t]) for t in everyone)}
    if name == "joint":
        return {"joint": point(s, variance(s.deltas))}
    if name == "importance_key":
        rows_table = row_table(s)
        return {"joint": point(s, importance(s.deltas[0], rows_table, s.g)), "importance": rows_table}
    if name == "factors":
        return {name: weights(s)}
    if name == "alone":
        return {name: weights(s), "keep": tuple(point(s, d) for d in s.deltas)}
    if name.startswith("vote_"):
        keep = tuple(point(s, d) for d in s.deltas)
        return {"vote": name[5:], "keep": keep, "zero_vote": rng.choice((-1, 0, 1)), "divisor": rng.choice(_VOTED)}
    if name == "max":
        return {"vote": rng.choice(("weighted", "plain", "count")), "merge": "max", "zero_vote": rng.choice((-1, 0, 1))}
    if name == "largest":
        return {"merge": "largest", "keep": tuple(point(s, d) for d in s.deltas)}
    if name == "balance":
        return {"merge": "balance", "balance": balances(s), "epsilon": rng.choice((0.0, 1e-12, 0.5))}
    if name == "importance":
        return {"merge": "importance", "epsilon": rng.choice((0.0, 1e-6))}
    if name == "kept_count":
        return {"divisor": "kept_count", "keep": tuple(point(s, d) for d in s.deltas)}
    if name == "floor":
        return {"vote": "weighted", "divisor": "agreeing_weights", "divisor_floor": rng.choice((1e-8, 0.6))}
    if name == "limit":
        return {"limit": limit(s)}
    if name == "useful":
        return {"useful": useful(s), "divisor": "value", "divisor_value": float(s.num_models)}
    if name.startswith("table_"):
        return {"table": table(s, name[6:])}
    if name == "subtract":
        return {"subtract": False}
    assert name == "anchor"
    return {"anchor": "first", "subtract": rng.random() < 0.5}


ALONE = (
    *("band", "draw", "draw_point", "rank", "rank_divide", "place", "marked", "joint", "importance_key"),
    *("factors", "alone"),
    *("vote_weighted", "vote_plain", "vote_count", "max", "largest", "balance", "importance", "kept_count", "floor"),
    *("limit", "useful", "table_rows", "table_columns", "table_groups", "subtract", "anchor"),
)
"""Names of `feature_program`."""


def feature_program(name: str, s: Setting) -> Program:
    """A program in which one feature takes part."""
    return _program(s, _alone(name, s))


def _program(s: Setting, fields: dict[str, Any]) -> Program:
    common: dict[str, Any] = {
        "keep": tuple(None for _ in s.models),
        "base": s.base is not None,
        "scale": s.rng.choice((1.0, 1.0, 0.3, -2.0)),
        "seed": s.rng.choice((0, 2**64 - 1, s.rng.randrange(2**64))),
        "tensor": s.rng.randrange(2**32),
        "divisor_value": s.rng.choice((3.0, float(s.num_models), 0.3, -1.7)),
    }
    return Program(weights(s), **(common | fields))


def random_program(s: Setting, *, rows: bool, marks: bool) -> Program:
    """Any combination of features; rows, marks : whether the piece allows rules by row or by bit."""
    rng = s.rng
    maybe = lambda p: rng.random() < p  # noqa: E731
    fields: dict[str, Any] = {
        "keep": tuple(a_rule(s, t, rows=rows, marks=marks) for t in range(s.num_models)),
        "rows": rows_of(s) if rows else None,
        "subtract": maybe(0.9),
        "vote": rng.choice(("none", "weighted", "plain", "count")),
        "zero_vote": rng.choice((-1, 0, 1)),
        "divisor_floor": rng.choice((0.0, 0.0, 0.4)),
        "scale": rng.choice((1.0, 0.3, -2.0, 0.0)),
    }
    voted = fields["vote"] != "none"
    fields["merge"] = rng.choice(("sum", "sum", "largest", "balance", *(("max", "max") if voted else ())))
    fields["divisor"] = rng.choice(_VOTED if voted else ("none", "value", "kept_count"))
    if s.base is None and s.num_models <= 32 and maybe(0.2):
        fields["merge"] = "importance"
    if fields["merge"] == "balance":
        fields["balance"] = balances(s)
    fields["epsilon"] = rng.choice((0.0, 1e-12, 1e-3))
    if s.num_models == 1 and maybe(0.3):
        fields["importance"] = row_table(s)
        fields["joint"] = point(s, importance(s.deltas[0], fields["importance"], s.g))
    elif maybe(0.2):
        fields["joint"] = point(s, variance(s.deltas))
    for name in ("factors", "alone"):
        if maybe(0.2):
            fields[name] = weights(s)
    if maybe(0.2):
        fields["limit"] = limit(s)
    if maybe(0.2):
        fields["useful"] = useful(s)
    if maybe(0.3):
        fields["table"] = table(s, rng.choice(("rows", "columns", "groups")))
    if maybe(0.15):
        fields["anchor"] = "first"
    return _program(s, fields)


def packed_marks(s: Setting) -> torch.Tensor:
    """Packed bits of a flat piece; what lies beyond the last element is not all 0."""
    n = -(-s.n // 8)
    return torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(s.rng.randrange(1 << 30))).byte()


def importances(s: Setting, kind: str) -> list[torch.Tensor]:
    """F1 .. FT: not negative, but for nasty values."""
    found = [values(s.n, view_of(x).dtype, s.rng.randrange(1 << 30), kind) for x in s.models]
    return found if kind == "nasty" else [x.abs() for x in found]
