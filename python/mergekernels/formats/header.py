"""The grammar of a safetensors header, strict: a part of what the `safetensors` package takes, with the same views.

No hole, no overlap, no trailing byte, no duplicate key, no unknown field, no control character in a name, at most 64
dimensions and 64 spaces between tokens. Regular expressions scan for exactly this grammar, so time and memory are
bounded by the header's length whatever the bytes are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from ..errors import FormatError
from ..tensors import DType, dtype_of

__all__ = ["Entry", "malformed", "parse_header"]

_MAX_RANK = 64
_LIMIT = 2**63
# At most so much white space between two tokens: backtracking then takes constant time.
_W = r"[ \t\n\r]{0,64}"
_INT = r"(?:0|[1-9][0-9]{0,19})"
_STRING = re.compile(r'"([^"\\\x00-\x1f]*)"')
_COLON = re.compile(f"{_W}:{_W}")
_COMMA = re.compile(f"{_W},{_W}")
_BEGIN = re.compile(rf"\{{{_W}")
_END = re.compile(rf"{_W}\}}")
_LIST = rf"\[{_W}(?:({_INT}(?:{_W},{_W}{_INT}){{0,{_MAX_RANK - 1}}}){_W})?\]"
_INTS = re.compile(_LIST)
_ENTRY = re.compile(
    rf'\{{{_W}"dtype"{_W}:{_W}"([A-Z0-9_]+)"{_W},{_W}"shape"{_W}:{_W}{_LIST}{_W},'
    rf'{_W}"data_offsets"{_W}:{_W}\[{_W}({_INT}){_W},{_W}({_INT}){_W}\]{_W}\}}'
)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_FIELDS = ("dtype", "shape", "data_offsets")
_NEEDS_LATER_SUPPORT = ("F4", "F6_E2M3", "F6_E3M2")


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


class _Bad(Exception):
    """What is wrong with a header, before the file's name is known."""

    def __init__(self, message: str, tensor: str | None = None, **fields: str) -> None:
        super().__init__(message)
        self.tensor = tensor
        self.fields = fields


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
        raise malformed(file, str(bad), bad.tensor, **bad.fields) from None
    return metadata, entries


def malformed(
    file: str,
    message: str,
    tensor: str | None = None,
    *,
    expected: str | None = None,
    got: str | None = None,
    hint: str | None = None,
) -> FormatError:
    """The error that says what is wrong with a file."""
    return FormatError(
        f"not a valid safetensors file: {message}",
        code="safetensors",
        file=file,
        tensor=tensor,
        expected=expected,
        got=got,
        hint=hint,
    )


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


def _ints(text: str | None) -> list[int]:
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
