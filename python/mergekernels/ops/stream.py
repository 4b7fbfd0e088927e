"""`stream`: the fused element-wise pass over tensors in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from .. import _cpu
from .._backends.dispatch import Backend, pick, requested, require
from .._checks import check_out, nonfinite
from .._native import torch_dtype, view_of
from ..errors import ArgumentError
from ..tensors import Piece, TensorView, promote
from .arguments import check_choice, check_range
from .assembly import parts, scatter
from .inputs import Inputs, gather, num_threads
from .output import check_out_dtype
from .program import Program
from .selection import Scope

if TYPE_CHECKING:
    import torch

    from .._cpu import StreamStats

__all__ = ["refuse_nonfinite", "run_program", "stream"]


def run_program(
    program: Program,
    inputs: Inputs,
    outs: Sequence[torch.Tensor] | None,
    backend: Backend,
    threads: int,
    nan: str,
    stats: StreamStats | None = None,
    marks: Callable[[Piece], Sequence[TensorView | None]] | None = None,
) -> None:
    """Run a program over all shards of one tensor; without `outs` only the statistics are taken.

    marks : for a program with marks, gives those of a piece; the tensor is whole then.

    Raises
    ------
    DataError : with nan="error", NaN or Inf in an input, or overflow in the output.
    """
    require(backend, program.features)
    if stats is None and nan == "error":
        stats = _cpu.StreamStats(inputs.num_models, 0)
    if program.slab > 1:
        _by_slabs(program, inputs, outs, backend, threads, stats, marks)
    else:
        for shard, piece in enumerate(inputs.pieces):
            if piece.numel == 0:
                continue
            base, models = inputs.views(shard)
            out = None if outs is None else view_of(outs[shard])
            bits = () if marks is None else marks(piece)
            backend.stream(
                program, piece, base, models, out, compute=inputs.compute, stats=stats, threads=threads, marks=bits
            )
    if nan == "error" and stats is not None:
        refuse_nonfinite(stats, inputs)


def _by_slabs(
    program: Program,
    inputs: Inputs,
    outs: Sequence[torch.Tensor] | None,
    backend: Backend,
    threads: int,
    stats: StreamStats | None,
    marks: Callable[[Piece], Sequence[TensorView | None]] | None,
) -> None:
    """The pass in parts that keep rows whole."""
    import torch

    for part in parts(inputs, program.slab):
        out = result = None
        if outs is not None and part.shard is not None:
            out = view_of(outs[part.shard])
        elif outs is not None:
            result = torch.empty(part.count, dtype=outs[0].dtype, device=outs[0].device)
            out = view_of(result)
        backend.stream(
            program,
            part.flat,
            part.base,
            part.models,
            out,
            compute=inputs.compute,
            stats=stats,
            threads=threads,
            marks=() if marks is None else marks(part.flat),
        )
        if outs is not None and result is not None:
            scatter(inputs, part, result, outs)


def refuse_nonfinite(stats: StreamStats, inputs: Inputs) -> None:
    """Raise the DataError for what a pass found that is not finite."""
    scope = Scope((0,), (inputs.tensor,), inputs.n, "F32")
    labels = [*inputs.labels, "the base", "the result"]
    for source, label in enumerate(labels):
        first, count = stats.nonfinite(source)
        if first >= 0:
            raise nonfinite(label, first, count, scope, [inputs.name], output=source == inputs.num_models + 1)


def stream(
    models: Sequence[Any],
    program: Program,
    *,
    base: Any = None,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    name: str = "",
    nan: Literal["error", "propagate"] = "error",
    backend: str | None = None,
    threads: int | None = None,
) -> torch.Tensor:
    """The tensor that `program` (see `mergekernels.ops.Program`) computes from `models` and `base`.

    Parameters
    ----------
    models : tensors of one shape, as many as the program has weights; with merge "importance" as many importances
        follow. base : needed iff program.base.
    out, out_dtype : where the result goes, or its dtype (default: the promoted dtype of the inputs); bfloat16, float16,
        float32 or float64.
    name : the tensor's name, for messages. nan : "error" refuses NaN, Inf and overflow; "propagate" lets them through.

    Raises
    ------
    ArgumentError, BackendError, DataError
    """
    import torch

    if not isinstance(program, Program):
        raise ArgumentError(
            "program is not usable",
            code="program",
            tensor=name,
            expected="a mergekernels.ops.Program",
            got=type(program).__name__,
        )
    check_choice(nan, ("error", "propagate"), "nan", name)
    if out_dtype is not None:
        check_out_dtype(out_dtype, name)
    if out is not None:
        if not isinstance(out, torch.Tensor):
            raise ArgumentError(
                "out is not usable", code="out", tensor=name, expected="a tensor", got=type(out).__name__
            )
        check_out_dtype(out.dtype, name, "the dtype of out")
    if (base is not None) != program.base or len(models) != program.num_inputs:
        raise ArgumentError(
            "the inputs do not fit the program",
            code="stream.inputs",
            tensor=name,
            expected=f"{program.num_inputs} models and {'a' if program.base else 'no'} base",
            got=f"{len(models)} models and {'no' if base is None else 'a'} base",
        )
    if "marked" in program.features:
        raise ArgumentError(
            "stream takes no marks", code="stream.marks", tensor=name, expected="rules other than Marked", got="Marked"
        )
    inputs = gather(models, base, name, 0)
    if inputs.sharded:
        raise ArgumentError(
            "stream takes whole tensors", code="stream.inputs", tensor=name, expected="tensors", got="lists of shards"
        )
    check_range(program.weights, inputs.compute, "weights", name)
    check_range((program.divisor_value,), inputs.compute, "divisor_value", name)
    check_range((program.scale,), inputs.compute, "scale", name)
    first = inputs.tensors[0][0]
    dtype = out_dtype or torch_dtype(promote([v.dtype for v in inputs.all_views]))
    if out is None:
        out = torch.empty(first.shape, dtype=dtype, device=first.device)
    else:
        check_out(out, first, out_dtype or out.dtype, inputs.tensors[0], name)
    _, module = pick("stream", inputs.all_views, requested(backend))
    run_program(program, inputs, [out], module, num_threads(threads), nan)
    return out
