"""Programs as the CUDA kernels read them: a table in device memory, made by the native module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..ops.keep import Band, Draw, Keep, KeepRule, Marked, RankBand, RankDraw
from ..ops.program import Program
from ..ops.sums import QUANTITIES
from ..tensors import DType, Piece
from ._launches import Extras

if TYPE_CHECKING:
    import torch

__all__ = ["TIES", "address", "fields", "on_device", "point", "rank_rule", "slots"]

TIES = {"all": 0, "none": 1, "hash": 2, "index": 3}
_VOTES = ("none", "weighted", "plain", "count")
_MERGES = ("sum", "max", "largest", "importance", "balance")
_DIVISORS = ("none", "value", "agreeing_weights", "agreeing_count", "kept_count")
_AXES = ("none", "rows", "columns", "groups")


def address(x: torch.Tensor | None) -> int:
    """Where a tensor lies, 0 for none."""
    return 0 if x is None else x.data_ptr()


def point(keep: Keep | None) -> tuple[int, int, int, int] | None:
    """A point as the native module takes it."""
    return None if keep is None else (keep.tau, TIES[keep.ties], keep.word, keep.index)


def fields(program: Program, piece: Piece, extras: Extras) -> dict[str, Any]:
    """A program as `_cuda.plan` takes it; the tensors of `extras` must live as long as the plan is read."""
    useful = program.useful
    joint: tuple[int, Any, int, int] = (0, None, 0, 1)
    if program.importance is not None:
        joint = (2, point(program.joint), address(extras.importance), program.importance.length)
    elif program.joint is not None:
        joint = (1, point(program.joint), 0, 1)
    table = (0, 0, 1, 0, 0)
    if program.table is not None and extras.table is not None:
        axis, length = _AXES.index(program.table.axis), program.table.length
        table = (axis, address(extras.table), length, extras.table.shape[1], program.table.tensor)
    return {
        "seed": program.seed,
        "tensor": program.tensor,
        "weights": list(program.weights),
        "rules": [_rule(k, t, extras) for t, k in enumerate(program.keep)],
        "factors": list(program.factors),
        "alone": list(program.alone),
        "useful": [] if useful is None else list(useful.thresholds),
        "useful_at_least": -1 if useful is None else useful.at_least,
        "balance": [[b.lo, b.hi, b.spread, b.cut, b.top] for b in program.balance],
        "vote": _VOTES.index(program.vote),
        "zero_vote": program.zero_vote + 1,
        "merge": _MERGES.index(program.merge),
        "divisor": _DIVISORS.index(program.divisor),
        "divisor_value": program.divisor_value,
        "divisor_floor": program.divisor_floor,
        "scale": program.scale,
        "epsilon": program.epsilon,
        "limit": program.limit,
        "subtract": program.subtract and not program.copy,
        "anchor_first": program.anchor == "first",
        "joint": joint,
        "table": table,
        "marks_shift": piece.g0 % 8,
    }


def on_device(native: Any, program: Program, piece: Piece, extras: Extras, compute: DType, like: torch.Tensor) -> Any:
    """The table of a program on the device of `like`, copied there on its current stream."""
    import torch

    data = bytearray(native.plan(fields(program, piece, extras), compute.code))
    return torch.frombuffer(data, dtype=torch.uint8).to(like.device)


def rank_rule(rule: RankDraw | RankBand) -> tuple[bool, int, int, int, int, int]:
    """A rank rule as the native module takes it."""
    if isinstance(rule, RankBand):
        return (False, 0, 0, 0, rule.first, rule.last)
    return (True, rule.low, rule.span, rule.single, 0, 0)


def slots(quantities: tuple[str, ...], num_models: int) -> list[tuple[int, int]]:
    """(quantity, model) of each slot of a `Reduce`."""
    result = []
    for name in quantities:
        number = QUANTITIES.index(name)
        result += [(number, m) for m in range(1 if name in QUANTITIES[-2:] else num_models)]
    return result


def _rule(rule: KeepRule | None, model: int, extras: Extras) -> tuple[int, Any, Any, int, int, int, int]:
    if rule is None:
        return (0, None, None, 0, 0, 0, 0)
    if isinstance(rule, Keep):
        return (1, point(rule), None, 0, 0, 0, 0)
    if isinstance(rule, Band):
        return (2, point(rule.wide), point(rule.top), 0, 0, 0, 0)
    if isinstance(rule, Draw):
        return (3, point(rule.point), None, rule.threshold, 0, 0, 0)
    if isinstance(rule, Marked):
        return (4, None, None, 0, address(extras.marks[model]), 0, 0)
    assert extras.masks is not None
    thresholds = extras.thresholds if getattr(rule, "divide", False) else None
    return (
        5,
        None,
        None,
        0,
        0,
        address(extras.masks[model]),
        address(None if thresholds is None else thresholds[model]),
    )
