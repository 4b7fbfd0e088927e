"""Merging DTensors: each process merges its own shard, and what a round measures is added up over the mesh.

Nothing is gathered unless a method sums over whole canonical blocks or ranks whole rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

from . import _cpu
from ._backends.dispatch import Backend, pick
from ._methods.protocol import Coeffs, Round, Spec
from ._module_tensors import is_dtensor
from ._outputs import output_dtype, outputs
from .errors import ArgumentError
from .merging import Call, merge_one
from .ops.inputs import Inputs
from .ops.select import refuse_nonfinite as refuse_in_sweep
from .ops.select import run_sweep
from .ops.stream import refuse_nonfinite as refuse_in_stream
from .ops.stream import run_program
from .tensors import Piece

if TYPE_CHECKING:
    import torch
    from torch.distributed.tensor import DTensor

__all__ = ["check_placements", "merge_dtensors"]


def check_placements(tensors: Mapping[str, Any], name: str) -> None:
    """Refuse tensors that are not spread in the same way, or in one that no box describes. tensors : by label.

    Raises
    ------
    ArgumentError
    """
    first = next(iter(tensors))
    expected = _way(tensors[first])
    for label, tensor in tensors.items():
        if _way(tensor) != expected:
            raise ArgumentError(
                f"{label} is spread otherwise than {first}",
                code="dtensor.placements",
                tensor=name,
                expected=expected,
                got=_way(tensor),
                hint="redistribute() one of them, or distribute_tensor() the plain one.",
            )
    _piece(tensors[first], name)


def _way(tensor: Any) -> str:
    return f"{tensor.placements} on {tensor.device_mesh}" if is_dtensor(tensor) else "a plain tensor"


def _piece(tensor: Any, name: str) -> Piece:
    """Where this process's shard lies in the whole tensor."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    kinds = {type(p) for p in tensor.placements}
    dims = {p.dim % tensor.ndim for p in tensor.placements if type(p) is Shard}
    boxed = len(dims) < 2 or (len(dims) == 2 and tensor.ndim == 2)
    if not kinds <= {Replicate, Shard} or not boxed:
        raise ArgumentError(
            "a tensor that is spread like this cannot be merged shard by shard",
            code="dtensor.placements",
            tensor=name,
            expected="Replicate(), and Shard() of one dimension (of both of a matrix)",
            got=str(tensor.placements),
            hint="redistribute() it, or merge full_tensor() with mergekernels.merge.",
        )
    shape = tuple(tensor.shape)
    local, offset = compute_local_shape_and_global_offset(shape, tensor.device_mesh, tensor.placements)
    if not prod(local):
        return Piece.flat(0, 0)
    cut = [d for d in range(len(shape)) if local[d] != shape[d]]
    if not cut:
        return Piece.flat(0, prod(shape))
    inner = prod(shape[cut[-1] + 1 :])
    ld = shape[cut[-1]] * inner
    rows, cols = prod(local[: cut[-1]]), local[cut[-1]] * inner
    start = offset[cut[-1]] * inner + (offset[cut[0]] * ld if len(cut) == 2 else 0)
    return Piece.flat(start, cols) if rows == 1 else Piece(start, rows, cols, ld)


def merge_dtensors(
    call: Call,
    name: str,
    models: Sequence[DTensor],
    base: DTensor | None,
    companions: Sequence[DTensor],
    out_dtype: torch.dtype | None,
    out: DTensor | None,
) -> DTensor:
    """One merged DTensor, spread like the inputs; every process of the mesh must make the same call.

    The bits are those of `merge` on the whole tensors. `check_placements` has accepted the inputs.

    Raises
    ------
    ArgumentError, BackendError, DataError : on all processes alike.
    """
    first = models[0]
    inputs = call.inputs(
        [t.to_local() for t in models],
        None if base is None else base.to_local(),
        [t.to_local() for t in companions],
        name,
    )
    shape = tuple(first.shape)
    inputs = replace(inputs, n=prod(shape), shape=shape, pieces=(_piece(first, name),))
    spec = call.spec(inputs)
    _, backend = pick("stream", inputs.all_views, call.backend)
    mesh = _Mesh(first)
    coeffs = _resolve(call, spec, inputs, backend, mesh)
    dtype = output_dtype(spec, inputs, out_dtype if out is None else out.dtype)
    target = outputs(inputs, dtype, None if out is None else out.to_local().detach())[0]
    program = None if coeffs is None else call.method.apply(spec, coeffs)
    if program is None or program.slab > 1:
        target.copy_(_gathered(call, name, models, base, companions, dtype, first))
    else:
        stats = _cpu.StreamStats(inputs.num_models, 0)
        run_program(program, inputs, [target], backend, call.threads, "propagate", stats)
        if call.nan == "error":
            refuse_in_stream(mesh.stream(stats), inputs)
    return out if out is not None else _spread(target, first)


