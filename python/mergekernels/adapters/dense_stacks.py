"""The updates of full fine-tunes as stacks that are read in row tiles: `checkpoint_stacks`."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING

from ..errors import ArgumentError, DataError
from .changes import read_elements

if TYPE_CHECKING:
    import torch

    from ..formats.checkpoint import Checkpoint
    from ..ops import TileStack

__all__ = ["checkpoint_stacks"]


def checkpoint_stacks(
    base: str | PathLike[str],
    tuned: Sequence[str | PathLike[str]],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    memory: int = 64 << 20,
    passes: int = 3,
) -> dict[str, TileStack]:
    """The differences of fine-tuned checkpoints from their base, a stack per module, for `ops.cp_als` and `ops.tucker`.

    Headers are read now, tensors tile by tile when a stack is factorised. Differences are taken in float32, in float64
    if an input is.

    base, tuned : checkpoint folders or files with the same tensors. include, exclude : patterns of module paths
    ("*.q_proj"); default all linear layers, convolutions (out, rest) and embeddings (vocabulary, width), as the
    weights lie. memory, passes : of each `ops.TileStack`.
    Returns module path -> stack, in order of path; update t is tuned[t] - base.

    Raises
    ------
    ArgumentError : no tuned checkpoint. InputError, FormatError, PlanError : checkpoints that cannot be read or do not
    fit together, patterns that name nothing. DataError, when a stack is read : NaN or Inf.
    """
    from math import prod

    from ..formats.checkpoint import open_checkpoint
    from ..ops import TileStack
    from .changes import pair_up

    if isinstance(tuned, (str, PathLike)) or not len(tuned):
        raise ArgumentError(
            "the fine-tuned checkpoints are not a list",
            code="checkpoint_stacks.tuned",
            expected="one or more paths",
            got=repr(tuned),
        )
    first = open_checkpoint(base)
    others = [open_checkpoint(path) for path in tuned]
    pairs = [pair_up(first, other, include, exclude) for other in others]
    found = {}
    for site in pairs[0].sites:
        name = site.weight if site.weight in first.tensors else site.module
        shape = first.tensors[name].shape
        sizes = len(others), shape[0], prod(shape[1:])
        found[site.module] = TileStack(_Rows(first, others, name), sizes, memory=memory, passes=passes)
    return found


class _Rows:
    """Reads rows of the differences of one tensor."""

    def __init__(self, base: Checkpoint, tuned: Sequence[Checkpoint], name: str) -> None:
        self._all = (base, *tuned)
        self._name = name

    def __call__(self, first: int, last: int) -> torch.Tensor:
        import torch

        from ..engine.pool import Reader

        infos = [checkpoint.tensors[self._name] for checkpoint in self._all]
        wide = torch.float64 if any(info.dtype.name == "F64" for info in infos) else torch.float32
        columns = 1
        for size in infos[0].shape[1:]:
            columns *= size
        parts = []
        reader = Reader()
        try:
            for checkpoint, info in zip(self._all, infos, strict=True):
                part = read_elements(reader, checkpoint, info, first * columns, (last - first) * columns, 0).to(wide)
                if not bool(torch.isfinite(part).all()):
                    raise DataError(
                        f"'{checkpoint.label}' holds NaN or Inf in rows {first} to {last - 1}",
                        code="data.nonfinite",
                        tensor=self._name,
                        file=str(checkpoint.files[info.file].path),
                        expected="finite values",
                    )
                parts.append(part.reshape(last - first, columns))
        finally:
            reader.close()
        return torch.stack(parts[1:]).sub_(parts[0])
