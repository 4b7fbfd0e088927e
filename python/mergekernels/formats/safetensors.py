"""Safetensors headers: a strict reader and a writer that gives the reference writer's bytes.

A file is 8 bytes (little-endian length N of the header), N bytes of JSON that may end in spaces, then the data. The
reader takes a part of what the `safetensors` package takes and gives the same views: no hole, no overlap, no trailing
byte, no duplicate key, no unknown field, no control character in a name. It scans with regular expressions for exactly
this grammar, so that time and memory are bounded by the header's length whatever the bytes are.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from os import PathLike

from ..errors import FormatError, InputError
from ..tensors import DType, dtype_of

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

_MAX_RANK = 64
_LIMIT = 2**63
_W = r"[ \t\n\r]*"
_INT = r"(?:0|[1-9][0-9]{0,19})"
_STRING = re.compile(r'"([^"\\\x00-\x1f]*)"')
_COLON = re.compile(f"{_W}:{_W}")
_COMMA = re.compile(f"{_W},{_W}")
_BEGIN = re.compile(rf"\{{{_W}")
_END = re.compile(rf"{_W}\}}")
_LIST = rf"\[{_W}((?:{_INT}(?:{_W},{_W}{_INT}){{0,{_MAX_RANK - 1}}})?){_W}\]"
_INTS = re.compile(_LIST)
_ENTRY = re.compile(
    rf'\{{{_W}"dtype"{_W}:{_W}"([A-Z0-9_]+)"{_W},{_W}"shape"{_W}:{_W}{_LIST}{_W},'
    rf'{_W}"data_offsets"{_W}:{_W}\[{_W}({_INT}){_W},{_W}({_INT}){_W}\]{_W}\}}'
)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_FIELDS = ("dtype", "shape", "data_offsets")
_NEEDS_LATER_SUPPORT = ("F4", "F6_E2M3", "F6_E3M2")

# The reference writer's order of dtypes: larger alignment first, and within one alignment the order of its own list.
_WRITER_ORDER = (
    *("U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16"),
    *("F8_E5M2FNUZ", "F8_E4M3FNUZ", "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"),
)
_WRITER_RANK = {name: rank for rank, name in enumerate(_WRITER_ORDER)}


@dataclass(frozen=True)
class Entry:
    """One tensor of a header. begin, end : bytes, counted from the start of the data section."""

    dtype: DType
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return self.end - self.begin


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


class _Bad(Exception):
    """What is wrong with a header, before the file's name is known."""

    def __init__(self, message: str, tensor: str | None = None, **fields: str) -> None:
        super().__init__(message)
        self.tensor = tensor
        self.fields = fields


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
            raise _bad(file, "file too short for a safetensors header", expected="at least 8 bytes", got=str(len(raw)))
        length = int.from_bytes(raw, "little")
        if length > MAX_HEADER:
            raise _bad(file, "header length over the limit", expected=f"at most {MAX_HEADER}", got=str(length))
        if length > info.st_size - 8:
            most = f"at most {info.st_size - 8} bytes"
            raise _bad(file, "header longer than the file", expected=most, got=str(length))
        text = _pread_exactly(fd, length, 8)
        if len(text) < length:
            raise _bad(file, "file changed or was truncated while its header was read")
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


def parse_header(raw: bytes, data_size: int, *, file: str = "<bytes>") -> tuple[dict[str, str], dict[str, Entry]]:
    """Metadata and entries of a header.

    Parameters
    ----------
    raw : the JSON with its padding. data_size : bytes of the data section, which the tensors must cover exactly.
    file : named in errors.

    Raises
    ------
    FormatError : naming file, tensor and cause.
    """
    try:
        metadata, entries = _scan(raw)
        _check_cover(entries, data_size)
    except _Bad as bad:
        raise _bad(file, str(bad), bad.tensor, **bad.fields) from None
    return metadata, entries


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


def _bad(
    file: str,
    message: str,
    tensor: str | None = None,
    *,
    expected: str | None = None,
    got: str | None = None,
    hint: str | None = None,
) -> FormatError:
    return FormatError(
        f"not a valid safetensors file: {message}",
        code="safetensors",
        file=file,
        tensor=tensor,
        expected=expected,
        got=got,
        hint=hint,
    )


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


def _scan(raw: bytes) -> tuple[dict[str, str], dict[str, Entry]]:
    """The strict grammar: one object of entries and at most one `__metadata__`, then spaces."""
    if not raw.startswith(b"{"):
        raise _Bad("header does not begin with '{'", got=repr(raw[:1])[1:])
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _Bad(f"header is not UTF-8 at byte {error.start}") from None
    metadata: dict[str, str] | None = None
    entries: dict[str, Entry] = {}
    pos = _expect(_BEGIN, text, 0, "'{'")
    first = True
    while True:
        end = _END.match(text, pos)
        if end:
            break
        if not first:
            pos = _expect(_COMMA, text, pos, "',' or '}'")
        first = False
        name, pos = _string(text, pos)
        pos = _expect(_COLON, text, pos, "':'")
        if name == "__metadata__":
            if metadata is not None:
                raise _Bad("duplicate key '__metadata__'")
            metadata, pos = _metadata(text, pos)
            continue
        if name in entries:
            raise _Bad("duplicate name", name)
        if _CONTROL.search(name):
            raise _Bad("control character in a tensor's name", repr(name)[1:-1])
        entries[name], pos = _entry(text, pos, name)
    if text[end.end() :].strip(" "):
        raise _Bad("something follows the header's JSON", expected="spaces")
    return metadata or {}, entries


