"""The host side that the GPU backends share: counters to statistics, second passes, temporaries.

A backend brings its launches (`Launches`); none of them waits. Everything runs on the current stream of the device
where the inputs lie. The host waits where it needs numbers: `sweep` always, `stream` where statistics are asked for,
sums always (see `_gpu_sums`); `mark` and a `stream` without statistics return before the device is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from .._native import to_torch, torch_dtype
from ..errors import ArgumentError
from ..ops.keep import Marked, RankBand, RankDraw
from ..ops.program import Program, Table
from ..ops.sweeps import NUM_BINS, Sweep
from ..tensors import CANONICAL_BLOCK, DType, Piece, TensorView
from ._device import Operands, operands
from ._launches import SLOTS, Extras, Launches
from ._sweeps import per_search

if TYPE_CHECKING:
    import torch

    from .._cpu import StreamStats, SweepStats

__all__ = ["ENTRIES", "SLOTS", "Extras", "Launches", "extras_for", "mark", "stream", "sweep"]

ENTRIES = 1 << 18
"""Most entries per model and piece that are brought to the host: beyond it, another pass over the data on the device is
faster than moving and sorting them."""

_INT64_MAX = (1 << 63) - 1


def sweep(
    launches: Launches,
    request: Sweep,
    stats: SweepStats,
    piece: Piece,
    base: TensorView | None,
    models: Sequence[TensorView | None],
    *,
    compute: DType,
    tensor: int,
    offset: int,
) -> None:
    """`Backend.sweep` by the launches of a backend.

    Entries are collected on the device as long as the statistics have room for them, at most ENTRIES; a model with more
    is counted in bins by a second pass. Which of the two happens changes no selection.
    """
    import torch

    wanted = per_search(request, models)
    if piece.numel == 0 or (base is None and all(v is None for v in wanted)):
        return
    # A key that depends on all models takes them all; otherwise each search has its tensor.
    inputs = operands(base, models if request.joint else wanted, compute)
    device = inputs.present[0].device
    num_searches = len(wanted)
    there = [s for s, v in enumerate(wanted) if v is not None]
    request = _only(request, there)
    numbers = _numbers(request, compute, device)
    room = [0] * num_searches
    for s in there:
        room[s] = 0 if stats.overflowed(s) else min(ENTRIES, stats.capacity - stats.inside(s))
    first = 3 * num_searches + 1
    counters = torch.zeros(4 * num_searches + 2, dtype=torch.int64, device=device)
    counters[first:] = _INT64_MAX
    capacity = max(1, min(piece.numel, max(room)))
    entries = torch.empty((2, num_searches, capacity), dtype=torch.int64, device=device)
    launches.launch_sweep(request, inputs, piece, compute, tensor, offset, counters, entries, None, numbers)
    found = counters.tolist()
    before, inside = found[:num_searches], found[num_searches : 2 * num_searches]
    many = [s for s in there if inside[s] > room[s]]
    for s in there:
        if s not in many:
            pairs = entries[:, s, : inside[s]].cpu()
            stats.add(s, before[s], _words(pairs[0]), _words(pairs[1]))
    if many:
        bins = torch.zeros((num_searches, NUM_BINS), dtype=torch.int64, device=device)
        rest = inputs
        if not request.joint:
            rest = replace(inputs, models=[x if s in many else None for s, x in enumerate(inputs.models)])
        request = _only(request, many)
        launches.launch_sweep(request, rest, piece, compute, tensor, offset, counters, entries, bins, numbers)
        histograms = bins.cpu()
        for s in many:
            stats.add_histogram(s, before[s], _words(histograms[s]))
    for source in range(num_searches + 1):
        bad = found[2 * num_searches + source]
        if bad:
            stats.add_nonfinite(source, found[first + source], bad)


def stream(
    launches: Launches,
    program: Program,
    piece: Piece,
    base: TensorView | None,
    models: Sequence[TensorView],
    out: TensorView | None,
    *,
    compute: DType,
    stats: StreamStats | None,
    marks: Sequence[TensorView | None] = (),
) -> None:
    """`Backend.stream` by the launches of a backend.

    `out` may be exactly one of the inputs; a strided one is written through a dense temporary.
    """
    import torch

    if piece.numel == 0 or (out is None and stats is None):
        return
    inputs = operands(base, models, compute)
    device = inputs.present[0].device
    num_models = len(program.weights)
    num_inputs = len(models)
    out_dtype = compute if out is None else out.dtype
    raw = program.copy and program.scale == 1.0 and models[0].cast in (None, out_dtype) and models[0].dtype is out_dtype
    target = None if out is None else to_torch(out)
    result = target
    if target is not None and (not target.is_contiguous() or (raw and inputs.converted)):
        result = torch.empty(target.shape, dtype=target.dtype, device=device)
    first = 2 * num_inputs + 5
    counters = sums = None
    if stats is not None:
        counters = torch.zeros((SLOTS, 3 * num_inputs + 7), dtype=torch.int64, device=device)
        counters[:, first:] = _INT64_MAX
        if stats.num_blocks:
            # Before the pass that may write in place.
            sums = torch.empty((num_models, -(-piece.numel // CANONICAL_BLOCK)), dtype=torch.float64, device=device)
            launches.launch_reduce(_untrimmed(program), ("squares",), inputs, piece, compute, sums, Extras())
    extras = extras_for(launches, program, inputs, piece, compute, marks)
    raw_bits = raw and not inputs.converted
    launches.launch_stream(program, inputs, piece, compute, result, out_dtype, counters, raw_bits, extras)
    if target is not None and result is not None and result is not target:
        # Where inputs had to be converted, the bits of a copy are still the input's own.
        target.copy_(to_torch(models[0]).reshape(target.shape) if raw else result)
    if stats is None or counters is None:
        return
    totals = counters[:, :first].sum(0).tolist()
    lowest = counters[:, first:].amin(0).tolist()
    stats.add(totals[:num_inputs], *totals[num_inputs : num_inputs + 3])
    for source, bad in enumerate(totals[num_inputs + 3 :]):
        if bad:
            stats.add_nonfinite(source, lowest[source], bad)
    if sums is not None:
        host = sums.cpu()
        for m in range(num_models):
            stats.set_blocks(m, piece.g0 // CANONICAL_BLOCK, _buffer(host[m]))


def mark(
    launches: Launches,
    program: Program,
    kind: Literal["kept", "agreeing", "useful"],
    piece: Piece,
    base: TensorView | None,
    models: Sequence[TensorView],
    marks: Sequence[TensorView],
    *,
    compute: DType,
) -> None:
    """`Backend.mark` by the launches of a backend.

    Raises
    ------
    ArgumentError : "useful" is asked of a program without that rule.
    """
    import torch

    if kind == "useful" and program.useful is None:
        raise ArgumentError(
            "kind is not usable", code="mark.kind", expected="a program with `useful`, for useful", got="none"
        )
    if piece.numel == 0:
        return
    inputs = operands(base, models, compute)
    targets = [to_torch(v) for v in marks]
    dense = [x if x.is_contiguous() else torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in targets]
    extras = extras_for(launches, program, inputs, piece, compute, ())
    launches.launch_mark(program, kind, inputs, piece, compute, [x.view(torch.uint8) for x in dense], extras)
    for target, result in zip(targets, dense, strict=True):
        if result is not target:
            target.copy_(result)


def extras_for(
    launches: Launches,
    program: Program,
    inputs: Operands,
    piece: Piece,
    compute: DType,
    marks: Sequence[TensorView | None],
) -> Extras:
    """What a program needs beside its inputs; ranks are computed here, by the backend's launch."""
    import torch

    num_models = len(program.weights)
    device = inputs.present[0].device
    packed: tuple[torch.Tensor | None, ...] = ()
    if any(isinstance(k, Marked) for k in program.keep):
        given = list(marks) + [None] * (num_models - len(marks))
        packed = tuple(
            to_torch(v).reshape(-1).contiguous() if v is not None and isinstance(k, Marked) else None
            for k, v in zip(program.keep, given, strict=True)
        )
    masks = thresholds = None
    if any(isinstance(k, (RankDraw, RankBand)) for k in program.keep):
        masks = torch.empty((num_models, piece.numel), dtype=torch.uint8, device=device)
        if any(isinstance(k, RankDraw) and k.divide for k in program.keep):
            thresholds = torch.empty((num_models, piece.numel), dtype=torch.int32, device=device)
        launches.launch_rank_masks(program, inputs, piece, compute, masks, thresholds)
    table = None if program.table is None else _values(program.table, num_models, compute, device)
    importance = None if program.importance is None else _values(program.importance, 1, compute, device)[0]
    return Extras(packed, masks, thresholds, table, importance)


