"""Tensors of an adapter before anything is loaded: dtype, shape and where the bytes are, in a file or a mapping."""

from __future__ import annotations

import hashlib
import os
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any

from ...errors import InputError
from ...tensors import DType, dtype_of
from ..safetensors import inspect

if TYPE_CHECKING:
    import torch

__all__ = ["Source", "Stored", "of_file", "of_mapping"]

_CHUNK = 1 << 20
_STRUCT = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i", "U8": "<B"}


@dataclass(frozen=True)
class Source:
    """A file's identity when its header was read, or a mapping of tensors (path then is "")."""

    label: str
    path: str = ""
    size: int = 0
    mtime_ns: int = 0
    inode: int = 0
    tensors: Mapping[str, Any] | None = None

    def open(self) -> int:
        """A descriptor of the file. InputError where it is gone or no longer the file whose header was read."""
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise InputError(
                f"cannot open: {os.strerror(error.errno or 0)}", code="adapter.open", file=self.path
            ) from None
        info = os.fstat(fd)
        if (info.st_size, info.st_mtime_ns, info.st_ino) != (self.size, self.mtime_ns, self.inode):
            os.close(fd)
            raise InputError("the file was changed after its header was read", code="adapter.changed", file=self.path)
        return fd

    def sha256(self) -> str:
        """Hex digest of the whole file; "" for a mapping."""
        if self.tensors is not None:
            return ""
        digest = hashlib.sha256()
        fd = self.open()
        try:
            offset = 0
            while part := os.pread(fd, _CHUNK, offset):
                digest.update(part)
                offset += len(part)
        finally:
            os.close(fd)
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor that can be loaded: calling it reads its bytes and nothing stays open or in memory.

    name : as in the file. offset : of its first byte in the file, 0 in a mapping.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    source: Source
    offset: int = 0

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return prod(self.shape) * self.dtype.itemsize

    def __call__(self) -> torch.Tensor:
        """The tensor in its dtype; of a mapping, the very tensor that is there."""
        import torch

        if self.source.tensors is not None:
            tensor = self.source.tensors[self.name]
            if tuple(tensor.shape) != self.shape:
                raise InputError(
                    "tensor changed its shape between two reads",
                    code="adapter.changed",
                    file=self.source.label,
                    tensor=self.name,
                    expected=str(self.shape),
                    got=str(tuple(tensor.shape)),
                )
            loaded: torch.Tensor = tensor.detach()
            return loaded
        dtype = getattr(torch, self.dtype.torch)
        if not self.nbytes:
            return torch.empty(self.shape, dtype=dtype)
        return torch.frombuffer(self._bytes(), dtype=dtype).reshape(self.shape)

    def number(self) -> float:
        """The value of a tensor of one element, read without torch.

        Raises
        ------
        InputError : more than one element, or a dtype without such a value.
        """
        if self.source.tensors is not None:
            return float(self.source.tensors[self.name])
        data = bytes(self._bytes()) if prod(self.shape) == 1 else b""
        if self.dtype.name == "BF16" and data:
            return float(struct.unpack("<f", b"\0\0" + data)[0])
        if not data or self.dtype.name not in _STRUCT:
            raise InputError(
                "not a number",
                code="adapter.alpha",
                file=self.source.label,
                tensor=self.name,
                expected="one float or integer element",
                got=f"{self.dtype} {list(self.shape)}",
            )
        return float(struct.unpack(_STRUCT[self.dtype.name], data)[0])

    def _bytes(self) -> bytearray:
        data = bytearray(self.nbytes)
        view = memoryview(data)
        fd = self.source.open()
        try:
            done = 0
            while done < len(data):
                got = os.preadv(fd, [view[done : done + (1 << 26)]], self.offset + done)
                if got <= 0:
                    raise InputError(
                        "the file was truncated while it was read",
                        code="adapter.changed",
                        file=self.source.path,
                        tensor=self.name,
                    )
                done += got
        except OSError as error:
            message = f"cannot read: {os.strerror(error.errno or 0)}"
            raise InputError(message, code="adapter.read", file=self.source.path, tensor=self.name) from None
        finally:
            os.close(fd)
        return data


@lru_cache(maxsize=4096)
def _shared(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape


def of_file(path: str, label: str) -> tuple[Source, dict[str, Stored], dict[str, str]]:
    """Source, tensors by name and metadata of a safetensors file. Errors as in :func:`formats.safetensors.inspect`."""
    header = inspect(path)
    source = Source(label, path, header.size, header.mtime_ns, header.inode)
    # A thousand adapters of one base have the same names and shapes: each is in memory once.
    tensors: dict[str, Stored] = {}
    for name, entry in header.entries.items():
        key = sys.intern(name)
        tensors[key] = Stored(key, entry.dtype, _shared(entry.shape), source, header.data_start + entry.begin)
    return source, tensors, dict(header.metadata)


def of_mapping(tensors: Mapping[str, Any], label: str) -> tuple[Source, dict[str, Stored]]:
    """Source and tensors by name of a mapping of tensors, which may load lazily: each is asked for its shape once.

    Raises
    ------
    InputError : a value is not a dense tensor.
    """
    source = Source(label, tensors=tensors)
    stored: dict[str, Stored] = {}
    for name in tensors:
        value = tensors[name]
        dtype = dtype_of(str(getattr(value, "dtype", "")).removeprefix("torch."))
        if dtype is None or not hasattr(value, "shape") or not hasattr(value, "detach"):
            raise InputError(
                "not a tensor", code="adapter.tensor", file=label, tensor=str(name), got=type(value).__name__
            )
        stored[name] = Stored(sys.intern(name), dtype, tuple(int(s) for s in value.shape), source)
    return source, stored
