"""A checkpoint folder: its safetensors files, their headers, and where each tensor lies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..tensors import DType

__all__ = ["Checkpoint", "ShardFile", "TensorInfo"]


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies. file : position in `Checkpoint.files`. offset : absolute, in bytes, in that file."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    file: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class ShardFile:
    """One safetensors file and its identity when its header was read.

    header_sha256 : hex digest of the 8 length bytes and the JSON header.
    """

    path: Path
    size: int
    mtime_ns: int
    inode: int
    header_sha256: str


@dataclass(frozen=True)
class Checkpoint:
    """The headers of a checkpoint; no tensor data. config : config.json as a dictionary, empty if there is none."""

    path: Path
    files: tuple[ShardFile, ...]
    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""
