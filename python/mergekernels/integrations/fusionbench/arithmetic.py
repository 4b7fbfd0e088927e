"""The arithmetic of FusionBench's algorithms on tensors and state dicts; FusionBench itself is not needed here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ...errors import ArgumentError, DataError
from ...merging import merge
from ...ops import Program, stream
from ...ops.keep import Draw, KeepRule
from ...state_dicts import merge_state_dicts
from ...tensors import tensor_id
from .._hooks import NotServed

if TYPE_CHECKING:
    import torch

    Tensors = Mapping[str, torch.Tensor]

__all__ = ["added", "dropped", "matrix", "mean", "share_kept", "summed", "ties", "ties_of_vectors"]

_ALONE = Program((1.0,), (None,), base=False)
_AND = Program((1.0, 1.0), (None, None), base=False)
_LESS = Program((1.0, -1.0), (None, None), base=False)
_AND_DELTA = Program((0.0, 1.0), (None, None), anchor="first")
_ON_BASE = Program((1.0,), (None,), subtract=False)


def wide(tensor: torch.Tensor) -> torch.dtype:
    """The dtype of sums: float32, or float64 for float64."""
    import torch

    return torch.promote_types(tensor.dtype, torch.float32)


def summed(models: Iterable[Tensors], base: Tensors | None = None) -> tuple[dict[str, torch.Tensor], int]:
    """The sums of the models' tensors, of task vectors where there is a base, and the number of models.

    One model at a time is needed. Floats are summed in float32 (float64 for float64), others by torch.
    """
    total: dict[str, torch.Tensor] = {}
    count = 0
    for model in models:
        for name in model.keys() if base is None else base.keys():
            value, below = model[name].detach(), None if base is None else base[name].detach()
            first = name not in total
            if not value.is_floating_point():
                delta = value if below is None else value - below
                total[name] = delta.clone() if first else total[name] + delta
            elif first and below is None:
                total[name] = stream([value], _ALONE, out_dtype=wide(value), name=name, nan="propagate")
            elif first:
                total[name] = stream([value, below], _LESS, out_dtype=wide(value), name=name, nan="propagate")
            elif below is None:
                stream([total[name], value], _AND, out=total[name], name=name, nan="propagate")
            else:
                stream([total[name], value], _AND_DELTA, base=below, out=total[name], name=name, nan="propagate")
        count += 1
    return total, count


def mean(total: Tensors, count: int, like: Tensors) -> dict[str, torch.Tensor]:
    """Sums over their number, each in the dtype that `like` has; integers in whatever dtype division gives."""
    program = replace(_ALONE, divisor="value", divisor_value=float(count))
    return {
        name: stream([x], program, out_dtype=like[name].dtype, name=name, nan="propagate")
        if x.is_floating_point()
        else x / count
        for name, x in total.items()
    }


def added(base: Tensors, delta: Tensors, scale: float) -> dict[str, torch.Tensor]:
    """Base + scale * delta in the base's dtype, for all tensors of `delta`."""
    program = replace(_ON_BASE, scale=float(scale))
    return {
        name: stream([x], program, base=base[name].detach(), out_dtype=base[name].dtype, name=name, nan="propagate")
        if base[name].is_floating_point()
        else base[name] + scale * x
        for name, x in delta.items()
    }


def share_kept(threshold: float, n: int) -> float:
    """FusionBench's threshold as the density of n entries: above 1 it is percent; 0 keeps the largest entry still."""
    share = threshold / 100 if threshold > 1 else float(threshold)
    if not 0.0 <= share <= 1.0:
        raise ArgumentError(
            "threshold is not usable", code="threshold", expected="0 to 1, or percent up to 100", got=repr(threshold)
        )
    return max(share, 0.5 / n) if n else share


def ties(
    models: Sequence[Tensors], base: Tensors, threshold: float, merge_func: str, scale: float
) -> dict[str, torch.Tensor]:
    """TIES over whole models: one threshold and one majority for each. Integers take part as float32 numbers."""
    sources = [_floats(m) for m in models]
    below = _floats(base)
    n = sum(x.numel() for x in below.values())
    return merge_state_dicts(
        sources,
        "ties",
        base=below,
        weights=1.0,
        dialect="paper",
        density=share_kept(threshold, n),
        merge_function=_function(merge_func),
        scale=float(scale),
        nan="propagate",
    )


def ties_of_vectors(rows: Sequence[torch.Tensor], threshold: float, merge_func: str) -> torch.Tensor:
    """TIES of flat task vectors, in float32 for rows of 16 bits that are averaged, as the tool answers."""
    function = _function(merge_func)
    zero = rows[0].new_zeros(()).expand(rows[0].shape)
    result: torch.Tensor = merge(
        rows,
        "ties",
        base=zero,
        weights=1.0,
        dialect="paper",
        density=share_kept(threshold, rows[0].numel()),
        merge_function=function,
        out_dtype=wide(rows[0]) if function == "mean" else rows[0].dtype,
        nan="propagate",
    )
    return result


def dropped(vector: torch.Tensor, sparsity: float, rescale: bool, seed: int, name: str) -> torch.Tensor:
    """The task vector with a random share of its entries 0 and the rest divided by what is kept, in place.

    sparsity : probability of dropping an entry. seed, name : of the draw.
    """
    keep = 1.0 - sparsity
    rule: KeepRule = Draw(int(keep * 2.0**32))
    factors = (1.0 / keep,) if rescale and keep > 0.0 else ()
    program = Program((1.0,), (rule,), base=False, factors=factors, seed=seed, tensor=tensor_id(name))
    return stream([vector], program, out=vector, name=name, nan="propagate")


def matrix(
    method: str, vectors: Sequence[torch.Tensor], name: str, **params: Any
) -> tuple[torch.Tensor, Mapping[str, Any]]:
    """The merged task vector of one matrix by a spectral method, and the report on it.

    Raises :class:`NotServed` for what is not finite, or too small for the method's sizes.
    """
    report: dict[str, Any] = {}
    zero = vectors[0].new_zeros(()).expand(vectors[0].shape)
    try:
        result = merge(vectors, method, base=zero, name=name, report=report, **params)
    except DataError as error:
        raise NotServed(_REASONS.get(error.code, error.code)) from error
    return result, report[name]


_REASONS = {"data.nonfinite": "values that are not finite", "data.overflow": "values that are not finite"}


def _function(merge_func: str) -> str:
    function = str(merge_func).split("-")[-1]
    if function not in ("sum", "mean", "max"):
        raise ArgumentError("merge_func is not usable", code="merge_func", expected="sum, mean or max", got=merge_func)
    return function


def _floats(tensors: Tensors) -> dict[str, torch.Tensor]:
    return {k: v.detach() if v.is_floating_point() else v.detach().float() for k, v in tensors.items()}
