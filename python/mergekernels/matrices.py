"""Merging with methods over matrices in memory: one tensor, or state dicts tensor by tensor.

The methods run on torch, on the device of the tensors. Shards are put together first: their results lie within the
bound of the whole tensor's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ._entries import Entry, are_mappings, common_buffer, is_float, same_names
from ._matrix_call import MatrixCall, check_layouts
from ._matrix_task import Task, resolved
from ._methods.matrix_table import matrix_names
from ._outputs import deliver, dtype_like, into, matrix_dtype, outputs
from .errors import ArgumentError, InputError
from .ops.inputs import joined_shape

if TYPE_CHECKING:
    import torch

__all__ = ["is_matrix_method", "merge_matrices", "merge_matrix", "using_threads"]


def is_matrix_method(method: Any) -> bool:
    """Whether `method` names a method over matrices of models."""
    return isinstance(method, str) and method in matrix_names("models")


@contextmanager
def using_threads(threads: int | None) -> Iterator[None]:
    """Torch's thread count set to `threads` for a while."""
    import torch

    if threads is None:
        yield
        return
    if not isinstance(threads, int) or isinstance(threads, bool) or not 1 <= threads <= 1024:
        raise ArgumentError(
            "threads must be at least 1", code="threads", expected="an integer from 1 to 1024", got=repr(threads)
        )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def merge_matrix(
    call: MatrixCall,
    models: Sequence[Any],
    base: Any,
    name: str,
    out_dtype: torch.dtype | None,
    out: Any,
    threads: int | None,
    report: MutableMapping[str, Any] | None,
) -> Any:
    """One merged tensor, a list of shards for sharded inputs; the arguments are those of `mergekernels.merge`.

    Raises
    ------
    ArgumentError, DataError
    """
    with using_threads(threads):
        task = Task.of(call, models, base, call.companions, name)
        dtype = matrix_dtype(task.inputs, out_dtype)
        outs = outputs(task.inputs, dtype, out)
        state = resolved(call, lambda: [task])
        deliver(task.merged(state, dtype, report), outs, call.shard_dim)
    return outs if task.inputs.sharded else outs[0]


def merge_matrices(
    call: MatrixCall,
    models: Sequence[Any],
    base: Any,
    out_dtype: torch.dtype | None,
    threads: int | None,
    report: MutableMapping[str, Any] | None,
    out: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Merged state dicts; the arguments are those of `mergekernels.merge_state_dicts`.

    Raises
    ------
    InputError, ArgumentError, PlanError, DataError
    """
    everything = [*models] if base is None else [base, *models]
    are_mappings(everything)
    are_mappings(call.companions, call.method.info.companions)
    labels = (["the base"] if base is not None else []) + [f"model {i}" for i in range(len(models))]
    targets = [] if out is None else [out]
    same_names([*everything, *targets], [*labels, *["out"] * len(targets)])
    order = list(everything[0].keys())
    extra = [f"{call.method.info.companions} {i}" for i in range(len(call.companions))]
    _no_strangers(call.companions, extra, order)
    shapes = {}
    for name in order:
        value = everything[0][name]
        if is_float([value], name):
            parts = list(value) if isinstance(value, (list, tuple)) else [value]
            shapes[name] = joined_shape([tuple(p.shape) for p in parts], call.shard_dim)
    check_layouts(call, shapes)

    def task(name: str) -> Task:
        companions = [c[name] if name in c.keys() else None for c in call.companions]  # noqa: SIM118
        found = Entry(name, [m[name] for m in models], None if base is None else base[name], companions)
        if not found.is_float:  # the first input's was
            raise InputError("some inputs hold floats, others integers", code="tensor.dtype", tensor=name)
        return Task.of(call, found.models, found.base, companions, name)

    result: dict[str, Any] = {}
    with using_threads(threads):
        state = resolved(call, lambda: (task(name) for name in shapes))
        for name in order:
            if name not in shapes:
                found = Entry(name, [m[name] for m in models], None if base is None else base[name], [])
                result[name] = into(out, name, common_buffer(found.models, found.base, name))
                continue
            one = task(name)
            target = None if out is None else out[name]
            dtype = matrix_dtype(one.inputs, out_dtype if target is None else dtype_like(target))
            outs = outputs(one.inputs, dtype, target)
            deliver(one.merged(state, dtype, report), outs, call.shard_dim)
            result[name] = outs if one.inputs.sharded else outs[0]
    return result


def _no_strangers(companions: Sequence[Any], labels: Sequence[str], order: Sequence[str]) -> None:
    """Refuse what accompanies no tensor of the models, or accompanies it in some models only."""
    known, first = set(order), None
    for label, c in zip(labels, companions, strict=True):
        names = set(c.keys())
        first = names if first is None else first
        if not names <= known:
            raise InputError(
                f"{label} names tensors that the models lack: " + ", ".join(sorted(names - known)[:5]), code="names"
            )
        if names != first:
            raise InputError(
                f"{label} and {labels[0]} name different tensors: " + ", ".join(sorted(names ^ first)[:5]),
                code="names",
            )
    if first is not None and not first:
        raise InputError(f"{labels[0]} is empty: no tensor would be merged with it", code="names")
