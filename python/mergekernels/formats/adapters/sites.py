"""Which weight of a base an adapter's factors belong to, and in which orientation."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from functools import lru_cache
from math import prod
from os import PathLike
from typing import Any, Literal, Union

from ...adapters.model import Site
from ...errors import InputError, cut
from ..checkpoint import Checkpoint, open_checkpoint

__all__ = ["Base", "Moved", "base_shapes", "common_prefix", "factor_shape", "site_of"]

Kind = Literal["linear", "fan_in_fan_out", "embedding", "conv"]
Base = Union[str, "PathLike[str]", Checkpoint, Mapping[str, Any]]
"""A base model: a path, an open checkpoint, or a mapping from name to tensor or to shape."""


def base_shapes(base: Base | None) -> dict[str, tuple[int, ...]] | None:
    """Tensor name -> shape of a base model; None for no base. No tensor data is read.

    Parameters
    ----------
    base : path of a checkpoint folder or safetensors file, an open checkpoint, or a mapping from name to tensor, to
        anything with a `shape`, or to a shape.

    Raises
    ------
    MergeError : the checkpoint cannot be opened.
    """
    if base is None:
        return None
    if isinstance(base, (str, os.PathLike)):
        base = open_checkpoint(base)
    tensors: Mapping[str, Any] = base.tensors if isinstance(base, Checkpoint) else base
    return {name: tuple(int(n) for n in getattr(t, "shape", t)) for name, t in tensors.items()}


def common_prefix(modules: Iterable[str], shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, str] | None:
    """(prefix to remove, prefix to add) that turns all module paths into modules of the base, where none is one as is.

    Tools disagree whether a model without its head has its outermost name ("model."). Only a change that fits every
    module counts, and only if it is the only one; ("", "") if the paths fit as they are, None if nothing fits.
    """
    paths = list(modules)
    weights = {name.removesuffix(".weight") for name in shapes if name.endswith(".weight")}
    if not paths or any(p in weights for p in paths):
        return "", ""
    first = paths[0]
    found = {("", w.removesuffix(first)) for w in weights if w.endswith(f".{first}")}
    pieces = first.split(".")
    for cut_at in range(1, len(pieces)):
        removed = ".".join(pieces[:cut_at]) + "."
        if first.removeprefix(removed) in weights:
            found.add((removed, ""))
    fitting = [
        (removed, added)
        for removed, added in found
        if all(p.startswith(removed) and added + p[len(removed) :] in weights for p in paths)
    ]
    return fitting[0] if len(fitting) == 1 else None


class Moved:
    """Module path as stored -> path in the base."""

    def __init__(self, modules: list[str], shapes: Mapping[str, tuple[int, ...]] | None, where: str) -> None:
        change = common_prefix(modules, shapes) if shapes is not None else ("", "")
        # Nothing fits: the paths stay, and the first lookup names the tensor that the base lacks.
        self.removed, self.added = change or ("", "")
        self.note = ""
        if self.removed or self.added:
            self.note = f"{where}: module paths begin with '{self.removed}' where the base has '{self.added}'"

    def __call__(self, module: str) -> str:
        """The module's path in the base."""
        if not module.startswith(self.removed):
            return module
        return self.added + module[len(self.removed) :]


def factor_shape(kind: Kind, a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    """The weight's shape that factors of these stored shapes have, by kind."""
    if kind in ("fan_in_fan_out", "embedding"):
        return a[1], b[0]
    return b[0], *a[1:]


@lru_cache(maxsize=1 << 16)
def _shared(module: str, kind: Kind, shape: tuple[int, ...]) -> Site:
    """A thousand adapters of one base have the same sites: each is in memory once."""
    return Site(module, kind, shape)


def site_of(
    module: str, kind: Kind, a: tuple[int, ...], b: tuple[int, ...], base: tuple[int, ...] | None, where: str
) -> Site:
    """The site of a module whose factors have stored shapes `a` and `b`.

    base : shape of the base's weight, None if no base is known. A convolution with a 1 x 1 kernel and a linear layer
    have the same matrix: the base's form counts.

    Raises
    ------
    InputError : the factors do not fit the base's weight; names module, both shapes.
    """
    shape = factor_shape(kind, a, b)
    if base is None or base == shape:
        return _shared(module, kind, shape)
    if kind in ("linear", "conv") and len(base) >= 2 and len(base) != len(shape):
        pointwise = prod(shape[2:]) == 1 and prod(base[2:]) == 1
        if pointwise and base[:2] == shape[:2]:
            return Site(module, "conv" if len(base) > 2 else "linear", base)
    if kind in ("linear", "fan_in_fan_out") and base == shape[::-1]:
        # Configs hold one flag for all modules, and a model may have layers of both orientations.
        return Site(module, "linear" if kind == "fan_in_fan_out" else "fan_in_fan_out", base)
    hint = None
    if kind == "conv" and len(base) == len(shape) and base[0] == shape[0] and shape[1] % max(base[1], 1) == 0:
        hint = "A convolution with groups cannot be merged"
    elif kind == "embedding" and base[1:] == shape[1:]:
        hint = "The adapter was trained with another vocabulary"
    raise InputError(
        f"factors of module '{cut(module)}' do not fit the base",
        code="adapter.base-shape",
        file=where,
        tensor=f"{module}.weight",
        expected=f"a weight of shape {list(shape)}",
        got=str(list(base)),
        hint=hint,
    )
