"""The inputs of a merge of adapters: paths, mappings and adapters in memory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, Union

from ..errors import ArgumentError
from .model import Adapter

if TYPE_CHECKING:
    from .merged import MergedAdapter

__all__ = ["AdapterInput", "open_adapters"]

AdapterInput = Union[
    str, "PathLike[str]", Adapter, "MergedAdapter", Mapping[str, Any], "tuple[Mapping[str, Any], Mapping[str, Any]]"
]
"""A folder, a file, an adapter, the result of a merge, a mapping of tensors, or a pair (mapping, config)."""


def open_adapters(adapters: Iterable[AdapterInput], base: Mapping[str, tuple[int, ...]] | None) -> list[Adapter]:
    """All adapters of a merge; tensors are not read.

    base : name -> shape of the base's tensors.

    Raises
    ------
    ArgumentError : not a list, or an entry that is none of the above. Others as `formats.adapters.read_adapter`.
    """
    if isinstance(adapters, (str, PathLike, Mapping, Adapter)) or not isinstance(adapters, Iterable):
        raise ArgumentError(
            "the adapters are not a list",
            code="adapters.type",
            expected="a list of paths, mappings or adapters",
            got=type(adapters).__name__,
        )
    return [_open(adapter, i, base) for i, adapter in enumerate(adapters)]


def _open(adapter: Any, index: int, base: Mapping[str, tuple[int, ...]] | None) -> Adapter:
    from ..formats.adapters import read_adapter
    from .merged import MergedAdapter

    label = f"adapter {index}"
    if isinstance(adapter, Adapter):
        return adapter
    if isinstance(adapter, MergedAdapter):
        return adapter.as_adapter(label)
    if isinstance(adapter, Sequence) and not isinstance(adapter, str):
        if len(adapter) == 2 and all(isinstance(part, Mapping) for part in adapter):
            return read_adapter(adapter[0], base=base, config=adapter[1], label=label)
    elif isinstance(adapter, Mapping):
        return read_adapter(adapter, base=base, label=label)
    elif isinstance(adapter, (str, os.PathLike)):
        return read_adapter(adapter, base=base)
    raise ArgumentError(
        f"{label} is not an adapter",
        code="adapters.type",
        expected="a path, a mapping of tensors, a pair (mapping, config) or an adapter",
        got=type(adapter).__name__,
    )
