"""The launches of the CUDA backend: calls into the native module with addresses and the current stream."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from ..errors import BackendError
from ..ops.keep import RankBand, RankDraw
from ..ops.program import Program
from ..ops.sweeps import Sweep
from ..tensors import DType, Piece
from ._cuda_plan import address, on_device, point, rank_rule, slots
from ._device import Operands
from ._launches import SLOTS, Extras
from ._sweeps import points

if TYPE_CHECKING:
    import torch

__all__ = [
    "box",
    "launch_divergence",
    "launch_gram",
    "launch_mark",
    "launch_rank_masks",
    "launch_reduce",
    "launch_stream",
    "launch_sweep",
    "launching",
    "native",
    "queue_of",
]

_VOTE = {"none": 0, "weighted": 1}
_DIVISOR = {"none": 0, "value": 1, "agreeing_weights": 2, "agreeing_count": 3}
_STAGE = {"key": 1, "tie": 2}
_KEYS = ("delta", "variance", "importance", "balance", "drawn")
_MARK = {"kept": 1, "agreeing": 2, "useful": 3}


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
    with launching():
        native().sweep(
            [
                (0, 0, 0, 0, 0) if i is None else (_STAGE[i.stage], i.lo, i.hi, i.tau, i.model)
                for i in request.intervals
            ],
            request.order == "hash",
            box(piece),
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
            *queue_of(counters),
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
    common = (inputs.dtype.code, compute.code, sums.data_ptr(), *queue_of(sums))
    with launching():
        if quantities == ("squares",):
            base = address(inputs.base) if program.subtract else 0
            alone = Program(
                (1.0,) * num_models, (None,) * num_models, base=base != 0, copy=program.copy, scale=program.scale
            )
            native().block_sums(_plain(alone, base != 0), box(piece), base, models[:num_models], *common)
            return
        plan = on_device(native(), program, piece, extras, compute, sums)
        chosen = slots(quantities, num_models)
        native().reduce(plan.data_ptr(), box(piece), address(inputs.base), models, chosen, *common)


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
    where = (box(piece), address(inputs.base), [address(x) for x in inputs.models], address(out))
    dtypes = (inputs.dtype.code, out_dtype.code, compute.code)
    with launching():
        if program.features:
            plan = on_device(native(), program, piece, extras, compute, like)
            native().program(plan.data_ptr(), *where, *dtypes, address(counters), SLOTS, *queue_of(like))
        else:
            plain = _plain(program, inputs.base is not None)
            native().stream(plain, *where, *dtypes, raw, address(counters), SLOTS, *queue_of(like))


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
    with launching():
        plan = on_device(native(), program, piece, extras, compute, like)
        native().mark(
            plan.data_ptr(),
            box(piece),
            address(inputs.base),
            [address(x) for x in inputs.models],
            _MARK[kind],
            [address(x) for x in marks],
            inputs.dtype.code,
            compute.code,
            *queue_of(like),
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
    device, queue = queue_of(masks)
    base = address(inputs.base) if program.subtract else 0
    shape = (piece.g0, piece.numel // rows.length, rows.length, rows.stride)
    with launching():
        size, blocks = native().rank_room(shape[1], rows.length, compute.code, device)
        room = torch.empty(size * blocks, dtype=torch.uint8, device=masks.device) if size else None
        for m, rule in enumerate(program.keep):
            if not isinstance(rule, (RankDraw, RankBand)):
                continue
            divide = isinstance(rule, RankDraw) and rule.divide and thresholds is not None
            native().rank(
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
    with launching():
        native().gram(
            columns, models, base, rows, cols, inputs.dtype.code, compute.code, sums.data_ptr(), *queue_of(sums)
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
    with launching():
        native().divergence(*where, maxima.data_ptr(), address(totals), sums.data_ptr(), *queue_of(sums))


def native() -> Any:
    """The native module."""
    return importlib.import_module("mergekernels._cuda")


@contextmanager
def launching() -> Iterator[None]:
    """Turns the failure of a launch into an error of the package."""
    try:
        yield
    except RuntimeError as error:
        raise BackendError(str(error), code="backend.launch", hint="Ask for another backend.") from error


def box(piece: Piece) -> tuple[int, int, int, int]:
    """A piece as the native module takes it."""
    return (piece.g0, piece.rows, piece.cols, piece.ld)


def queue_of(x: torch.Tensor) -> tuple[int, int]:
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
