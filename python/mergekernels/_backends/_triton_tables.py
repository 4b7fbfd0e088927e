"""What the Triton kernels read besides tensors: the tables, coefficients and switches of a request."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .._native import torch_dtype
from ..ops.keep import Band, Draw, Keep, Marked, RankBand, RankDraw, Rows
from ..ops.program import Program
from ..ops.sums import QUANTITIES
from ..ops.sweeps import Sweep, bin_shift
from ..tensors import DType, Piece
from ._device import Operands, split_tau
from ._launches import Extras

if TYPE_CHECKING:
    import torch

__all__ = [
    "KEYS",
    "box_table",
    "coefficients",
    "interpreted",
    "kernels",
    "program_table",
    "quantity_slots",
    "rank_table",
    "sweep_table",
    "switches",
]

KEYS = {"delta": 0, "variance": 1, "importance": 2, "balance": 3, "drawn": 4}
_STAGE = {"key": 1, "tie": 2}
_AXIS = {"rows": 1, "columns": 2, "groups": 3}
_VOTE = {"none": 0, "weighted": 1, "plain": 2, "count": 3}
_MERGE = {"sum": 0, "max": 1, "largest": 2, "importance": 3, "balance": 4}
_DIVISOR = {"none": 0, "value": 1, "agreeing_weights": 2, "agreeing_count": 3, "kept_count": 4}


@cache
def kernels(name: str) -> ModuleType:
    """A module of kernels; Triton is imported with the first."""
    return importlib.import_module(f"mergekernels.kernels.{name}")


@cache
def interpreted() -> bool:
    """True if the kernels run under the interpreter: decided when they are imported, so asked of the kernels."""
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(kernels("stream").stream_kernel, InterpretedFunction)


def switches(program: Program, inputs: Operands) -> int:
    """The digits of `kernels._switches` for a program."""
    rules = [k for k in program.keep if k is not None]
    plain = [k for k in rules if isinstance(k, Keep)] + [k.wide for k in rules if isinstance(k, Band) and k.wide]
    plain += [k.point for k in rules if isinstance(k, Draw) and k.point]
    tops = [k.top for k in rules if isinstance(k, Band)]
    joint = [] if program.joint is None else [program.joint]
    ties = {k.ties for k in [*plain, *tops, *joint]}
    table = program.table
    return int(
        kernels("_switches").pack(
            POINTS=bool(plain),
            BANDS=bool(tops),
            DRAWS=any(isinstance(k, Draw) for k in rules),
            MASKS=any(isinstance(k, (RankDraw, RankBand)) for k in rules),
            BITS=any(isinstance(k, Marked) for k in rules),
            DIVIDES=any(isinstance(k, RankDraw) and k.divide for k in rules),
            TIES=2 if "hash" in ties else 1 if "index" in ties else 0,
            JOINT=0 if program.joint is None else 1 if program.importance is None else 2,
            FACTORS=any(f != 1.0 for f in program.factors),
            TABLE=0 if table is None else _AXIS[table.axis],
            VOTE=_VOTE[program.vote],
            ZERO_VOTE=program.zero_vote % 3,
            MERGE=_MERGE[program.merge],
            DIVISOR=_DIVISOR[program.divisor],
            FLOOR=program.divisor_floor > 0,
            ALONE=bool(program.alone),
            LIMIT=0 if program.limit is None else 2 if program.limit < 1e-6 else 1,
            USEFUL=program.useful is not None,
            SCALE=program.scale != 1.0,
            ANCHOR=program.anchor == "first",
            BASE_THERE=inputs.base is not None,
            SUBTRACT=inputs.base is not None and program.subtract,
            COPY=program.copy,
        )
    )


def coefficients(program: Program, inputs: Operands, compute: DType) -> torch.Tensor:
    """The numbers of a program, rounded to the compute dtype once; their places are those of `kernels._switches`."""
    import torch

    limit = 0.0 if program.limit is None else program.limit
    numbers = [program.divisor_value, program.scale, program.divisor_floor, limit, limit * 1e6, 1e-6, program.epsilon]
    numbers.append(0.0)
    for t, weight in enumerate(program.weights):
        own = [weight, program.factors[t] if program.factors else 1.0, program.alone[t] if program.alone else 0.0]
        own.append(program.useful.thresholds[t] if program.useful is not None else 0.0)
        if program.balance:
            rule = program.balance[t]
            own += [rule.lo, rule.hi, rule.spread, rule.cut, rule.top]
        numbers += own + [0.0] * (16 - len(own))
    return torch.tensor(numbers, dtype=torch.float64).to(torch_dtype(compute)).to(inputs.present[0].device)


def program_table(
    program: Program,
    inputs: Operands,
    piece: Piece,
    compute: DType,
    extras: Extras,
    *,
    slots: dict[int, int] | None = None,
    block: int = 1,
) -> torch.Tensor:
    """The tables of a program.

    slots : the first slot of each quantity of a reduction, by its number. block : elements per program of the body
    launch.
    """
    header = _header(inputs, piece, program.seed, program.tensor)
    if program.joint is not None:
        header[10:14] = _point(program.joint, compute)
    if program.table is not None and extras.table is not None:
        header[14:18] = [extras.table.data_ptr(), program.table.length, extras.table.shape[1], program.table.tensor]
    if program.importance is not None and extras.importance is not None:
        header[18:20] = [extras.importance.data_ptr(), program.importance.length]
    if program.useful is not None:
        header[20] = program.useful.at_least
    for quantity, slot in (slots or {}).items():
        header[21 + quantity] = slot
    rows = []
    for k, x in enumerate(inputs.models):
        assert x is not None
        rule = program.keep[k] if k < len(program.keep) else None
        rows.append([x.data_ptr(), *_rule(rule, k, compute, extras)])
    return _tables(header, rows, piece.numel // block * block, inputs)


def _rule(rule: Any, t: int, compute: DType, extras: Extras) -> list[int]:
    """The numbers of a rule: the point, the top point, kind, threshold, address of mask, address of thresholds."""
    point, top = [-1, 0, 0, 0], [(1 << (63 if compute.name == "F64" else 31)) - 1, 0, 0, 0]
    kind = threshold = mask = thresholds = 0
    if isinstance(rule, Keep):
        point = _point(rule, compute)
    elif isinstance(rule, Band):
        point = point if rule.wide is None else _point(rule.wide, compute)
        top = _point(rule.top, compute)
    elif isinstance(rule, Draw):
        kind, threshold = 1, rule.threshold
        point = point if rule.point is None else _point(rule.point, compute)
    elif isinstance(rule, (RankDraw, RankBand)):
        assert extras.masks is not None
        kind, mask = 2, extras.masks[t].data_ptr()
        if isinstance(rule, RankDraw) and rule.divide and extras.thresholds is not None:
            thresholds = extras.thresholds[t].data_ptr()
    elif isinstance(rule, Marked):
        marks = extras.marks[t]
        assert marks is not None
        kind, mask = 3, marks.data_ptr()
    return [*point, *top, kind, threshold, mask, thresholds]


def _point(keep: Keep, compute: DType) -> list[int]:
    return [*split_tau(keep.tau, keep.ties, compute), keep.word, keep.index]


def sweep_table(
    request: Sweep,
    inputs: Operands,
    piece: Piece,
    tensor: int,
    offset: int,
    capacity: int,
    numbers: torch.Tensor | None,
    block: int,
) -> torch.Tensor:
    """The tables of a counting pass: a row per search or model, whichever are more."""
    header = _header(inputs, piece, request.seed, tensor)
    header[7], header[9] = offset, capacity
    if request.rows is not None and numbers is not None:
        header[18:20] = [numbers.data_ptr(), request.rows.length]
    rows = [[0] * 7 for _ in range(max(len(request.intervals), len(inputs.models)))]
    for row, x in zip(rows, inputs.models, strict=False):
        row[0] = 0 if x is None else x.data_ptr()
    for row, i in zip(rows, request.intervals, strict=False):
        if i is not None:
            row[1:] = [_STAGE[i.stage], i.lo, i.hi, i.tau, bin_shift(i.lo, i.hi), i.model]
    return _tables(header, rows, piece.numel // block * block, inputs)


def box_table(inputs: Operands, rows: int, cols: int) -> torch.Tensor:
    """The table of sums over the rows or columns of a box."""
    header = _header(inputs, Piece.flat(0, rows * cols), 0, 0)
    header[15:17] = [rows, cols]
    return _tables(header, [[0 if x is None else x.data_ptr()] for x in inputs.models], 0, inputs)[0]


def rank_table(program: Program, inputs: Operands, piece: Piece, rows: Rows) -> torch.Tensor:
    """The table of the ranks in rows."""
    header = _header(inputs, piece, program.seed, program.tensor)
    header[15:17] = [rows.length, rows.stride]
    return _tables(header, [[0 if x is None else x.data_ptr()] for x in inputs.models], 0, inputs)[0]


def quantity_slots(quantities: tuple[str, ...], num_models: int) -> dict[int, int]:
    """The first slot of each quantity, by its number; of one that comes twice the last."""
    slots, slot = {}, 0
    for name in quantities:
        slots[QUANTITIES.index(name)] = slot
        slot += 1 if name in QUANTITIES[-2:] else num_models
    return slots


def _header(inputs: Operands, piece: Piece, seed: int, tensor: int) -> list[int]:
    base = 0 if inputs.base is None else inputs.base.data_ptr()
    # The seed is unsigned; int64 holds the same bits.
    signed = seed - (1 << 64) if seed >> 63 else seed
    header = [piece.numel, piece.g0, piece.cols, piece.ld, signed, tensor, base]
    return header + [0] * (kernels("_common").HEADER.value - len(header))


def _tables(header: list[int], rows: list[list[int]], tail: int, inputs: Operands) -> torch.Tensor:
    """The table of the body launch and that of the tail launch, which differ in where they begin: int64 [2, ...]."""
    import torch

    common = kernels("_common")
    flat = list(header)
    for row in rows:
        flat += row + [0] * (common.ROW.value - len(row))
    tables = torch.tensor([flat, flat], dtype=torch.int64)
    tables[1, common.START.value] = tail
    return tables.to(inputs.present[0].device)
