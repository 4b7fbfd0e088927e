"""Where merged tensors go: their dtype, new tensors or the caller's, whole or in shards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ._checks import check_out
from ._methods.protocol import Spec
from ._native import torch_dtype
from .errors import ArgumentError
from .ops.inputs import Inputs
from .ops.output import check_out_dtype
from .tensors import promote

if TYPE_CHECKING:
    import torch

__all__ = ["deliver", "dtype_like", "into", "matrix_dtype", "output_dtype", "outputs"]


def output_dtype(spec: Spec, inputs: Inputs, asked: torch.dtype | None) -> torch.dtype:
    """The dtype asked for, else the promoted one of models and base; what accompanies the models does not count."""
    if asked is None:
        base, models = inputs.views(0)
        counted = models[: spec.num_models] if base is None else [*models[: spec.num_models], base]
        asked = torch_dtype(promote([v.dtype for v in counted]))
    check_out_dtype(asked, inputs.name)
    return asked


def outputs(inputs: Inputs, dtype: torch.dtype, out: Any) -> list[torch.Tensor]:
    """New tensors shaped like the shards, or `out`, checked.

    Raises
    ------
    ArgumentError
    """
    import torch

    if out is None:
        return [torch.empty(s[0].shape, dtype=dtype, device=s[0].device) for s in inputs.tensors]
    if inputs.sharded != isinstance(out, (list, tuple)):
        expected = "a list of shards, like the inputs" if inputs.sharded else "a tensor"
        raise ArgumentError(
            "out is not usable", code="out", tensor=inputs.name, expected=expected, got=type(out).__name__
        )
    outs = list(out) if inputs.sharded else [out]
    if len(outs) != len(inputs.tensors):
        raise ArgumentError(
            "out has the wrong number of shards",
            code="out",
            tensor=inputs.name,
            expected=str(len(inputs.tensors)),
            got=str(len(outs)),
        )
    for i, (target, shard) in enumerate(zip(outs, inputs.tensors, strict=True)):
        others = [t for j, s in enumerate(inputs.tensors) if j != i for t in s]
        check_out(target, shard[0], dtype, shard, inputs.name, [*others, *outs[:i]])
    return outs


def matrix_dtype(inputs: Inputs, asked: torch.dtype | None) -> torch.dtype:
    """The dtype asked for, else the promoted one of models and base."""
    if asked is None:
        asked = torch_dtype(promote([v.dtype for v in inputs.all_views]))
    check_out_dtype(asked, inputs.name)
    return asked


def deliver(whole: torch.Tensor, outs: Sequence[torch.Tensor], dim: int) -> None:
    """Write a whole tensor into its shards."""
    start = 0
    for target in outs:
        if len(outs) == 1:
            target.copy_(whole)
            return
        target.copy_(whole.narrow(dim, start, target.shape[dim]))
        start += target.shape[dim]


def dtype_like(target: Any) -> torch.dtype | None:
    """The dtype of a tensor, of the first shard of a list; None of anything else, which is refused elsewhere."""
    import torch

    first = target[0] if isinstance(target, (list, tuple)) and target else target
    return first.dtype if isinstance(first, torch.Tensor) else None


def into(out: Mapping[str, Any] | None, name: str, values: Any) -> Any:
    """An integer buffer (or its shards), copied into the caller's tensors where there are any.

    Raises
    ------
    ArgumentError : they do not fit.
    """
    import torch

    if out is None:
        return values
    given = out[name]
    pairs = list(zip(_listed(given), _listed(values), strict=False))
    same = isinstance(given, (list, tuple)) == isinstance(values, (list, tuple))
    if not same or len(_listed(given)) != len(_listed(values)) or not all(_fits(t, v) for t, v in pairs):
        raise ArgumentError(
            "out does not fit the buffer",
            code="out",
            tensor=name,
            expected=", ".join(f"{v.dtype} {tuple(v.shape)}" for v in _listed(values)),
            got=", ".join(
                f"{t.dtype} {tuple(t.shape)}" if isinstance(t, torch.Tensor) else repr(t) for t in _listed(given)
            ),
        )
    for target, value in pairs:
        target.copy_(value)
    return given


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _fits(target: Any, value: torch.Tensor) -> bool:
    return getattr(target, "shape", None) == value.shape and getattr(target, "dtype", None) == value.dtype
