"""The Triton backend: GPU tensors, or tensors in host memory under Triton's interpreter (TRITON_INTERPRET=1).

Inputs are dense after at most one copy; see `_device.operands`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from ..ops.program import Program
from ..ops.sums import Gram, Reduce
from ..ops.sweeps import Sweep
from ..tensors import DType, Piece, TensorView
from . import _gpu, _gpu_sums, _triton_launches
from ._device import no_gpu, same_device
from ._triton_learned import mask_merge, mask_sum, seg_dot
from ._triton_tables import interpreted

if TYPE_CHECKING:
    from array import array

    from .._cpu import BlockSums, StreamStats, SweepStats

__all__ = [
    "FEATURES",
    "divergence",
    "gram",
    "mark",
    "mask_merge",
    "mask_sum",
    "reduce",
    "seg_dot",
    "stream",
    "sweep",
    "why_not",
]

_OPS = ("select", "sweep", "stream", "seg_dot", "mask_sum", "mask_merge")

FEATURES: frozenset[str] = frozenset(
    (
        *("band", "draw", "rank", "marked", "joint", "importance_key", "factors", "vote", "merge", "divisor", "alone"),
        *("limit", "useful", "balance", "importance", "table", "groups", "subtract", "anchor"),
        *("key:variance", "key:importance", "key:balance", "key:drawn", "gram", "reduce", "divergence", "mark"),
        *("seg_dot", "concrete"),
    )
)
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
    if interpreted():
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
    _gpu.sweep(_triton_launches, request, stats, piece, base, models, compute=compute, tensor=tensor, offset=offset)


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
    _gpu.stream(_triton_launches, program, piece, base, models, out, compute=compute, stats=stats, marks=marks)


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
    _gpu.mark(_triton_launches, program, kind, piece, base, models, marks, compute=compute)


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
    _gpu_sums.gram(_triton_launches, request, sums, piece, base, models, compute=compute)


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
    _gpu_sums.reduce(_triton_launches, program, request, sums, piece, base, models, compute=compute)


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
    return _gpu_sums.divergence(_triton_launches, row_length, piece, base, model, compute=compute)
