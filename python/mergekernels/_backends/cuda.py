"""The CUDA C++ backend, for tensors on NVIDIA GPUs: calls into the native module with addresses and the current stream.

Inputs are dense after at most one copy; see `_device.operands`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from ..errors import BackendError
from ..ops.keep import RankBand, RankDraw
from ..ops.program import Program
from ..ops.sums import Gram, Reduce
from ..ops.sweeps import Sweep
from ..tensors import DType, Piece, TensorView
from . import _gpu, _gpu_sums
from ._cuda_plan import address, on_device, point, rank_rule, slots
from ._device import Operands, no_gpu, same_device
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
    "launch_divergence",
    "launch_gram",
    "launch_mark",
    "launch_rank_masks",
    "launch_reduce",
    "launch_stream",
    "launch_sweep",
    "mark",
    "reduce",
    "stream",
    "sweep",
    "why_not",
]

_OPS = ("select", "sweep", "stream", "mark", "gram", "reduce", "divergence")
_VOTE = {"none": 0, "weighted": 1}
_DIVISOR = {"none": 0, "value": 1, "agreeing_weights": 2, "agreeing_count": 3}
_STAGE = {"key": 1, "tie": 2}
_KEYS = ("delta", "variance", "importance", "balance")
_MARK = {"kept": 1, "agreeing": 2, "useful": 3}

FEATURES: frozenset[str] = frozenset(
    "alone anchor balance band divergence divisor draw factors gram groups importance importance_key joint key:balance "
    "key:importance key:variance limit mark marked merge rank reduce subtract table useful vote".split()
)
"""See dispatch.Backend."""


def why_not(op: str, views: Sequence[TensorView]) -> str | None:
    """Why this backend cannot serve these views, None if it can."""
    if op not in _OPS:
        return f"it has no kernel for {op}"
    if importlib.util.find_spec("mergekernels._cuda") is None:
        return "the native module _cuda is not built (it needs nvcc when the package is built)"
    for view in views:
        if not view.dtype.is_float:
            return f"it has no kernels for {view.dtype}"
    different = same_device(views)
    if different is not None:
        return different
    for view in views:
        if not view.device.startswith("cuda"):
            return f"it computes on an NVIDIA GPU, and a tensor is on {view.device}"
    return _no_nvidia_gpu()


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
    models = [address(x) for x in inputs.models]
    if not request.joint:
        models = [0 if i is None else x for i, x in zip(request.intervals, models, strict=True)]
    with _launching():
        _native().sweep(
            [
                (0, 0, 0, 0, 0) if i is None else (_STAGE[i.stage], i.lo, i.hi, i.tau, i.model)
                for i in request.intervals
            ],
            request.order == "hash",
            _box(piece),
            address(inputs.base),
            models,
            inputs.dtype.code,
            compute.code,
            request.seed,
            tensor,
            offset,
            entries.shape[2],
            _KEYS.index(request.key),
            address(numbers),
            1 if request.rows is None else request.rows.length,
            counters.data_ptr(),
            entries[0].data_ptr(),
            entries[1].data_ptr(),
            address(bins),
            *_queue(counters),
        )


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
    num_models = len(program.weights)
    models = [address(x) for x in inputs.models]
    common = (inputs.dtype.code, compute.code, sums.data_ptr(), *_queue(sums))
    with _launching():
        if quantities == ("squares",):
            base = address(inputs.base) if program.subtract else 0
            alone = Program(
                (1.0,) * num_models, (None,) * num_models, base=base != 0, copy=program.copy, scale=program.scale
            )
            _native().block_sums(_plain(alone, base != 0), _box(piece), base, models[:num_models], *common)
            return
        plan = on_device(_native(), program, piece, extras, compute, sums)
        chosen = slots(quantities, num_models)
        _native().reduce(plan.data_ptr(), _box(piece), address(inputs.base), models, chosen, *common)


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
    like = inputs.present[0]
    where = (_box(piece), address(inputs.base), [address(x) for x in inputs.models], address(out))
    dtypes = (inputs.dtype.code, out_dtype.code, compute.code)
    with _launching():
        if program.features:
            plan = on_device(_native(), program, piece, extras, compute, like)
            _native().program(plan.data_ptr(), *where, *dtypes, address(counters), SLOTS, *_queue(like))
        else:
            plain = _plain(program, inputs.base is not None)
            _native().stream(plain, *where, *dtypes, raw, address(counters), SLOTS, *_queue(like))


def launch_mark(
    program: Program,
    kind: Literal["kept", "agreeing", "useful"],
    inputs: Operands,
    piece: Piece,
    compute: DType,
    marks: Sequence[torch.Tensor],
    extras: Extras,
) -> None:
    """See _launches.Launches."""
    like = inputs.present[0]
    with _launching():
        plan = on_device(_native(), program, piece, extras, compute, like)
        _native().mark(
            plan.data_ptr(),
            _box(piece),
            address(inputs.base),
            [address(x) for x in inputs.models],
            _MARK[kind],
            [address(x) for x in marks],
            inputs.dtype.code,
            compute.code,
            *_queue(like),
        )


def launch_rank_masks(
    program: Program,
    inputs: Operands,
    piece: Piece,
    compute: DType,
    masks: torch.Tensor,
    thresholds: torch.Tensor | None,
) -> None:
    """See _launches.Launches."""
    import torch

    rows = program.rows
    assert rows is not None
    device, queue = _queue(masks)
    base = address(inputs.base) if program.subtract else 0
    shape = (piece.g0, piece.numel // rows.length, rows.length, rows.stride)
    with _launching():
        size, blocks = _native().rank_room(shape[1], rows.length, compute.code, device)
        room = torch.empty(size * blocks, dtype=torch.uint8, device=masks.device) if size else None
        for m, rule in enumerate(program.keep):
            if not isinstance(rule, (RankDraw, RankBand)):
                continue
            divide = isinstance(rule, RankDraw) and rule.divide and thresholds is not None
            _native().rank(
                rank_rule(rule),
                *shape,
                base,
                address(inputs.models[m]),
                inputs.dtype.code,
                compute.code,
                program.seed,
                program.tensor,
                m,
                address(masks[m]),
                address(thresholds[m]) if divide and thresholds is not None else 0,
                address(room),
                size,
                blocks,
                device,
                queue,
            )


def launch_gram(
    subtract: bool,
    columns: bool,
    inputs: Operands,
    rows: int,
    cols: int,
    compute: DType,
    sums: torch.Tensor,
) -> None:
    """See _launches.Launches."""
    base = address(inputs.base) if subtract else 0
    models = [address(x) for x in inputs.models]
    with _launching():
        _native().gram(
            columns, models, base, rows, cols, inputs.dtype.code, compute.code, sums.data_ptr(), *_queue(sums)
        )


def launch_divergence(
    inputs: Operands,
    rows: int,
    cols: int,
    compute: DType,
    maxima: torch.Tensor,
    totals: torch.Tensor | None,
    sums: torch.Tensor,
) -> None:
    """See _launches.Launches."""
    where = (address(inputs.models[0]), address(inputs.base), rows, cols, inputs.dtype.code, compute.code)
    with _launching():
        _native().divergence(*where, maxima.data_ptr(), address(totals), sums.data_ptr(), *_queue(sums))


def _native() -> Any:
    return importlib.import_module("mergekernels._cuda")


def _no_nvidia_gpu() -> str | None:
    import torch

    if torch.version.hip is not None:
        return "it is for NVIDIA GPUs, and this torch is built for ROCm"
    reason = no_gpu()
    if reason is not None:
        return reason
    count, why = _native().devices()
    return None if count else f"the CUDA runtime of the module finds no device: {why}"


@contextmanager
def _launching() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise BackendError(str(error), code="backend.launch", hint="Ask for another backend.") from error


def _box(piece: Piece) -> tuple[int, int, int, int]:
    return (piece.g0, piece.rows, piece.cols, piece.ld)


def _queue(x: torch.Tensor) -> tuple[int, int]:
    """Device number, and torch's current stream there, so that the order with torch's own work is kept."""
    import torch

    return (x.get_device(), torch.cuda.current_stream(x.device).cuda_stream)


def _plain(program: Program, base: bool) -> tuple[Any, ...]:
    """A program without features, as the plain kernels take it by value."""
    return (
        list(program.weights),
        [point(k) for k in points(program)],
        base,
        _VOTE[program.vote],
        program.zero_vote,
        _DIVISOR[program.divisor],
        program.divisor_value,
        program.scale,
        program.copy,
        program.seed,
        program.tensor,
    )
