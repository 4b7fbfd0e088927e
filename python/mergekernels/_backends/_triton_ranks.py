"""Row ranks by Triton: the launches of `kernels.rank`."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from ..ops.keep import RankBand, RankDraw
from ..ops.program import Program
from ..tensors import F64, DType, Piece
from ._device import Operands, guard
from ._triton_tables import interpreted, kernels, rank_table

if TYPE_CHECKING:
    import torch

__all__ = ["launch_rank_masks", "run"]

# The interpreter swaps functions of the language while it runs, and compilation fills caches: one launch at a time.
_lock = threading.Lock()


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

    module = kernels("rank")
    rows = program.rows
    assert rows is not None
    common = kernels("_common")
    table = rank_table(program, inputs, piece, rows)
    tile = common.block_size(2, interpreted())
    # A chunk holds a row if the row is short; several short rows share a program.
    chunk = max(4, min(2 * tile, 1 << (rows.length - 1).bit_length()))
    chunks = -(-rows.length // chunk)
    width = max(1, 2 * tile // chunk)
    slab_rows, num_rows = rows.stride, piece.numel // rows.length
    # As many slabs as keep the numbers between the kernels in the cache.
    group = max(1, (1 << 21) // (slab_rows * chunks * chunk)) * slab_rows
    jobs = [(t, rule) for t, rule in enumerate(program.keep) if isinstance(rule, (RankDraw, RankBand))]
    starts = range(0, num_rows, group)
    plan = torch.tensor(
        [[t, first, min(group, num_rows - first), *_rank_rule(rule), 0] for t, rule in jobs for first in starts],
        dtype=torch.int64,
    ).to(masks.device)
    most = min(group, num_rows)
    places = torch.empty((2, most * rows.length), dtype=torch.int32, device=masks.device)
    ordered = torch.empty(-(-most // width) * width * chunks * chunk, dtype=torch.int64, device=masks.device)
    shared = {
        "HAS_BASE": inputs.base is not None and program.subtract,
        "DTYPE": inputs.dtype.code,
        "COMPUTE": compute.code,
        "ALIGNED": inputs.aligned,
        "CHUNK": chunk,
        "STEPS": chunk.bit_length() - 1,
    }
    quads = piece.g0 % 4 == 0 and rows.length % 4 == 0
    for job, (t, rule) in enumerate(jobs):
        divide = isinstance(rule, RankDraw) and rule.divide
        for part, first in enumerate(starts):
            count = min(group, num_rows - first)
            own = plan[job * len(starts) + part]
            old, new = places
            flags = torch.zeros((3, count), dtype=torch.int32, device=masks.device)
            for stage in range(0 if compute is F64 else 1, 3):
                constants = {**shared, "STAGE": stage}
                sort = {**constants, "QUADS": quads and rows.stride == 1, "ROWS": width}
                before = (old, flags[stage - 1], ordered)
                grid = (-(-count // width) * chunks,)
                run(module.sort_kernel, grid, (table, own, *before), sort)
                search = {**constants, "DIVIDE": divide, "QUADS": quads, "BLOCK": tile}
                results = (new, flags[stage], masks[t], masks if thresholds is None else thresholds[t])
                grid = (-(-count * rows.length // tile),)
                run(module.search_kernel, grid, (table, own, *before, *results), search)
                old, new = new, old


def _rank_rule(rule: RankDraw | RankBand) -> list[int]:
    if isinstance(rule, RankBand):
        return [1, rule.first, rule.last, 0]
    return [0, rule.low, rule.span, rule.single]


def run(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
    """Launches a kernel on the device of its first argument and the current stream there."""
    with _lock, guard(arguments[0]), _quiet():
        kernel[grid](*arguments, **constants, **kernels("_common").LAUNCH_OPTIONS)


def _quiet() -> AbstractContextManager[object]:
    """The interpreter computes with numpy, which warns where IEEE arithmetic is silent."""
    if not interpreted():
        return nullcontext()
    import numpy

    return numpy.errstate(all="ignore")
