"""Safetensors files: their headers read and checked, and written with the reference writer's bytes.

A file is 8 bytes (little-endian length N of the header), N bytes of JSON that may end in spaces, then the data.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from os import PathLike

from ..errors import InputError
from ..tensors import DType
from .header import Entry, malformed, parse_header

__all__ = [
    "MAX_HEADER",
    "Entry",
    "Header",
    "build_header",
    "inspect",
    "layout",
    "parse_header",
    "read_header",
]

MAX_HEADER = 100_000_000
"""Largest header in bytes that the format allows."""

# The reference writer's order of dtypes: larger alignment first, and within one alignment the order of its own list.
_WRITER_ORDER = (
    *("U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16"),
    *("F8_E5M2FNUZ", "F8_E4M3FNUZ", "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"),
)
_WRITER_RANK = {name: rank for rank, name in enumerate(_WRITER_ORDER)}


@dataclass(frozen=True)
class Header:
    """A file's header and its identity when it was read.

    length : bytes of JSON with its padding; the data section begins at ``8 + length``.
    sha256 : hex digest of the 8 length bytes and the JSON.
    """

    length: int
    metadata: Mapping[str, str]
    entries: Mapping[str, Entry]
    size: int
    mtime_ns: int
    inode: int
    sha256: str

    @property
    def data_start(self) -> int:
        """Offset in the file of the first byte of data."""
        return 8 + self.length


def inspect(path: str | PathLike[str]) -> Header:
    """Reads and checks the header of a safetensors file; no tensor data.

    Parameters
    ----------
    path : a regular file, or a symbolic link to one.

    Raises
    ------
    InputError : the file is missing, not readable or not a regular file.
    FormatError : its header breaks the format; names the file, the tensor and the cause.
    """
    file = os.fspath(path)
    try:
        if not stat.S_ISREG(os.stat(file).st_mode):
            raise _not_regular(file)
        # O_NONBLOCK: the path may have become a FIFO since, and opening one would wait for a writer.
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise InputError(f"cannot open: {os.strerror(error.errno or 0)}", code="safetensors.open", file=file) from None
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise _not_regular(file)
        raw = os.pread(fd, 8, 0)
        if len(raw) < 8:
            raise malformed(
                file, "file too short for a safetensors header", expected="at least 8 bytes", got=str(len(raw))
            )
        length = int.from_bytes(raw, "little")
        if length > MAX_HEADER:
            raise malformed(file, "header length over the limit", expected=f"at most {MAX_HEADER}", got=str(length))
        if length > info.st_size - 8:
            most = f"at most {info.st_size - 8} bytes"
            raise malformed(file, "header longer than the file", expected=most, got=str(length))
        text = _pread_exactly(fd, length, 8)
        if len(text) < length:
            raise malformed(file, "file changed or was truncated while its header was read")
    except OSError as error:
        raise InputError(f"cannot read: {os.strerror(error.errno or 0)}", code="safetensors.read", file=file) from None
    finally:
        os.close(fd)
    metadata, entries = parse_header(text, info.st_size - 8 - length, file=file)
    digest = hashlib.sha256(raw + text).hexdigest()
    return Header(length, metadata, entries, info.st_size, info.st_mtime_ns, info.st_ino, digest)


def read_header(path: str | PathLike[str]) -> tuple[int, Mapping[str, str], Mapping[str, Entry]]:
    """(bytes of JSON with padding, metadata, entries by name) of a safetensors file. Errors as in :func:`inspect`."""
    header = inspect(path)
    return header.length, header.metadata, header.entries


def layout(tensors: Iterable[tuple[str, DType, tuple[int, ...]]]) -> dict[str, Entry]:
    """Where the reference writer puts (name, dtype, shape): by alignment (descending), dtype, then name, no gaps.

    The dictionary is in file order.
    """
    placed: dict[str, Entry] = {}
    end = 0
    for name, dtype, shape in sorted(tensors, key=lambda t: (_WRITER_RANK[t[1].name], t[0].encode())):
        begin, end = end, end + prod(shape) * dtype.itemsize
        placed[name] = Entry(dtype, shape, begin, end)
    return placed


def build_header(entries: Mapping[str, Entry], metadata: Mapping[str, str] | None = None) -> bytes:
    """The 8 length bytes and the JSON of a file with `entries` in file order, padded with spaces to 8 bytes.

    metadata : written first, in order of key; left out if None.
    """
    header: dict[str, object] = {}
    if metadata is not None:
        header["__metadata__"] = dict(sorted(metadata.items()))
    for name, entry in entries.items():
        header[name] = {
            "dtype": entry.dtype.name,
            "shape": list(entry.shape),
            "data_offsets": [entry.begin, entry.end],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _not_regular(file: str) -> InputError:
    return InputError("not a regular file", code="safetensors.not-a-file", file=file)


def _pread_exactly(fd: int, size: int, offset: int) -> bytes:
    """Up to `size` bytes at `offset`; fewer only at the end of the file."""
    parts: list[bytes] = []
    done = 0
    while done < size:
        part = os.pread(fd, min(size - done, 1 << 26), offset + done)
        if not part:
            break
        parts.append(part)
        done += len(part)
    return b"".join(parts)