def _expect(pattern: re.Pattern[str], text: str, pos: int, what: str) -> int:
    match = pattern.match(text, pos)
    if match is None:
        raise _Bad(f"header is not valid at character {pos}", expected=what, got=repr(text[pos : pos + 12]))
    return match.end()


def _string(text: str, pos: int) -> tuple[str, int]:
    """The JSON string at `pos`, and where it ends."""
    match = _STRING.match(text, pos)
    if match is not None:
        return match.group(1), match.end()
    if text[pos : pos + 1] != '"':
        raise _Bad(f"header is not valid at character {pos}", expected="a string", got=repr(text[pos : pos + 12]))
    try:
        value, end = json.decoder.scanstring(text, pos + 1, True)  # type: ignore[attr-defined]
        value.encode("utf-8")
    except ValueError:
        raise _Bad(f"header has a malformed string at character {pos}") from None
    return value, end


def _metadata(text: str, pos: int) -> tuple[dict[str, str], int]:
    """The object of strings at `pos`."""
    result: dict[str, str] = {}
    pos = _expect(_BEGIN, text, pos, "'{' (metadata maps strings to strings)")
    end = _END.match(text, pos)
    while not end:
        if result:
            pos = _expect(_COMMA, text, pos, "',' or '}'")
        key, pos = _string(text, pos)
        if key in result:
            raise _Bad(f"duplicate key {key!r} in __metadata__")
        pos = _expect(_COLON, text, pos, "':'")
        result[key], pos = _string(text, pos)
        end = _END.match(text, pos)
    return result, end.end()


def _entry(text: str, pos: int, name: str) -> tuple[Entry, int]:
    """The object that describes tensor `name`."""
    match = _ENTRY.match(text, pos)
    if match is not None:
        dtype, shape, begin, end = match.groups()
        return _make(name, dtype, _ints(shape), [int(begin), int(end)]), match.end()
    try:
        fields, pos = _fields(text, pos)
    except _Bad as bad:
        raise _Bad(str(bad), name, **bad.fields) from None
    return _make(name, *fields), pos


def _ints(text: str) -> list[int]:
    return [int(i) for i in text.split(",")] if text else []


def _fields(text: str, pos: int) -> tuple[tuple[str, list[int], list[int]], int]:
    """dtype, shape and offsets of an entry whose fields come in any order."""
    found: dict[str, str | list[int]] = {}
    pos = _expect(_BEGIN, text, pos, "'{'")
    end = _END.match(text, pos)
    while not end:
        if found:
            pos = _expect(_COMMA, text, pos, "',' or '}'")
        field, pos = _string(text, pos)
        if field in found:
            raise _Bad(f"duplicate field {field!r}")
        if field not in _FIELDS:
            raise _Bad(f"unknown field {field!r}", expected="dtype, shape, data_offsets")
        pos = _expect(_COLON, text, pos, "':'")
        if field == "dtype":
            found[field], pos = _string(text, pos)
        else:
            match = _INTS.match(text, pos)
            if match is None:
                raise _Bad(
                    f"bad {field}",
                    expected=f"a list of at most {_MAX_RANK} non-negative integers below 2^63",
                    got=repr(text[pos : pos + 40]),
                )
            found[field], pos = _ints(match.group(1)), match.end()
        end = _END.match(text, pos)
    for field in _FIELDS:
        if field not in found:
            raise _Bad(f"field {field!r} is missing")
    return (found["dtype"], found["shape"], found["data_offsets"]), end.end()  # type: ignore[return-value]


def _make(name: str, dtype_name: str, shape: list[int], offsets: list[int]) -> Entry:
    """The checked entry."""
    if dtype_name in _NEEDS_LATER_SUPPORT:
        raise _Bad(f"dtype {dtype_name} is not supported yet", name, hint="Planned with quantised inputs")
    dtype = dtype_of(dtype_name)
    if dtype is None or dtype.name != dtype_name:
        raise _Bad("unknown dtype", name, expected="a dtype of the format, such as BF16", got=repr(dtype_name[:40]))
    if len(offsets) != 2:
        raise _Bad("bad data_offsets", name, expected="two integers", got=str(len(offsets)))
    begin, end = offsets
    if begin > end:
        raise _Bad("data_offsets run backwards", name, got=str(offsets))
    if prod(max(s, 1) for s in shape) * dtype.itemsize >= _LIMIT or end >= _LIMIT:
        raise _Bad("shape or offsets too large", name, expected="less than 2^63 bytes", got=f"shape {shape}")
    nbytes = prod(shape) * dtype.itemsize
    if nbytes != end - begin:
        raise _Bad(
            "size does not match shape and dtype",
            name,
            expected=f"{nbytes} bytes for {dtype_name} {shape}",
            got=f"{end - begin}",
        )
    return Entry(dtype, tuple(shape), begin, end)


def _check_cover(entries: Mapping[str, Entry], data_size: int) -> None:
    """The tensors must cover the data section: no hole, no overlap, no trailing byte."""
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            what = "overlaps another tensor" if entry.begin < position else "leaves a hole before it"
            raise _Bad(f"data {what}", name, expected=f"data at {position}", got=str(entry.begin))
        position = entry.end
        if position > data_size:
            most = f"at most {data_size}"
            raise _Bad("data reaches past the end of the file", name, expected=most, got=str(position))
    if position != data_size:
        raise _Bad(
            "bytes after the last tensor" if position < data_size else "file truncated",
            expected=f"{position} bytes of data",
            got=str(data_size),
        )
