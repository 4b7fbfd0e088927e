"""A model with an adapter on it, `model+adapter` in a recipe: a checkpoint some of whose tensors are made while read.

Nothing merged lies on disk or in memory. The tensors of modules that the adapter changes are those of the model, to
which the product of the factors is added tile by tile; tensors that the adapter replaces (modules_to_save) are its own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..adapters.model import Adapter, Module
from ..errors import InputError, MergeError, PlanError
from ..formats.adapters import read_adapter
from ..formats.checkpoint import Checkpoint, ShardFile, TensorInfo
from ..formats.safetensors import inspect
from ..tensors import DType
from .resolved import ResolvedMerge, ResolvedTensor, Source, sources_of

__all__ = ["WORK_COPIES", "AdaptedCheckpoint", "adapt", "factor_bytes", "low_rank_sources", "module_of"]


WORK_COPIES = 6
"""Float64 copies of one matrix to count for what a decomposition works with."""


@dataclass(frozen=True)
class AdaptedCheckpoint(Checkpoint):
    """See the module. tensors : as the model stores them, or the adapter where it replaces them.

    adapter : as read. modules : name of a weight -> what the adapter adds to it. replaced : names of the tensors that
    are the adapter's own. model : the checkpoint under the adapter.
    """

    adapter: Adapter = field(default_factory=lambda: Adapter("", {}))
    modules: Mapping[str, Module] = field(default_factory=dict)
    replaced: frozenset[str] = frozenset()
    model: Checkpoint | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """What the plan's hash holds of the adapter besides its file: where it lies, its config, scales as they are."""
        return {
            "path": os.path.realpath(self.adapter.path),
            "config": json.loads(json.dumps(self.adapter.config, sort_keys=True, default=str)),
            "modules": {name: [m.rank, m.scale, m.site.kind] for name, m in sorted(self.modules.items())},
        }


def adapt(model: Checkpoint, adapter: Path, label: str) -> AdaptedCheckpoint:
    """`model` with the adapter at a path. Headers and config are read, no tensors.

    Raises
    ------
    MergeError : the adapter cannot be read, is of a kind that has no product of factors, or does not fit the model.
    """
    found = read_adapter(adapter, base=model, label=str(adapter))
    file = _file_of(found, adapter)
    header = inspect(file)
    position = len(model.files)
    shard = ShardFile(file, header.size, header.mtime_ns, header.inode, header.sha256)
    tensors = dict(model.tensors)
    for name, load in found.extras.items():
        # `load` is a stored tensor: dtype, shape and place are known without reading it.
        stored: Any = load
        tensors[name] = TensorInfo(name, stored.dtype, stored.shape, position, stored.offset, stored.nbytes)
    modules = {m.site.weight: m for m in found.modules.values()}
    problems: list[MergeError] = []
    for name in sorted({*modules} - {n for n in modules if tensors[n].dtype.is_float}):
        problems.append(
            InputError(
                f"the adapter '{adapter}' adds to a tensor of {tensors[name].dtype}",
                code="adapter.target-dtype",
                tensor=name,
                expected="floating values",
            )
        )
    if problems:
        raise problems[0] if len(problems) == 1 else PlanError(problems)
    return AdaptedCheckpoint(
        model.path,
        (*model.files, shard),
        tensors,
        model.config,
        label,
        (*model.warnings, *found.notes),
        adapter=found,
        modules=modules,
        replaced=frozenset(found.extras),
        model=model,
    )


def module_of(checkpoint: Checkpoint, name: str) -> Module | None:
    """What an adapter adds to a tensor of a checkpoint; None where nothing is added."""
    return checkpoint.modules.get(name) if isinstance(checkpoint, AdaptedCheckpoint) else None


def _file_of(adapter: Adapter, path: Path) -> Path:
    """The file of the adapter's tensors."""
    loads: list[Any] = [m.load for m in adapter.modules.values()]
    for load in (*(getattr(x, "b", None) for x in loads), *adapter.extras.values()):
        file = getattr(getattr(load, "source", None), "path", "")
        if file:
            return Path(file)
    raise InputError("the file of the adapter's tensors is unknown", code="adapter.file", file=str(path))


def factor_bytes(merge: ResolvedMerge, tensor: ResolvedTensor, compute: DType) -> int:
    """Bytes of the factors that are held while a tensor is merged."""
    total = 0
    for source in sources_of(tensor):
        module = module_of(merge.inputs[source.input], source.tensor)
        if module is not None:
            total += module.rank * sum(module.site.shape) * compute.itemsize
    return total


def low_rank_sources(merge: ResolvedMerge, tensor: ResolvedTensor) -> frozenset[int]:
    """Models whose task vector is the product of an adapter's factors and nothing else, or nothing at all."""
    base = tensor.base
    if base is None:
        return frozenset()
    return frozenset(slot for slot, source in enumerate(tensor.models) if same_bytes(merge, source, base))


def same_bytes(merge: ResolvedMerge, one: Source, other: Source) -> bool:
    """Whether two sources are stored at one place: a model under an adapter that is the base itself."""
    first, second = merge.inputs[one.input], merge.inputs[other.input]
    if module_of(second, other.tensor) is not None:
        return False  # an adapter on the base itself: what it stores are not its values
    if first.tensors[one.tensor].offset != second.tensors[other.tensor].offset:
        return False
    mine, its = _file(first, one.tensor), _file(second, other.tensor)
    if mine is its:
        return True
    if (mine.inode, mine.size, mine.mtime_ns) != (its.inode, its.size, its.mtime_ns):
        return False
    return os.path.samefile(mine.path, its.path)


def _file(checkpoint: Checkpoint, name: str) -> ShardFile:
    return checkpoint.files[checkpoint.tensors[name].file]
