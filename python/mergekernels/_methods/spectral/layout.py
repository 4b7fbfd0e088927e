"""Which tensors of a model are matrices to a method over matrices, and what the others get."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from typing import TYPE_CHECKING, Any

from ..matrix import MatrixMethod, MatrixSpec, Merged

if TYPE_CHECKING:
    from ...adapters.model import Delta

__all__ = ["Layout", "layout_of", "mean_of", "merge_plain", "patterns"]


@dataclass(frozen=True)
class Layout:
    """A tensor as `count` matrices (m, n), one after the other in memory; `plain`: it is no matrix to the method.

    A plain tensor is one row, (1, elements).
    """

    count: int
    m: int
    n: int
    plain: bool = False


def patterns(value: str) -> list[str]:
    """The patterns of a parameter that lists them, separated by commas."""
    return [p for p in (part.strip() for part in value.split(",")) if p]


def _matches(name: str, value: str | None) -> bool:
    return bool(value) and any(fnmatchcase(name, p) for p in patterns(value or ""))


def layout_of(params: Mapping[str, Any], name: str, shape: Sequence[int]) -> Layout:
    """How a method with these parameters sees a tensor.

    A tensor of three and more dimensions is flattened to (dim 0, rest); one of three that `experts` names is shape[0]
    matrices. Plain are tensors of fewer than two dimensions, those that `exclude` names, with conv = "mean" those of
    more than two (experts excepted), and empty ones.
    """
    size = prod(shape)
    if len(shape) == 3 and size and _matches(name, params.get("experts")) and not _matches(name, params.get("exclude")):
        return Layout(shape[0], shape[1], shape[2])
    flat = len(shape) > 2 and params.get("conv") == "mean"
    if len(shape) < 2 or not size or flat or _matches(name, params.get("exclude")):
        return Layout(1, 1, size, plain=True)
    return Layout(1, shape[0], size // shape[0])


def merge_plain(method: MatrixMethod, spec: MatrixSpec, deltas: Sequence[Delta], state: Any = None) -> Merged:
    """The merged task vector of a tensor that is no matrix: the method's own rule, else the (weighted) mean.

    spec.shape is (1, elements), spec.plain is True.
    """
    own = getattr(method, "merge_plain", None)
    if own is not None:
        return own(spec, deltas, state)  # type: ignore[no-any-return]
    return Merged(mean_of(deltas, spec.params.get("weight")))


def mean_of(deltas: Sequence[Delta], weights: Sequence[float] | None = None) -> Delta:
    """The sum of w_t D_t over the number of models, dense; summed in the order of the models."""
    import torch

    from ...adapters.model import Factors

    total: torch.Tensor | None = None
    for i, delta in enumerate(deltas):
        if isinstance(delta, Factors) and delta.rank == 0:
            continue
        dense = delta.dense() if isinstance(delta, Factors) else delta
        dense = dense if weights is None or weights[i] == 1.0 else dense * weights[i]
        total = dense if total is None else total + dense
    if total is None:
        return deltas[0]
    return total / len(deltas)
