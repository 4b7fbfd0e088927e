"""What checkpoints hold, told from their headers, and whether several of them can be merged."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..formats.checkpoint import Checkpoint, open_checkpoint

__all__ = ["CheckpointSummary", "Difference", "InspectReport", "inspect"]

_CONFIG_KEYS = (
    "architectures",
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "tie_word_embeddings",
    "torch_dtype",
    "dtype",
)


@dataclass(frozen=True)
class CheckpointSummary:
    """One checkpoint.

    dtypes : safetensors dtype -> (tensors, parameters, bytes). stacks : prefix of numbered names -> layers.
    config : the fields of config.json that tell sizes. warnings : what is odd but harmless.
    """

    path: str
    files: int
    tensors: int
    parameters: int
    nbytes: int
    dtypes: Mapping[str, tuple[int, int, int]]
    stacks: Mapping[str, int]
    config: Mapping[str, Any]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Difference:
    """What keeps one tensor from being merged as it is.

    kind : "missing", "shape", "kind" (float here, integer there) or "dtype" (several float types, which can be merged).

    values : per checkpoint, in order, its shape or dtype; None where the tensor is missing.
    """

    tensor: str
    kind: str
    values: tuple[str | None, ...]


@dataclass(frozen=True)
class InspectReport:
    """The checkpoints, and the differences between them, in order of name.

    mergeable : every tensor is in all with one shape (dtypes may differ between floats); None for one checkpoint.
    """

    checkpoints: tuple[CheckpointSummary, ...]
    differences: tuple[Difference, ...]
    mergeable: bool | None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable form."""
        return asdict(self)


def inspect(models: Sequence[str | os.PathLike[str]]) -> InspectReport:
    """Reads the headers of checkpoint folders or safetensors files.

    Raises
    ------
    FormatError, InputError, PlanError : a model cannot be opened.
    """
    opened = [open_checkpoint(Path(m), label=os.fspath(m)) for m in models]
    differences = _differences(opened) if len(opened) > 1 else ()
    return InspectReport(
        checkpoints=tuple(_summary(c) for c in opened),
        differences=differences,
        mergeable=None if len(opened) < 2 else not any(d.kind != "dtype" for d in differences),
    )


def _summary(checkpoint: Checkpoint) -> CheckpointSummary:
    dtypes: dict[str, tuple[int, int, int]] = {}
    for t in checkpoint.tensors.values():
        tensors, parameters, nbytes = dtypes.get(t.dtype.name, (0, 0, 0))
        dtypes[t.dtype.name] = (tensors + 1, parameters + math.prod(t.shape), nbytes + t.nbytes)
    return CheckpointSummary(
        path=checkpoint.label or str(checkpoint.path),
        files=len(checkpoint.files),
        tensors=len(checkpoint.tensors),
        parameters=sum(p for _, p, _ in dtypes.values()),
        nbytes=sum(b for _, _, b in dtypes.values()),
        dtypes=dtypes,
        stacks=_stacks(checkpoint.tensors),
        config={k: checkpoint.config[k] for k in _CONFIG_KEYS if k in checkpoint.config},
        warnings=checkpoint.warnings,
    )


def _stacks(names: Iterable[str]) -> dict[str, int]:
    """Prefixes that are followed by a number 0, 1, ... in tensor names, with how many; most layers first."""
    numbers: dict[str, set[int]] = {}
    for name in names:
        parts = name.split(".")
        for i, part in enumerate(parts):
            if part.isdecimal():
                numbers.setdefault(".".join(parts[:i]), set()).add(int(part))
                break
    stacks = {prefix: len(n) for prefix, n in numbers.items() if len(n) > 1 and max(n) == len(n) - 1}
    return dict(sorted(stacks.items(), key=lambda item: (-item[1], item[0])))


def _differences(opened: Sequence[Checkpoint]) -> tuple[Difference, ...]:
    found: list[Difference] = []
    for name in sorted({n for c in opened for n in c.tensors}, key=str.encode):
        tensors = [c.tensors.get(name) for c in opened]
        present = [t for t in tensors if t is not None]
        if len(present) < len(tensors):
            values = [None if t is None else f"{t.dtype.name} {list(t.shape)}" for t in tensors]
            found.append(Difference(name, "missing", tuple(values)))
        elif len({t.shape for t in present}) > 1:
            found.append(Difference(name, "shape", tuple(str(list(t.shape)) for t in present)))
        elif len({t.dtype.name for t in present}) > 1:
            mixed = all(t.dtype.is_float for t in present)
            found.append(Difference(name, "dtype" if mixed else "kind", tuple(t.dtype.name for t in present)))
    return tuple(found)
