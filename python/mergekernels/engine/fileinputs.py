"""The sources of one tensor in files, read in chunks when they are asked for."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from .._native import torch_dtype, view_of
from ..formats.checkpoint import Checkpoint
from ..ops.inputs import Inputs
from ..tensors import DType, Piece, TensorView
from .pool import Reader
from .resolved import ResolvedMerge, Source

if TYPE_CHECKING:
    import torch

__all__ = ["FileInputs", "load_tensor", "pieces_of"]

_CHUNK = 1 << 20  # elements; the reference needs some hundred bytes of temporaries for each


@dataclass(frozen=True)
class FileInputs(Inputs):
    """The sources of one tensor in files; each shard is read when it is asked for."""

    merge: ResolvedMerge | None = None
    sources: tuple[Source, ...] = ()
    cast: DType | None = None
    companions: int = 0
    reader: Reader = field(default_factory=Reader)

    def cut(self, align: int) -> FileInputs:
        """Chunks of a multiple of `align` elements."""
        return replace(self, pieces=pieces_of(self.n, align))

    def views(self, shard: int) -> tuple[TensorView | None, list[TensorView]]:
        """(base, models) of a shard."""
        assert self.merge is not None
        piece = self.pieces[shard]
        views = []
        for slot, source in enumerate(self.sources):
            tensor = load_tensor(self.reader, self.merge.inputs[source.input], source.tensor, piece, slot)
            plain = self.num_models - self.companions <= slot < self.num_models
            views.append(replace(view_of(tensor), cast=None if plain else self.cast))
        return (views.pop() if self.has_base else None), views


def load_tensor(reader: Reader, checkpoint: Checkpoint, name: str, piece: Piece, slot: int) -> torch.Tensor:
    """Consecutive elements of a stored tensor."""
    import torch

    info = checkpoint.tensors[name]
    raw = bytearray(max(1, piece.numel * info.dtype.itemsize))
    view = memoryview(raw)[: piece.numel * info.dtype.itemsize]
    reader.read(checkpoint.files[info.file].path, view, info.offset + piece.g0 * info.dtype.itemsize, slot)
    return torch.frombuffer(raw, dtype=torch_dtype(info.dtype), count=piece.numel)


def pieces_of(n: int, align: int = 1) -> tuple[Piece, ...]:
    """Chunks of a multiple of `align` elements that cover `n`."""
    chunk = max(1, _CHUNK // align) * align
    return tuple(Piece.flat(start, min(chunk, n - start)) for start in range(0, n, chunk))
