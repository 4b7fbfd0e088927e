"""One call of mergekit, computed here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..._backends.dispatch import pick
from ..._methods.protocol import Spec
from ..._methods.slerp import Slerp
from ...errors import ArgumentError, BackendError, DataError
from ...merging import Call, merge_one
from ...ops.sums import Segments
from .._hooks import NotServed
from .eligible import check_tensors
from .options import Options
from .translate import Merge

__all__ = ["linear_batch", "merged", "slerp_batch"]

_NONFINITE = ("arcee_fusion", "breadcrumbs", "breadcrumbs_ties", "nearswap", "ram", "ramplus_tl", "sce")
"""Methods that rank, compare or count NaN and Inf otherwise than mergekit, which shall answer then."""


def merged(merge: Merge, options: Options) -> Any:
    """The merged tensor: of the inputs' shape, and of the dtype that mergekit's own code would give.

    Raises
    ------
    NotServed : these kernels refuse the tensors or the arguments; nothing has been written.
    MergeError : anything else.
    """
    check_tensors(merge.models if merge.base is None else [*merge.models, merge.base])
    name = merge.name or ""
    seed = _seed(name, options) if merge.random else 0
    dtype = _widened(merge.models[0].dtype) if merge.widen else None
    return _run(merge.method, merge.arguments, merge.models, merge.base, name, seed, options, dtype)


def linear_batch(batch: Any, weight: Any, normalize: bool, options: Options) -> Any:
    """The batched linear: ``batch.tensors[i]`` is [G, *shape], weight [G, N]."""
    tensors = batch.tensors
    check_tensors(tensors)
    rows = _rows(weight, tensors[0].shape[0], len(tensors))

    def part(models: Sequence[Any], weights: Sequence[float]) -> Any:
        arguments = {"weights": weights, "normalize": normalize}
        return _run("linear", arguments, models, None, "", 0, options, None)

    if all(row == rows[0] for row in rows):
        return part(tensors, rows[0])
    return _stacked(part, tensors, rows)


def slerp_batch(batch: Any, t: Any, options: Options) -> Any:
    """The batched slerp: a base and another tensor, [G, *shape] each, t [G]; one angle per output."""
    tensors = batch.tensors
    check_tensors(tensors)
    if len(tensors) != 2 or batch.base_index is None:
        raise NotServed("not one base and one model")
    pair = [tensors[1 - batch.base_index], tensors[batch.base_index]]
    rows = _rows(t.reshape(-1, 1), tensors[0].shape[0], 1)

    def part(models: Sequence[Any], values: Sequence[float], groups: int = 1) -> Any:
        return _run("slerp", {"t": values[0]}, models[:1], models[1], "", 0, options, None, groups)

    if all(row == rows[0] for row in rows):
        return part(pair, rows[0], len(rows))
    return _stacked(part, pair, rows)


def _run(
    method: str,
    arguments: Mapping[str, Any],
    models: Sequence[Any],
    base: Any,
    name: str,
    seed: int,
    options: Options,
    out_dtype: Any,
    groups: int = 1,
) -> Any:
    theirs = method in _NONFINITE and options.nan == "propagate"
    nan = "error" if theirs else options.nan
    try:
        call = Call.of(method, arguments, None, "default", nan, seed, options.backend, options.threads, shard_dim=0)
        if groups > 1:
            call = replace(call, method=_SlerpOfEach())
        inputs = call.inputs(list(models), base, call.companions, name)
        spec = call.spec(inputs)
        pick("stream", inputs.all_views, call.backend)
        return merge_one(call, spec, inputs, None, out_dtype)
    except ArgumentError as error:
        # Said before anything is written. What mergekit makes of such arguments, or how it refuses them, is its own.
        raise NotServed(f"mergekernels refuses the arguments ({error.code})") from error
    except BackendError as error:
        raise NotServed(f"no backend for these tensors ({error.code})") from error
    except DataError as error:
        if error.code == "directions.cancel":
            raise NotServed("the directions cancel") from error
        if theirs and error.code in ("data.nonfinite", "data.overflow"):
            raise NotServed("values that are not finite") from error
        raise


class _SlerpOfEach(Slerp):
    """slerp with one angle for each entry of the first dimension."""

    def segments(self, spec: Spec) -> Segments:
        """The entries of the first dimension."""
        if not spec.n:
            return super().segments(spec)
        return Segments("rows", spec.shape[0], spec.n // spec.shape[0])


def _rows(values: Any, groups: int, length: int) -> list[list[float]]:
    """Numbers of a tensor [G, N] on any device."""
    if tuple(values.shape) != (groups, length) or values.requires_grad:
        raise NotServed("coefficients of another shape, or with a gradient")
    rows: list[list[float]] = values.tolist()
    return rows


def _stacked(part: Any, tensors: Sequence[Any], rows: Sequence[Sequence[float]]) -> Any:
    """Each output by itself, because its coefficients are its own."""
    import torch

    return torch.stack([part([tensor[g] for tensor in tensors], row) for g, row in enumerate(rows)])


def _seed(name: str, options: Options) -> int:
    import torch

    if options.seed is not None:
        return options.seed
    if name:
        return torch.initial_seed() % (1 << 64)
    # Tensors without a name would share one mask: each draws, as in mergekit, from the default generator.
    return int(torch.randint(1 << 62, (), device="cpu").item())


def _widened(dtype: Any) -> Any:
    import torch

    return torch.float64 if dtype == torch.float64 else torch.float32
