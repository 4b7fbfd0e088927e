"""The inputs of a merge of adapters: paths, mappings and adapters in memory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from typing import TYPE_CHECKING, Any, Union

from .._methods.matrix import misfits
from ..errors import ArgumentError, BackendError, MergeError
from ..ops.arguments import check_integer, check_range
from ..tensors import F32
from .align import Place, align, raise_all
from .cutting import Limits
from .job import Job, bind_job
from .model import Adapter
from .peft_dialect import rslora_factor
from .truncate import Spread, check_cut

if TYPE_CHECKING:
    import torch

    from ..formats.adapters import Base
    from .merged import MergedAdapter

__all__ = ["AdapterInput", "check_device", "check_numbers", "open_adapters", "open_job"]

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


def open_job(
    adapters: Iterable[AdapterInput],
    method: str,
    weights: Any,
    rank: int | None,
    energy: float | None,
    base: Base | None,
    dialect: str,
    seed: int,
    spread: Spread,
    device: torch.device | str,
    params: Mapping[str, Any],
) -> tuple[Job, Limits]:
    """Everything that a merge checks before it reads a factor; the arguments are those of `merge_adapters`."""
    from ..formats.adapters import base_shapes

    check_cut(rank, energy, spread)
    check_device(device)
    seed = check_integer(seed, 0, 1 << 64, "seed")
    shapes = base_shapes(base)
    job = bind_job(method, params, weights, open_adapters(adapters, shapes), dialect, seed, device)
    aligned = align(job.adapters, shapes, equal_ranks=job.wants.equal_ranks)
    job = replace(job, aligned=aligned, shapes=shapes or {})
    check_numbers(job)
    raise_all([problem for place in job.aligned.places for problem in _misfits(job, place)])
    largest = max(max(place.ranks) for place in job.aligned.places)
    if job.method.info.name != method:  # one adapter in dialect peft
        rank = energy = None
    if job.wants.peft and job.dialect == "peft":
        factor, largest = rslora_factor(job.adapters, job.wants, rank, largest)
        if factor != 1.0:
            note = f"dialect peft: the first adapter uses rsLoRA, so the result is multiplied by {factor:g}"
            job = replace(job, factor=factor, notes=(*job.notes, note))
    return job, Limits(rank, energy, largest, spread)


def check_device(device: Any) -> None:
    """Refuse a device that is neither the CPU nor a GPU that torch can use.

    Raises
    ------
    ArgumentError, BackendError.
    """
    import torch

    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise ArgumentError(
            "device is not usable", code="device", expected="'cpu', 'cuda' or 'cuda:N'", got=repr(device)
        )
    if found.type == "cuda" and not torch.cuda.is_available():
        raise BackendError("there is no GPU that torch can use", code="device.cuda", got=str(found))
    if found.type == "cuda" and found.index is not None and found.index >= torch.cuda.device_count():
        raise BackendError(
            "there is no GPU of this number",
            code="device.cuda",
            expected=f"0 to {torch.cuda.device_count() - 1}",
            got=str(found),
        )


def check_numbers(job: Job) -> None:
    """Refuse weights and scales that the dtype of the computation cannot hold."""
    if any(e is not None and e.dtype == "F64" for place in job.aligned.places for e in place.entries):
        return
    for name in ("weight", "lambda"):
        value = job.params.get(name)
        check_range((v for v in (value if isinstance(value, tuple) else (value,)) if v is not None), F32, name)


def _misfits(job: Job, place: Place) -> list[MergeError]:
    """Why the method cannot merge a module of this shape."""
    name, spec = job.method.info.name, job.spec(place)
    sentences = [] if spec.plain else misfits(job.method, spec)
    return [ArgumentError(f"{name}: {text}", code="matrix.shape", tensor=place.site.module) for text in sentences]
