"""The output's files, final from the start: names, headers, and the offset of every tensor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from ..formats.safetensors import build_header
from ..formats.safetensors import layout as place
from .resolved import ResolvedTensor

__all__ = ["OutputFile", "PlacedTensor", "index_json", "lay_out"]

INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True)
class PlacedTensor:
    """One output tensor in its file. index : position in `ResolvedMerge.tensors`. offset : in bytes, from the file's
    start.
    """

    index: int
    name: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class OutputFile:
    """One output file, which is one unit. tensors : in order of offset. header : the 8 length bytes and the JSON."""

    name: str
    header: bytes
    size: int
    tensors: tuple[PlacedTensor, ...]

    @property
    def header_sha256(self) -> str:
        """Hex digest of the header bytes."""
        return hashlib.sha256(self.header).hexdigest()


def lay_out(tensors: Sequence[ResolvedTensor], shard_size: int) -> tuple[OutputFile, ...]:
    """Files filled in order of name up to `shard_size` bytes of data; a larger tensor gets a file of its own.

    Inside a file tensors lie as the reference writer of safetensors puts them. One file is called model.safetensors.
    """
    groups: list[list[int]] = []
    filled = 0
    for i, t in enumerate(tensors):
        nbytes = prod(t.shape) * t.dtype.itemsize
        if not groups or (filled + nbytes > shard_size and filled > 0):
            groups.append([])
            filled = 0
        groups[-1].append(i)
        filled += nbytes
    files = []
    for number, group in enumerate(groups, start=1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors" if len(groups) > 1 else "model.safetensors"
        where = {tensors[i].name: i for i in group}
        entries = place((tensors[i].name, tensors[i].dtype, tensors[i].shape) for i in group)
        header = build_header(entries, {"format": "pt"})
        placed = tuple(
            PlacedTensor(where[n], n, len(header) + entry.begin, entry.nbytes) for n, entry in entries.items()
        )
        size = len(header) + sum(t.nbytes for t in placed)
        files.append(OutputFile(name, header, size, placed))
    return tuple(files)


def index_json(files: Sequence[OutputFile]) -> bytes | None:
    """The index of a sharded checkpoint, None for a single file."""
    if len(files) < 2:
        return None
    where = {t.name: f.name for f in files for t in f.tensors}
    total = sum(t.nbytes for f in files for t in f.tensors)
    data = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()
