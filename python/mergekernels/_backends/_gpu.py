"""The host side that the GPU backends share: counters to statistics, second passes, temporaries.

A backend brings three launches (`Launches`); none of them waits. What is read back are counters and collected entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from .._native import to_torch
from ..ops.program import Program
from ..ops.sweeps import NUM_BINS, Sweep
from ..tensors import CANONICAL_BLOCK, DType, Piece, TensorView
from ._device import Operands, operands
from ._sweeps import per_search

if TYPE_CHECKING:
    import torch

    from .._cpu import StreamStats, SweepStats

__all__ = ["ENTRIES", "SLOTS", "Launches", "stream", "sweep"]

SLOTS = 32
"""Copies of the counters of `stream`, so that blocks do not queue at one address."""

ENTRIES = 1 << 18
"""Most entries per model and piece that are brought to the host: beyond it, another pass over the data on the device is
faster than moving and sorting them."""

_INT64_MAX = (1 << 63) - 1


class Launches(Protocol):
    """The kernels of a backend. Tensors are dense and on one device; counters are initialised by the caller."""

    def launch_sweep(
        self,
        request: Sweep,
        inputs: Operands,
        piece: Piece,
        compute: DType,
        tensor: int,
        offset: int,
        counters: torch.Tensor,
        entries: torch.Tensor,
        bins: torch.Tensor | None,
    ) -> None:
        """One counting pass over the models whose input and interval are there.

        counters : int64 [4 K + 2]: elements ahead; inside; non-finite values per model and base; their first indices.
        entries : int64 [2, K, capacity]: ordinals and scope indices, those beyond the capacity are only counted.
        bins : int64 [K, NUM_BINS]; if given, only these are filled.
        """
        ...

    def launch_block_sums(
        self, program: Program, inputs: Operands, piece: Piece, compute: DType, sums: torch.Tensor
    ) -> None:
        """Sums of squares over canonical blocks: float64 [K, blocks]."""
        ...

    def launch_stream(
        self,
        program: Program,
        inputs: Operands,
        piece: Piece,
        compute: DType,
        out: torch.Tensor | None,
        out_dtype: DType,
        counters: torch.Tensor | None,
        raw: bool,
    ) -> None:
        """The fused pass.

        counters : int64 [SLOTS, 3 K + 7]: kept per model; conflicts, positive, negative; non-finite values per model,
        base and result; their first indices. raw : a copy keeps the bits.
        """
        ...


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
    inputs = operands(base, wanted, compute)
    device = inputs.present[0].device
    num_models = len(wanted)
    there = [m for m, v in enumerate(wanted) if v is not None]
    room = [0] * num_models
    for m in there:
        room[m] = 0 if stats.overflowed(m) else min(ENTRIES, stats.capacity - stats.inside(m))
    first = 3 * num_models + 1
    counters = torch.zeros(4 * num_models + 2, dtype=torch.int64, device=device)
    counters[first:] = _INT64_MAX
    capacity = max(1, min(piece.numel, max(room)))
    entries = torch.empty((2, num_models, capacity), dtype=torch.int64, device=device)
    launches.launch_sweep(request, inputs, piece, compute, tensor, offset, counters, entries, None)
    numbers = counters.tolist()
    before, inside = numbers[:num_models], numbers[num_models : 2 * num_models]
    many = [m for m in there if inside[m] > room[m]]
    for m in there:
        if m not in many:
            found = entries[:, m, : inside[m]].cpu()
            stats.add(m, before[m], _words(found[0]), _words(found[1]))
    if many:
        bins = torch.zeros((num_models, NUM_BINS), dtype=torch.int64, device=device)
        rest = Operands(
            inputs.dtype, inputs.base, [x if m in many else None for m, x in enumerate(inputs.models)], inputs.converted
        )
        launches.launch_sweep(request, rest, piece, compute, tensor, offset, counters, entries, bins)
        histograms = bins.cpu()
        for m in many:
            stats.add_histogram(m, before[m], _words(histograms[m]))
    for source in range(num_models + 1):
        bad = numbers[2 * num_models + source]
        if bad:
            stats.add_nonfinite(source, numbers[first + source], bad)


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
) -> None:
    """`Backend.stream` by the launches of a backend.

    `out` may be exactly one of the inputs; a strided one is written through a dense temporary.
    """
    import torch

    if piece.numel == 0 or (out is None and stats is None):
        return
    inputs = operands(base, models, compute)
    device = inputs.present[0].device
    num_models = len(models)
    out_dtype = compute if out is None else out.dtype
    raw = program.copy and program.scale == 1.0 and models[0].cast in (None, out_dtype) and models[0].dtype is out_dtype
    target = None if out is None else to_torch(out)
    result = target
    if target is not None and (not target.is_contiguous() or (raw and inputs.converted)):
        result = torch.empty(target.shape, dtype=target.dtype, device=device)
    first = 2 * num_models + 5
    counters = sums = None
    if stats is not None:
        counters = torch.zeros((SLOTS, 3 * num_models + 7), dtype=torch.int64, device=device)
        counters[:, first:] = _INT64_MAX
        if stats.num_blocks:
            # Before the pass that may write in place.
            sums = torch.empty((num_models, -(-piece.numel // CANONICAL_BLOCK)), dtype=torch.float64, device=device)
            launches.launch_block_sums(program, inputs, piece, compute, sums)
    launches.launch_stream(program, inputs, piece, compute, result, out_dtype, counters, raw and not inputs.converted)
    if target is not None and result is not None and result is not target:
        # Where inputs had to be converted, the bits of a copy are still the input's own.
        target.copy_(to_torch(models[0]).reshape(target.shape) if raw else result)
    if stats is None or counters is None:
        return
    totals = counters[:, :first].sum(0).tolist()
    lowest = counters[:, first:].amin(0).tolist()
    stats.add(totals[:num_models], *totals[num_models : num_models + 3])
    for source, bad in enumerate(totals[num_models + 3 :]):
        if bad:
            stats.add_nonfinite(source, lowest[source], bad)
    if sums is not None:
        host = sums.cpu()
        for m in range(num_models):
            stats.set_blocks(m, piece.g0 // CANONICAL_BLOCK, _buffer(host[m]))


def _buffer(x: torch.Tensor) -> memoryview:
    return memoryview(x.contiguous().numpy())  # type: ignore[arg-type]


def _words(x: torch.Tensor) -> memoryview:
    return _buffer(x).cast("B").cast("Q")
