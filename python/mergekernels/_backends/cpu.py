"""The C++ CPU backend: thin calls into the native module."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, Literal

from .. import _cpu
from .._native import as_tuple
from ..errors import ArgumentError
from ..ops.keep import Band, Draw, Keep, KeepRule, Marked, RankDraw
from ..ops.program import Balance, Program, Table
from ..ops.sums import QUANTITIES, Gram, Reduce
from ..ops.sweeps import Sweep
from ..tensors import DType, Piece, TensorView
from ._cpu_learned import mask_merge, mask_sum, seg_dot
from ._isa import isa

__all__ = [
    "FEATURES",
    "divergence",
    "gram",
    "isa",
    "mark",
    "mask_merge",
    "mask_sum",
    "reduce",
    "seg_dot",
    "stream",
    "sweep",
    "why_not",
]

_TIES = {"all": 0, "none": 1, "hash": 2, "index": 3}
_VOTES = ("none", "weighted", "plain", "count")
_MERGES = ("sum", "max", "largest", "importance", "balance")
_DIVISORS = ("none", "value", "agreeing_weights", "agreeing_count", "kept_count")
_KINDS = ("kept", "agreeing", "useful")
_KEYS = ("delta", "variance", "importance", "balance", "drawn")
_AXES = {"rows": 1, "columns": 2, "groups": 3}

FEATURES = frozenset(
    {
        *("band", "draw", "rank", "marked", "joint", "importance_key", "factors", "table", "groups", "subtract"),
        *("anchor", "vote", "merge", "divisor", "alone", "limit", "useful", "balance", "importance", "divergence"),
        *(
            "key:variance",
            "key:importance",
            "key:balance",
            "key:drawn",
            "gram",
            "reduce",
            "reduce:kept",
            "mark",
            "seg_dot",
        ),
        "concrete",
    }
)
"""See dispatch.Backend."""


def why_not(op: str, views: Sequence[TensorView]) -> str | None:
    """Why this backend cannot serve these views, None if it can.

    Raises
    ------
    BackendError : the instruction set asked for cannot run here.
    """
    isa()
    for view in views:
        if not view.device.startswith("cpu"):
            return f"it computes in host memory, and a tensor is on {view.device}"
    return None


def sweep(
    request: Sweep,
    stats: _cpu.SweepStats,
    piece: Piece,
    base: TensorView | None,
    models: Sequence[TensorView | None],
    *,
    compute: DType,
    tensor: int,
    offset: int,
    threads: int,
) -> None:
    """See ops.sweeps.Sweep."""
    _cpu.sweep(
        stats,
        _box(piece),
        None if base is None else as_tuple(base),
        [None if v is None else as_tuple(v) for v in models],
        compute.code,
        request.seed,
        tensor,
        offset,
        threads,
        isa(),
        _KEYS.index(request.key),
        None if request.rows is None else (request.rows.length, request.rows.values),
        _balance(request.balance),
        request.draws,
    )


def stream(
    program: Program,
    piece: Piece,
    base: TensorView | None,
    models: Sequence[TensorView],
    out: TensorView | None,
    *,
    compute: DType,
    stats: _cpu.StreamStats | None,
    threads: int,
    marks: Sequence[TensorView | None] = (),
) -> None:
    """See ops.program.Program."""
    _cpu.stream(
        _fields(program),
        _box(piece),
        None if base is None else as_tuple(base),
        [as_tuple(v) for v in models],
        None if out is None else as_tuple(out),
        compute.code,
        stats,
        threads,
        isa(),
        [None if v is None else as_tuple(v) for v in marks],
    )


def mark(
    program: Program,
    kind: Literal["kept", "agreeing", "useful"],
    piece: Piece,
    base: TensorView | None,
    models: Sequence[TensorView],
    marks: Sequence[TensorView],
    *,
    compute: DType,
    threads: int,
) -> None:
    """See dispatch.Backend."""
    if kind == "useful" and program.useful is None:
        raise ArgumentError(
            "kind is not usable", code="mark.kind", expected="a program with `useful`, for useful", got="none"
        )
    _cpu.mark(
        _fields(program),
        _KINDS.index(kind),
        _box(piece),
        None if base is None else as_tuple(base),
        [as_tuple(v) for v in models],
        [as_tuple(v) for v in marks],
        compute.code,
        threads,
        isa(),
    )


def reduce(
    program: Program,
    request: Reduce,
    sums: _cpu.BlockSums,
    piece: Piece,
    base: TensorView | None,
    models: Sequence[TensorView],
    *,
    compute: DType,
    threads: int,
    kept: Sequence[TensorView | None] = (),
) -> None:
    """See ops.sums.Reduce and dispatch.Backend.reduce."""
    _cpu.reduce(
        _fields(program),
        [QUANTITIES.index(q) for q in request.quantities],
        sums,
        _box(piece),
        None if base is None else as_tuple(base),
        [as_tuple(v) for v in models],
        compute.code,
        threads,
        isa(),
        [None if v is None else as_tuple(v) for v in kept],
    )


def gram(
    request: Gram,
    sums: _cpu.BlockSums,
    piece: Piece,
    base: TensorView | None,
    models: Sequence[TensorView],
    *,
    compute: DType,
    threads: int,
) -> None:
    """See ops.sums.Gram and dispatch.Backend.gram."""
    _cpu.gram(
        sums,
        request.segments.axis == "columns",
        _box(piece),
        None if base is None or not request.subtract else as_tuple(base),
        [as_tuple(v) for v in models],
        compute.code,
        threads,
        isa(),
    )


def _box(piece: Piece) -> tuple[int, int, int, int]:
    return (piece.g0, piece.rows, piece.cols, piece.ld)


def divergence(
    row_length: int,
    piece: Piece,
    base: TensorView,
    model: TensorView,
    *,
    compute: DType,
    threads: int,
) -> array[float]:
    """See dispatch.Backend.divergence."""
    found = _cpu.divergence(row_length, _box(piece), as_tuple(base), as_tuple(model), compute.code, threads, isa())
    return array("d", found)


def _fields(program: Program) -> dict[str, Any]:
    """A program as native code takes it; see _cpu.stream."""
    useful, rows = program.useful, program.rows
    return {
        "weights": program.weights,
        "keep": [_rule(k) for k in program.keep],
        "base": program.base,
        "subtract": program.subtract,
        "anchor_first": program.anchor == "first",
        "copy": program.copy,
        "vote": _VOTES.index(program.vote),
        "zero_vote": program.zero_vote,
        "merge": _MERGES.index(program.merge),
        "divisor": _DIVISORS.index(program.divisor),
        "divisor_value": program.divisor_value,
        "divisor_floor": program.divisor_floor,
        "scale": program.scale,
        "epsilon": program.epsilon,
        "seed": program.seed,
        "tensor": program.tensor,
        "factors": program.factors,
        "alone": program.alone,
        "limit": program.limit,
        "thresholds": () if useful is None else useful.thresholds,
        "at_least": 0 if useful is None else useful.at_least,
        "balance": _balance(program.balance),
        "joint": None if program.joint is None else _point(program.joint),
        "importance": _table(program.importance),
        "table": _table(program.table),
        "rows": (0, 0) if rows is None else (rows.length, rows.stride),
    }


def _rule(rule: KeepRule | None) -> tuple[Any, ...] | None:
    if rule is None:
        return None
    if isinstance(rule, Keep):
        return (1, _point(rule))
    if isinstance(rule, Band):
        return (2, None if rule.wide is None else _point(rule.wide), _point(rule.top))
    if isinstance(rule, Draw):
        return (3, rule.threshold, None if rule.point is None else _point(rule.point))
    if isinstance(rule, Marked):
        return (4,)
    if isinstance(rule, RankDraw):
        return (5, rule.low, rule.span, rule.single, rule.divide)
    return (6, rule.first, rule.last)


def _point(point: Keep) -> tuple[int, int, int, int]:
    return (point.tau, _TIES[point.ties], point.word, point.index)


def _balance(rules: Sequence[Balance]) -> list[tuple[float, float, float, float, float]]:
    return [(b.lo, b.hi, b.spread, b.cut, b.top) for b in rules]


def _table(table: Table | None) -> tuple[int, int, int, Any] | None:
    return None if table is None else (_AXES[table.axis], table.length, table.tensor, table.values)
