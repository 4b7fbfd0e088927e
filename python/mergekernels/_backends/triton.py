"""The Triton backend: GPU tensors, or tensors in host memory under Triton's interpreter (TRITON_INTERPRET=1).

Inputs are dense after at most one copy; see `_device.operands`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from .._native import torch_dtype
from ..ops.program import Program
from ..ops.sums import Gram, Reduce
from ..ops.sweeps import Sweep, bin_shift
from ..tensors import BF16, DType, Piece, TensorView
from . import _gpu, _gpu_sums
from ._device import Operands, guard, is_flat, no_gpu, same_device, split_tau
from ._launches import SLOTS, Extras
from ._sweeps import points

if TYPE_CHECKING:
    from array import array

    import torch

    from .._cpu import BlockSums, StreamStats, SweepStats

__all__ = [
    "FEATURES",
    "divergence",
    "gram",
    "launch_reduce",
    "launch_stream",
    "launch_sweep",
    "mark",
    "reduce",
    "stream",
    "sweep",
    "why_not",
]

_OPS = ("select", "sweep", "stream")
_VOTE = {"none": 0, "weighted": 1}
_DIVISOR = {"none": 0, "value": 1, "agreeing_weights": 2, "agreeing_count": 3}
_STAGE = {"key": 1, "tie": 2}

# The interpreter swaps functions of the language while it runs, and compilation fills caches: one launch at a time.
_lock = threading.Lock()

FEATURES: frozenset[str] = frozenset()
"""See dispatch.Backend."""


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
    reason = no_gpu()
    return None if reason is None else f"{reason}; with TRITON_INTERPRET=1 set before start it computes in host memory"


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
    """See ops.program.Sweep. `threads` has no effect."""
    _gpu.sweep(
        sys.modules[__name__], request, stats, piece, base, models, compute=compute, tensor=tensor, offset=offset
    )


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
    marks: Sequence[TensorView | None] = (),
) -> None:
    """See dispatch.Backend. `threads` has no effect."""
    _gpu.stream(sys.modules[__name__], program, piece, base, models, out, compute=compute, stats=stats, marks=marks)


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
    """See dispatch.Backend. `threads` has no effect."""
    _gpu.mark(sys.modules[__name__], program, kind, piece, base, models, marks, compute=compute)


def gram(
    request: Gram,
    sums: BlockSums,
    piece: Piece,
    base: TensorView | None,
    models: Sequence[TensorView],
    *,
    compute: DType,
    threads: int,
) -> None:
    """See ops.sums.Gram. `threads` has no effect."""
    _gpu_sums.gram(sys.modules[__name__], request, sums, piece, base, models, compute=compute)


def reduce(
    program: Program,
    request: Reduce,
    sums: BlockSums,
    piece: Piece,
    base: TensorView | None,
    models: Sequence[TensorView],
    *,
    compute: DType,
    threads: int,
) -> None:
    """See ops.sums.Reduce. `threads` has no effect."""
    _gpu_sums.reduce(sys.modules[__name__], program, request, sums, piece, base, models, compute=compute)


def divergence(
    row_length: int,
    piece: Piece,
    base: TensorView,
    model: TensorView,
    *,
    compute: DType,
    threads: int,
) -> array[float]:
    """See dispatch.Backend. `threads` has no effect."""
    return _gpu_sums.divergence(sys.modules[__name__], row_length, piece, base, model, compute=compute)


def launch_sweep(
    request: Sweep,
    inputs: Operands,
    piece: Piece,
    compute: DType,
    tensor: int,
    offset: int,
    counters: torch.Tensor,
    entries: torch.Tensor,
    bins: torch.Tensor | None,
    numbers: torch.Tensor | None,
) -> None:
    """See _launches.Launches."""
    rows = []
    for interval, x in zip(request.intervals, inputs.models, strict=True):
        if interval is None or x is None:
            rows.append([0] * 6)
            continue
        shift = bin_shift(interval.lo, interval.hi)
        rows.append([x.data_ptr(), _STAGE[interval.stage], interval.lo, interval.hi, interval.tau, shift])
    tables = _tables(_header(inputs, piece, request.seed, tensor, offset, entries.shape[2]), rows, piece.numel, inputs)
    constants = {
        "NUM_MODELS": len(rows),
        "DTYPE": inputs.dtype.code,
        "COMPUTE": compute.code,
        "HAS_BASE": inputs.base is not None,
        "TIES": any(row[1] == _STAGE["tie"] for row in rows),
        "HASH": request.order == "hash",
        "BINS": bins is not None,
        "FLAT": is_flat(piece),
        "QUADS": is_flat(piece) and piece.g0 % 4 == 0,
        "ALIGNED": inputs.aligned,
    }
    arguments = (counters, entries[0], entries[1], entries if bins is None else bins)
    _cover(_kernels("select").select_kernel, piece.numel, inputs.dtype, tables, arguments, constants)


def launch_reduce(
    program: Program,
    quantities: tuple[str, ...],
    inputs: Operands,
    piece: Piece,
    compute: DType,
    sums: torch.Tensor,
    extras: Extras,
) -> None:
    """See _launches.Launches."""
    kernels = _kernels("stream")
    tables = _stream_tables(program, inputs, piece, compute)
    constants = {**_shared(program, inputs, compute), "BLOCKS": kernels.NORM_BLOCKS}
    grid = (-(-sums.shape[1] // kernels.NORM_BLOCKS), sums.shape[0])
    _run(kernels.block_sums_kernel, grid, (tables[0], _coefficients(program, inputs, compute), sums), constants)


def launch_stream(
    program: Program,
    inputs: Operands,
    piece: Piece,
    compute: DType,
    out: torch.Tensor | None,
    out_dtype: DType,
    counters: torch.Tensor | None,
    raw: bool,
    extras: Extras,
) -> None:
    """See _launches.Launches."""
    import torch

    num_models = len(inputs.models)
    tables = _stream_tables(program, inputs, piece, compute)
    ties = {k.ties for k in points(program) if k is not None}
    constants = {
        **_shared(program, inputs, compute),
        "NUM_MODELS": num_models,
        "OUT": out_dtype.code,
        "HAS_OUT": out is not None,
        "TRIM": any(k is not None for k in program.keep),
        "TIES": 2 if "hash" in ties else 1 if "index" in ties else 0,
        "CONSENSUS": _VOTE[program.vote],
        "ZERO_VOTE": program.zero_vote,
        "DIVISOR": _DIVISOR[program.divisor],
        "RAW": raw,
        "STATS": counters is not None,
        "SLOTS": SLOTS,
        "FLAT": is_flat(piece),
        "QUADS": is_flat(piece) and piece.g0 % 4 == 0,
        # A few models are loaded at once; more would only cost registers.
        "UNROLL": num_models if num_models <= 4 else 1,
    }
    # bfloat16 is written as the integers that the kernel makes.
    written = tables if out is None else out.view(torch.int16) if out_dtype is BF16 else out
    arguments = (_coefficients(program, inputs, compute), written, tables if counters is None else counters)
    _cover(_kernels("stream").stream_kernel, piece.numel, inputs.dtype, tables, arguments, constants)


@cache
def _kernels(name: str) -> ModuleType:
    return importlib.import_module(f"mergekernels.kernels.{name}")


@cache
def _interpreted() -> bool:
    """True if the kernels run under the interpreter: decided when they are imported, so asked of the kernels."""
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(_kernels("stream").stream_kernel, InterpretedFunction)


def _shared(program: Program, inputs: Operands, compute: DType) -> dict[str, Any]:
    return {
        "DTYPE": inputs.dtype.code,
        "COMPUTE": compute.code,
        "HAS_BASE": inputs.base is not None,
        "COPY": program.copy,
        "SCALE": program.scale != 1.0,
        "ALIGNED": inputs.aligned,
    }


def _coefficients(program: Program, inputs: Operands, compute: DType) -> torch.Tensor:
    import torch

    numbers = [program.divisor_value, program.scale, *program.weights]
    return torch.tensor(numbers, dtype=torch_dtype(compute)).to(inputs.present[0].device)


def _stream_tables(program: Program, inputs: Operands, piece: Piece, compute: DType) -> torch.Tensor:
    rows = []
    for x, keep in zip(inputs.models, points(program) or [None] * len(inputs.models), strict=True):
        assert x is not None
        point = [-1, 0, 0, 0]
        if keep is not None:
            point = [*split_tau(keep.tau, keep.ties, compute), keep.word, keep.index]
        rows.append([x.data_ptr(), *point])
    return _tables(_header(inputs, piece, program.seed, program.tensor, 0, 0), rows, piece.numel, inputs)


def _header(inputs: Operands, piece: Piece, seed: int, tensor: int, offset: int, capacity: int) -> list[int]:
    base = 0 if inputs.base is None else inputs.base.data_ptr()
    # The seed is unsigned; int64 holds the same bits.
    signed = seed - (1 << 64) if seed >> 63 else seed
    return [piece.numel, piece.g0, piece.cols, piece.ld, signed, tensor, base, offset, 0, capacity]


def _tables(header: list[int], rows: list[list[int]], n: int, inputs: Operands) -> torch.Tensor:
    """The table of the body launch and that of the tail launch, which differ in where they begin: int64 [2, ...]."""
    import torch

    common = _kernels("_common")
    block = common.block_size(inputs.dtype.itemsize, _interpreted())
    flat = header + [0] * (common.HEADER.value - len(header))
    for row in rows:
        flat += row + [0] * (common.ROW.value - len(row))
    tables = torch.tensor([flat, flat], dtype=torch.int64)
    tables[1, common.START.value] = n // block * block
    return tables.to(inputs.present[0].device)


def _cover(
    kernel: Any, n: int, dtype: DType, tables: torch.Tensor, arguments: tuple[Any, ...], constants: dict[str, Any]
) -> None:
    """Launches a kernel over n elements: whole blocks without masks, so that loads are wide, then the rest."""
    block = _kernels("_common").block_size(dtype.itemsize, _interpreted())
    if n >= block:
        _run(kernel, (n // block,), (tables[0], *arguments), constants | {"MASKED": False, "BLOCK": block})
    if n % block:
        _run(kernel, (1,), (tables[1], *arguments), constants | {"MASKED": True, "BLOCK": block})


def _run(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
    with _lock, guard(arguments[0]), _quiet():
        kernel[grid](*arguments, **constants, **_kernels("_common").LAUNCH_OPTIONS)


def _quiet() -> AbstractContextManager[object]:
    """The interpreter computes with numpy, which warns where IEEE arithmetic is silent."""
    if not _interpreted():
        return nullcontext()
    import numpy

    return numpy.errstate(all="ignore")