def _untrimmed(program: Program) -> Program:
    """A program whose deltas are those of `program`, and that needs nothing else."""
    ones = (1.0,) * len(program.weights)
    scale = program.scale if program.copy else 1.0
    keep = (None,) * len(ones)
    return Program(ones, keep, base=program.base, subtract=program.subtract, copy=program.copy, scale=scale)


def _only(request: Sweep, searches: Sequence[int]) -> Sweep:
    return replace(request, intervals=tuple(i if s in searches else None for s, i in enumerate(request.intervals)))


def _values(table: Table, num_rows: int, compute: DType, device: torch.device) -> torch.Tensor:
    """The numbers of a table, rounded to the compute dtype once: [num_rows, segments]."""
    import torch

    return torch.tensor(table.values, dtype=torch.float64).to(torch_dtype(compute)).reshape(num_rows, -1).to(device)


def _numbers(request: Sweep, compute: DType, device: torch.device) -> torch.Tensor | None:
    import torch

    if request.key == "importance" and request.rows is not None:
        return _values(request.rows, 1, compute, device)[0]
    if request.key == "drawn":
        return torch.tensor(request.draws, dtype=torch.int64).to(device)
    if request.key == "balance":
        fields = [[b.lo, b.hi, b.spread, b.cut, b.top] for b in request.balance]
        return torch.tensor(fields, dtype=torch.float64).to(torch_dtype(compute)).to(device)
    return None


def _buffer(x: torch.Tensor) -> memoryview:
    return memoryview(x.contiguous().numpy())  # type: ignore[arg-type]


def _words(x: torch.Tensor) -> memoryview:
    return _buffer(x).cast("B").cast("Q")
