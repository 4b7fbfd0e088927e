"""The CUDA C++ backend, for tensors on NVIDIA GPUs: calls into the native module with addresses and the current stream.

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
from . import _cuda_launches, _cuda_list, _gpu, _gpu_sums
from ._cuda_learned import mask_merge, mask_sum, seg_dot
from ._device import no_gpu, same_device

if TYPE_CHECKING:
    from array import array

    from .._cpu import BlockSums, StreamStats, SweepStats

__all__ = [
    "FEATURES",
    "LISTS",
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

_OPS = (
    *("select", "sweep", "stream", "mark", "gram", "reduce", "divergence"),
    *("seg_dot", "mask_sum", "mask_merge"),
)

FEATURES: frozenset[str] = frozenset(
    (
        *("alone", "anchor", "balance", "band", "divergence", "divisor", "draw", "factors", "gram", "groups"),
        *(
            "importance",
            "importance_key",
            "joint",
            "key:balance",
            "key:drawn",
            "key:importance",
            "key:variance",
            "limit",
            "mark",
        ),
        *("marked", "merge", "rank", "reduce", "subtract", "table", "useful", "vote"),
        *("seg_dot", "concrete"),
    )
)
"""See dispatch.Backend."""

LISTS = _cuda_list
"""Streams over lists of small tensors, one launch for all of them."""


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
    _gpu.sweep(_cuda_launches, request, stats, piece, base, models, compute=compute, tensor=tensor, offset=offset)


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
    _gpu.stream(_cuda_launches, program, piece, base, models, out, compute=compute, stats=stats, marks=marks)


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
    _gpu.mark(_cuda_launches, program, kind, piece, base, models, marks, compute=compute)


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
    _gpu_sums.gram(_cuda_launches, request, sums, piece, base, models, compute=compute)


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
    _gpu_sums.reduce(_cuda_launches, program, request, sums, piece, base, models, compute=compute)


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
    return _gpu_sums.divergence(_cuda_launches, row_length, piece, base, model, compute=compute)


def _no_nvidia_gpu() -> str | None:
    import torch

    if torch.version.hip is not None:
        return "it is for NVIDIA GPUs, and this torch is built for ROCm"
    reason = no_gpu()
    if reason is not None:
        return reason
    count, why = _cuda_launches.native().devices()
    return None if count else f"the CUDA runtime of the module finds no device: {why}"
