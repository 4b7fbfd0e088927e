"""The passes behind learned coefficients on the C++ CPU backend; see dispatch.LearnedBackend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .. import _cpu
from .._native import as_tuple
from ..tensors import DType, Piece, TensorView
from ._isa import isa

if TYPE_CHECKING:
    from ..ops.learned import MaskMerge, Relaxed, SegDot

__all__ = ["mask_merge", "mask_sum", "seg_dot"]

_SEG_DOT, _MASK_SUM, _MASK_MERGE, _MASK_SLOPE = range(4)


def seg_dot(
    request: SegDot,
    sums: _cpu.BlockSums,
    piece: Piece,
    base: TensorView | None,
    models: Sequence[TensorView],
    gradient: TensorView,
    logits: TensorView | None,
    *,
    compute: DType,
    threads: int,
) -> None:
    """See dispatch.LearnedBackend."""
    _cpu.learned(
        _SEG_DOT,
        request.groups,
        (request.seed, request.tensor),
        None if request.mask is None else _mask(request.mask),
        (),
        0.0,
        sums,
        (piece.g0, piece.rows, piece.cols, piece.ld),
        None if base is None else as_tuple(base),
        [as_tuple(v) for v in models],
        as_tuple(gradient),
        None if logits is None else as_tuple(logits),
        None,
        compute.code,
        threads,
        isa(),
    )


def mask_sum(
    request: Relaxed, sums: _cpu.BlockSums, piece: Piece, logits: TensorView, *, compute: DType, threads: int
) -> None:
    """See dispatch.LearnedBackend."""
    _cpu.learned(
        _MASK_SUM,
        1,
        (0, 0),
        _mask(request),
        (),
        0.0,
        sums,
        (piece.g0, piece.rows, piece.cols, piece.ld),
        None,
        [],
        None,
        as_tuple(logits),
        None,
        compute.code,
        threads,
        isa(),
    )


def mask_merge(
    request: MaskMerge,
    piece: Piece,
    base: TensorView | None,
    models: Sequence[TensorView],
    gradient: TensorView | None,
    logits: TensorView,
    out: TensorView,
    *,
    compute: DType,
    threads: int,
) -> None:
    """See dispatch.LearnedBackend."""
    _cpu.learned(
        _MASK_MERGE if request.shift is None else _MASK_SLOPE,
        1,
        (0, 0),
        _mask(request.mask),
        request.weights,
        request.shift or 0.0,
        None,
        (piece.g0, piece.rows, piece.cols, piece.ld),
        None if base is None else as_tuple(base),
        [as_tuple(v) for v in models],
        None if gradient is None else as_tuple(gradient),
        as_tuple(logits),
        as_tuple(out),
        compute.code,
        threads,
        isa(),
    )


def _mask(mask: Relaxed) -> tuple[float, float, int, int]:
    return (mask.temperature, mask.mean, mask.seed, mask.tensor)