def _resolve(call: Call, spec: Spec, inputs: Inputs, backend: Backend, mesh: _Mesh) -> Coeffs | None:
    """The coefficients, or None where a round needs more than a shard."""
    method = call.method
    state = method.start(spec)
    while isinstance(state, Round):
        if state.op == "select" and state.selection is not None:
            found, visited = run_sweep(state.selection, [inputs], backend, call.threads, "propagate")
            found, visited = mesh.sweep(found, visited)
            if call.nan == "error" and visited == spec.scope.n and not state.selection.sweep.joint:
                refuse_in_sweep(found, state.selection, [inputs])
            state = method.resolve(spec, state, found, visited)
        elif state.op == "votes" and state.coeffs is not None:
            program = method.apply(spec, state.coeffs)
            if program.slab > 1:
                return None
            votes = _cpu.StreamStats(inputs.num_models, 0)
            run_program(program, inputs, None, backend, call.threads, "propagate", votes)
            state = method.resolve(spec, state, mesh.stream(votes), spec.scope.n)
        else:
            return None
    return state


def _gathered(
    call: Call,
    name: str,
    models: Sequence[DTensor],
    base: DTensor | None,
    companions: Sequence[DTensor],
    dtype: torch.dtype,
    like: DTensor,
) -> torch.Tensor:
    """This process's part of the merge of the whole tensors."""
    whole = call.inputs(
        [t.full_tensor().detach() for t in models],
        None if base is None else base.full_tensor().detach(),
        [t.full_tensor().detach() for t in companions],
        name,
    )
    merged = merge_one(call, call.spec(whole), whole, None, dtype)
    piece = _piece(like, name)
    local = like.to_local()
    if piece.rows == 1:
        part = merged.reshape(-1)[piece.g0 : piece.g0 + piece.cols]
    else:
        part = merged.reshape(-1).as_strided((piece.rows, piece.cols), (piece.ld, 1), piece.g0)
    found: torch.Tensor = part.reshape(local.shape)
    return found


def _spread(local: torch.Tensor, like: DTensor) -> DTensor:
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


class _Mesh:
    """The processes that hold the other shards of a tensor."""

    def __init__(self, tensor: DTensor) -> None:
        from torch.distributed.tensor import Shard

        mesh = tensor.device_mesh
        self._groups = [mesh.get_group(i) for i, p in enumerate(tensor.placements) if isinstance(p, Shard)]

    def sweep(self, stats: Any, visited: int) -> tuple[Any, int]:
        """The statistics of all shards, and how many elements they visited."""
        for group in self._groups:
            parts = _exchanged((stats.dump(), visited), group)
            stats, visited = _merged(_cpu.SweepStats, [dump for dump, _ in parts]), sum(count for _, count in parts)
        return stats, visited

    def stream(self, stats: Any) -> Any:
        """The counters of all shards."""
        for group in self._groups:
            stats = _merged(_cpu.StreamStats, _exchanged(stats.dump(), group))
        return stats


def _merged(kind: Any, dumps: Sequence[bytes]) -> Any:
    total = kind.load(dumps[0])
    for dump in dumps[1:]:
        total.merge(kind.load(dump))
    return total


def _exchanged(value: Any, group: Any) -> list[Any]:
    import torch.distributed as dist

    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group=group)
    return found
