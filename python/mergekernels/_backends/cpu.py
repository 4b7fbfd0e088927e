"""The C++ CPU backend: thin calls into the native module."""

from __future__ import annotations

import os
from collections.abc import Sequence

from .. import _cpu
from .._native import as_tuple
from ..errors import BackendError
from ..ops.keep import Keep
from ..ops.program import Program
from ..ops.sweeps import Sweep
from ..tensors import DType, Piece, TensorView
from ._sweeps import per_search, points

__all__ = ["FEATURES", "stream", "sweep", "why_not"]

_TIES = {"all": 0, "none": 1, "hash": 2, "index": 3}
_VOTE = {"none": 0, "weighted": 1}
_DIVISOR = {"none": 0, "value": 1, "agreeing_weights": 2, "agreeing_count": 3}

FEATURES: frozenset[str] = frozenset()
"""See dispatch.Backend."""


def why_not(op: str, views: Sequence[TensorView]) -> str | None:
    """Why this backend cannot serve these views, None if it can.

    Raises
    ------
    BackendError : the instruction set asked for cannot run here.
    """
    isa()
    for view in views:
        if not view.device.startswith("cpu"):
            return f"it computes in host memory, and a tensor is on {view.device}"
    return None


def isa() -> str:
    """The instruction set in use: MERGEKERNELS_CPU_ISA, else the best that this machine has."""
    available = _cpu.isas()
    asked = os.environ.get("MERGEKERNELS_CPU_ISA", "")
    if not asked:
        return available[0]
    if asked not in available:
        raise BackendError(
            "the instruction set asked for cannot run here",
            code="backend.isa",
            expected="MERGEKERNELS_CPU_ISA to be one of " + ", ".join(available),
            got=asked,
            hint="Unset the variable to let the machine decide.",
        )
    return asked


def sweep(
    request: Sweep,
    stats: _cpu.SweepStats,
    piece: Piece,
    base: TensorView | None,
    models: Sequence[TensorView | None],
    *,
    compute: DType,
    tensor: int,
    offset: int,
    threads: int,
) -> None:
    """See ops.program.Sweep."""
    _cpu.sweep(
        stats,
        (piece.g0, piece.rows, piece.cols, piece.ld),
        None if base is None else as_tuple(base),
        [None if v is None else as_tuple(v) for v in per_search(request, models)],
        compute.code,
        request.seed,
        tensor,
        offset,
        threads,
        isa(),
    )


def stream(
    program: Program,
    piece: Piece,
    base: TensorView | None,
    models: Sequence[TensorView],
    out: TensorView | None,
    *,
    compute: DType,
    stats: _cpu.StreamStats | None,
    threads: int,
) -> None:
    """See ops.program.Program."""
    _cpu.stream(
        (
            list(program.weights),
            [None if k is None else _keep(k) for k in points(program)],
            program.base,
            _VOTE[program.vote],
            program.zero_vote,
            _DIVISOR[program.divisor],
            program.divisor_value,
            program.scale,
            program.copy,
            program.seed,
            program.tensor,
        ),
        (piece.g0, piece.rows, piece.cols, piece.ld),
        None if base is None else as_tuple(base),
        [as_tuple(v) for v in models],
        None if out is None else as_tuple(out),
        compute.code,
        stats,
        threads,
        isa(),
    )


def _keep(keep: Keep) -> tuple[int, int, int, int]:
    return (keep.tau, _TIES[keep.ties], keep.word, keep.index)
