"""The Triton backend: GPU tensors, or tensors in host memory under Triton's interpreter (TRITON_INTERPRET=1).

Inputs are dense after at most one copy; see `_device.operands`. Nothing here synchronises except to read counters.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .._native import to_torch, torch_dtype
from ..ops.program import NUM_BINS, Keep, Program, Sweep, bin_shift
from ..tensors import BF16, CANONICAL_BLOCK, DType, Piece, TensorView
from ._device import Operands, guard, is_flat, no_gpu, operands, same_device, signed, split_tau

if TYPE_CHECKING:
    import torch

    from .._cpu import StreamStats, SweepStats

__all__ = ["stream", "sweep", "why_not"]

_OPS = ("select", "sweep", "stream")
_CONSENSUS = {"none": 0, "sum": 1}
_DIVISOR = {"none": 0, "value": 1, "agreeing_weights": 2, "agreeing_count": 3}
_STAGE = {"key": 1, "tie": 2}
_INT64_MAX = (1 << 63) - 1
_SLOTS = 32
"""Copies of the counters, so that programs do not queue at one address."""

# The interpreter swaps functions of the language while it runs, and compilation fills caches: one launch at a time.
_lock = threading.Lock()


def why_not(op: str, views: Sequence[TensorView]) -> str | None:
    """Why this backend cannot serve these views, None if it can."""
    if op not in _OPS:
        return f"it has no kernel for {op}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    for view in views:
        if not view.dtype.is_float:
            return f"it has no kernels for {view.dtype}"
    different = same_device(views)
    if different is not None:
        return different
    kind = views[0].device.split(":")[0] if views else ""
    if _interpreted():
        if kind not in ("", "cpu"):
            return "TRITON_INTERPRET=1 is set, and the interpreter computes in host memory"
        return None
    if kind == "cpu":
        return "it computes on a GPU, or in host memory with TRITON_INTERPRET=1 set before start"
    return no_gpu()


def sweep(
    request: Sweep,
    stats: SweepStats,
    piece: Piece,
    base: TensorView | None,
    models: Sequence[TensorView | None],
    *,
    compute: DType,
    tensor: int,
    offset: int,
    threads: int,
) -> None:
    """See ops.program.Sweep. `threads` has no effect.

    Entries are collected on the device as long as the statistics have room for them, else counted in bins by a second pass.
    """
    import torch

    wanted = [v if i is not None else None for i, v in zip(request.intervals, models, strict=True)]
    if piece.numel == 0 or (base is None and all(v is None for v in wanted)):
        return
    inputs = operands(base, wanted, compute)
    device = inputs.present[0].device
    num_models = len(wanted)
    room = [0] * num_models
    rows = []
    for m, (interval, x) in enumerate(zip(request.intervals, inputs.models, strict=True)):
        if interval is None or x is None:
            rows.append([0] * 6)
            continue
        room[m] = 0 if stats.overflowed(m) else stats.capacity - stats.inside(m)
        shift = bin_shift(interval.lo, interval.hi)
        rows.append([x.data_ptr(), _STAGE[interval.stage], interval.lo, interval.hi, interval.tau, shift])
    capacity = max(1, min(piece.numel, max(room)))
    header = _header(inputs, piece, request.seed, tensor, offset, capacity)
    width = 4 * num_models + 2
    first = width - num_models - 1
    counters = torch.zeros(width, dtype=torch.int64, device=device)
    counters[first:] = _INT64_MAX
    entries = torch.empty((2, num_models, capacity), dtype=torch.int64, device=device)
    bins = entries
    kernel = _kernels("select").select_kernel
    constants: dict[str, Any] = {
        "NUM_MODELS": num_models,
        "DTYPE": inputs.dtype.code,
        "COMPUTE": compute.code,
        "HAS_BASE": base is not None,
        "TIES": any(i is not None and i.stage == "tie" for i in request.intervals),
        "HASH": request.order == "hash",
        "FLAT": is_flat(piece),
        "ALIGNED": inputs.aligned,
    }

    def launch(collect: bool) -> None:
        tables = _tables(header, rows, piece.numel, inputs.dtype, device)
        _cover(
            kernel,
            piece.numel,
            inputs.dtype,
            device,
            lambda part: (tables[part], counters, entries[0], entries[1], bins),
            {**constants, "BINS": not collect},
        )

    launch(collect=True)
    numbers = counters.tolist()
    before, inside = numbers[:num_models], numbers[num_models : 2 * num_models]
    many = [m for m in range(num_models) if rows[m][1] and inside[m] > room[m]]
    for m in range(num_models):
        if rows[m][1] and m not in many:
            found = entries[:, m, : inside[m]].cpu()
            stats.add(m, before[m], _words(found[0]), _words(found[1]))
    if many:
        for m in range(num_models):
            if m not in many:
                rows[m][1] = 0
        bins = torch.zeros((num_models, NUM_BINS), dtype=torch.int64, device=device)
        launch(collect=False)
        histograms = bins.cpu()
        for m in many:
            stats.add_histogram(m, before[m], _words(histograms[m]))
    for source in range(num_models + 1):
        bad = numbers[2 * num_models + source]
        if bad:
            stats.add_nonfinite(source, numbers[first + source], bad)


def stream(
    program: Program,
    piece: Piece,
    base: TensorView | None,
    models: Sequence[TensorView],
    out: TensorView | None,
    *,
    compute: DType,
    stats: StreamStats | None,
    threads: int,
) -> None:
    """See ops.program.Program. `threads` has no effect.

    `out` may be exactly one of the inputs; a strided one is written through a dense temporary.
    """
    import torch

    if piece.numel == 0 or (out is None and stats is None):
        return
    inputs = operands(base, models, compute)
    device = inputs.present[0].device
    num_models = len(models)
    target = None if out is None else to_torch(out)
    result = target
    if target is not None and not target.is_contiguous():
        result = torch.empty(target.shape, dtype=target.dtype, device=device)
    rows = []
    for x, keep in zip(inputs.present[base is not None :], program.keep or (None,) * num_models, strict=True):
        rows.append([x.data_ptr(), *_point(keep, compute)])
    header = _header(inputs, piece, program.seed, program.tensor, 0, 0)
    tables = _tables(header, rows, piece.numel, inputs.dtype, device)
    numbers = [program.divisor_value, program.scale, *program.weights]
    coefficients = torch.tensor(numbers, dtype=torch_dtype(compute)).to(device)
    out_dtype = compute if out is None else out.dtype
    # bfloat16 is written as the integers that the kernel makes.
    written = tables if result is None else result.view(torch.int16) if out_dtype is BF16 else result
    width = 3 * num_models + 7
    first = width - num_models - 2
    counters = tables
    if stats is not None:
        counters = torch.zeros((_SLOTS, width), dtype=torch.int64, device=device)
        counters[:, first:] = _INT64_MAX
    shared = {
        "DTYPE": inputs.dtype.code,
        "COMPUTE": compute.code,
        "HAS_BASE": base is not None,
        "COPY": program.copy,
        "SCALE": program.scale != 1.0,
        "ALIGNED": inputs.aligned,
    }
    sums = None
    kernels = _kernels("stream")
    if stats is not None and stats.num_blocks:
        blocks = -(-piece.numel // CANONICAL_BLOCK)
        sums = torch.empty((num_models, blocks), dtype=torch.float64, device=device)
        grid = (-(-blocks // kernels.NORM_BLOCKS), num_models)
        _run(kernels.block_sums_kernel, grid, device, (tables[0], coefficients, sums), shared | {"BLOCKS": kernels.NORM_BLOCKS})
    ties = {k.ties for k in program.keep if k is not None}
    constants = shared | {
        "NUM_MODELS": num_models,
        "OUT": out_dtype.code,
        "HAS_OUT": out is not None,
        "TRIM": any(k is not None for k in program.keep),
        "TIES": 2 if "hash" in ties else 1 if "index" in ties else 0,
        "CONSENSUS": _CONSENSUS[program.consensus],
        "ZERO_VOTE": program.zero_vote,
        "DIVISOR": _DIVISOR[program.divisor],
        "STATS": stats is not None,
        "SLOTS": _SLOTS,
        "FLAT": is_flat(piece),
        "UNROLL": num_models if num_models <= 4 else 2,
    }
    _cover(
        kernels.stream_kernel,
        piece.numel,
        inputs.dtype,
        device,
        lambda part: (tables[part], coefficients, written, counters),
        constants,
    )
    if target is not None and result is not None and result is not target:
        target.copy_(result)
    if stats is None:
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
            stats.set_blocks(m, piece.g0 // CANONICAL_BLOCK, memoryview(host[m].numpy()))


@cache
def _kernels(name: str) -> ModuleType:
    return importlib.import_module(f"mergekernels.kernels.{name}")


@cache
def _interpreted() -> bool:
    """True if the kernels run under the interpreter: decided when they are imported, so asked of the kernels."""
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(_kernels("stream").stream_kernel, InterpretedFunction)


def _point(keep: Keep | None, compute: DType) -> list[int]:
    if keep is None:
        return [-1, 0, 0, 0]
    return [*split_tau(keep.tau, keep.ties, compute), keep.word, keep.index]


def _header(inputs: Operands, piece: Piece, seed: int, tensor: int, offset: int, capacity: int) -> list[int]:
    base = 0 if inputs.base is None else inputs.base.data_ptr()
    return [piece.numel, piece.g0, piece.cols, piece.ld, signed(seed), tensor, base, offset, 0, capacity]


def _tables(
    header: list[int], rows: list[list[int]], n: int, dtype: DType, device: torch.device
) -> torch.Tensor:
    """The table of the body launch and that of the tail launch, which differ in where they begin: int64 [2, ...]."""
    import torch

    from mergekernels.kernels import _common as common

    block = common.block_size(dtype.itemsize, _interpreted())
    head, row, start = common.HEADER.value, common.ROW.value, common.START.value
    flat = header + [0] * (head - len(header))
    for r in rows:
        flat += r + [0] * (row - len(r))
    tables = torch.tensor([flat, flat], dtype=torch.int64)
    tables[1, start] = n // block * block
    return tables.to(device)


def _cover(
    kernel: Any,
    n: int,
    dtype: DType,
    device: torch.device,
    arguments: Callable[[int], tuple[Any, ...]],
    constants: dict[str, Any],
) -> None:
    """Launches a kernel over n elements: whole blocks without masks, so that loads are wide, then the rest."""
    from mergekernels.kernels._common import block_size

    block = block_size(dtype.itemsize, _interpreted())
    if n >= block:
        _run(kernel, (n // block,), device, arguments(0), constants | {"MASKED": False, "BLOCK": block})
    if n % block:
        _run(kernel, (1,), device, arguments(1), constants | {"MASKED": True, "BLOCK": block})


def _run(
    kernel: Any, grid: tuple[int, ...], device: torch.device, arguments: tuple[Any, ...], constants: dict[str, Any]
) -> None:
    from mergekernels.kernels._common import LAUNCH_OPTIONS

    with _lock, guard(arguments[0]), _quiet():
        kernel[grid](*arguments, **constants, **LAUNCH_OPTIONS)


def _quiet() -> AbstractContextManager[object]:
    """The interpreter computes with numpy, which warns where IEEE arithmetic is silent."""
    if not _interpreted():
        return nullcontext()
    import numpy

    return numpy.errstate(all="ignore")


def _words(x: torch.Tensor) -> memoryview:
    return memoryview(x.contiguous().numpy()).cast("B").cast("Q")
