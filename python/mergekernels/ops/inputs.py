"""The tensors of one merge in memory: whole, or as row or column shards, as views and pieces."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

from .._checks import refuse_unequal, split
from .._native import view_of
from ..errors import ArgumentError
from ..tensors import DType, Piece, TensorView, compute_dtype, tensor_id

if TYPE_CHECKING:
    import torch

__all__ = ["Inputs", "check_name", "gather", "joined_shape", "num_threads"]


@dataclass(frozen=True)
class Inputs:
    """One tensor of a merge. Entry i of every list belongs to shard i; a whole tensor is one shard.

    tensors : per shard, the tensors of the models, then the base's if there is one.
    labels : what errors call the models.
    n, shape : elements and shape of the unsharded tensor.
    """

    name: str
    tensor: int
    n: int
    num_models: int
    has_base: bool
    compute: DType
    sharded: bool
    pieces: tuple[Piece, ...]
    tensors: tuple[tuple[torch.Tensor, ...], ...]
    shape: tuple[int, ...] = ()
    labels: tuple[str, ...] = ()

    def cut(self, align: int) -> Inputs:
        """These inputs, in pieces of multiples of `align` elements where there is a choice."""
        return self

    def views(self, shard: int) -> tuple[TensorView | None, list[TensorView]]:
        """(base, models) of a shard."""
        views = list(self._views[shard])
        return (views.pop() if self.has_base else None), views

    @property
    def all_views(self) -> list[TensorView]:
        """Every view, for a backend to say whether it can serve them."""
        return [view for shard in self._views for view in shard]

    @cached_property
    def _views(self) -> tuple[tuple[TensorView, ...], ...]:
        # Many rounds ask for them, and for small tensors they are a tenth of a call.
        return tuple(tuple(view_of(t) for t in shard) for shard in self.tensors)


def gather(models: Sequence[Any], base: Any, name: str, shard_dim: int, names: Sequence[str] = ()) -> Inputs:
    """Check and cut the inputs of one merge.

    models, base : tensors, or lists of shards along `shard_dim`; whole tensors are cut like the lists. names : what
    errors call the models, by default "model 0" and so on.

    Raises
    ------
    ArgumentError : no tensor, unusable dtype or layout, unequal shapes, devices or cuts.
    """
    import torch

    check_name(name)
    if isinstance(models, (torch.Tensor, Mapping, str)) or not isinstance(models, Iterable):
        raise ArgumentError(
            "the models are not a list of tensors", code="models.type", tensor=name, got=type(models).__name__
        )
    models = list(models)
    given = [*models] if base is None else [*models, base]
    labels = list(names) or [f"model {i}" for i in range(len(models))]
    labels += ["the base"] if base is not None else []
    if not 1 <= len(models) <= 64:
        raise ArgumentError("a merge takes 1 to 64 models", code="models.count", tensor=name, got=str(len(models)))
    cuts: list[int] | None = None
    for value, label in zip(given, labels, strict=True):
        if isinstance(value, (list, tuple)):
            cuts = [s.shape[shard_dim] for s in split(value, None, shard_dim, label, name)]
            break
    columns = [split(value, cuts, shard_dim, label, name) for value, label in zip(given, labels, strict=True)]
    shards = list(zip(*columns, strict=True))
    for shard in shards:
        refuse_unequal(labels, [tuple(t.shape) for t in shard], "shape", name)
    refuse_unequal(labels, [c[0].device for c in columns], "device", name)
    compute = compute_dtype([view_of(t).dtype for shard in shards for t in shard])
    pieces = _pieces([tuple(shard[0].shape) for shard in shards], shard_dim, name)
    return Inputs(
        name,
        tensor_id(name),
        sum(p.numel for p in pieces),
        len(models),
        base is not None,
        compute,
        cuts is not None,
        pieces,
        tuple(tuple(s) for s in shards),
        joined_shape([tuple(shard[0].shape) for shard in shards], shard_dim),
        tuple(labels[: len(models)]),
    )


def check_name(name: Any) -> None:
    """Refuse what cannot name a tensor."""
    if not isinstance(name, str) or not _encodable(name):
        raise ArgumentError("name is not a tensor's name", code="name", expected="a string of Unicode", got=repr(name))


def joined_shape(shapes: list[tuple[int, ...]], dim: int) -> tuple[int, ...]:
    """Shape of the tensor whose shards along `dim` have these shapes."""
    if len(shapes) == 1:
        return shapes[0]
    return (*shapes[0][:dim], sum(shape[dim] for shape in shapes), *shapes[0][dim + 1 :])


def _encodable(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _pieces(shapes: list[tuple[int, ...]], dim: int, name: str) -> tuple[Piece, ...]:
    """Where each shard lies in the unsharded tensor."""
    if len(shapes) == 1:
        return (Piece.flat(0, prod(shapes[0])),)
    others = [shape[:dim] + shape[dim + 1 :] for shape in shapes]
    if any(other != others[0] for other in others):
        raise ArgumentError(
            "the shards do not fit together",
            code="shards.shape",
            tensor=name,
            expected=f"shapes that differ in dimension {dim} (shard_dim) alone",
            got=", ".join(str(shape) for shape in shapes[:4]),
            hint="Column shards need shard_dim=1.",
        )
    rows, inner = prod(shapes[0][:dim]), prod(shapes[0][dim + 1 :])
    ld = sum(shape[dim] for shape in shapes) * inner
    pieces, start = [], 0
    for shape in shapes:
        cols = shape[dim] * inner
        # One row, as in a cut along dimension 0, is a run of consecutive elements.
        pieces.append(Piece.flat(start, cols) if rows == 1 else Piece(start, rows, cols, ld))
        start += cols
    return tuple(pieces)


def num_threads(argument: int | None) -> int:
    """The argument, else MERGEKERNELS_NUM_THREADS, else torch's count."""
    import os

    import torch

    if argument is not None:
        if not isinstance(argument, int) or not 1 <= argument <= 1024:
            raise ArgumentError(
                "threads must be at least 1", code="threads", expected="an integer from 1 to 1024", got=repr(argument)
            )
        return argument
    asked = os.environ.get("MERGEKERNELS_NUM_THREADS", "")
    if asked:
        if not asked.isdecimal() or int(asked) < 1:
            raise ArgumentError(
                "MERGEKERNELS_NUM_THREADS is not a count",
                code="threads",
                expected="an integer of at least 1",
                got=asked,
            )
        return int(asked)
    return torch.get_num_threads()
