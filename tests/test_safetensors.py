"""The strict safetensors header: what is refused, what is accepted, and what the reference package says of it."""

from __future__ import annotations

import ctypes
import json
import os
import random
import socket
import time
import tracemalloc
from pathlib import Path

import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekernels.errors import FormatError, InputError, MergeError
from mergekernels.formats.header import parse_header
from mergekernels.formats.safetensors import build_header, inspect, layout, read_header
from mergekernels.tensors import dtype_of

DTYPES = [
    *("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I16", "U16"),
    *("F16", "BF16", "I32", "U32", "F32", "C64", "F64", "I64", "U64"),
]


def entry(dtype="F32", shape="[2]", offsets="[0,8]"):
    return f'{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}'


def file_bytes(header: str | bytes, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else header.encode("utf-8", "surrogatepass")
    return len(raw).to_bytes(8, "little") + raw + data


def ours(blob: bytes):
    """Our view of a whole file: {name: (dtype, shape, bytes)}, or the error."""
    try:
        if len(blob) < 8 or int.from_bytes(blob[:8], "little") > len(blob) - 8:
            return FormatError("length")
        n = int.from_bytes(blob[:8], "little")
        _, entries = parse_header(blob[8 : 8 + n], len(blob) - 8 - n)
        return {k: (e.dtype.name, list(e.shape), blob[8 + n + e.begin : 8 + n + e.end]) for k, e in entries.items()}
    except FormatError as error:
        return error


def theirs(blob: bytes):
    try:
        return {k: (v["dtype"], list(v["shape"]), bytes(v["data"])) for k, v in safetensors.deserialize(blob)}
    except safetensors.SafetensorError as error:
        return error


def assert_not_laxer(blob: bytes) -> bool:
    """What we accept, safetensors accepts, with identical views."""
    mine = ours(blob)
    if isinstance(mine, Exception):
        return False
    assert mine == theirs(blob)
    return True


ACCEPTED = {
    "empty": ("{}", b""),
    "empty, padded": ("{}      ", b""),
    "one tensor": (f'{{"a":{entry()}}}', b"12345678"),
    "not padded, odd address": (f'{{"a":{entry()}}} ', b"12345678"),
    "metadata": (f'{{"__metadata__":{{"format":"pt","x":"y"}},"a":{entry()}}}', b"12345678"),
    "empty metadata": (f'{{"__metadata__":{{}},"a":{entry()}}}', b"12345678"),
    "fields in another order": ('{"a":{"shape":[2],"data_offsets":[0,8],"dtype":"F32"}}', b"12345678"),
    "white space inside": (
        '{ "a" :\n{ "dtype" : "F32" , "shape" : [ 2 ] ,\t"data_offsets" : [ 0 , 8 ] } }',
        b"12345678",
    ),
    "rank 0": (f'{{"a":{entry("F64", "[]")}}}', b"12345678"),
    "rank 64": (f'{{"a":{entry("F64", "[" + ",".join("1" * 64) + "]")}}}', b"12345678"),
    "out of order": (f'{{"b":{entry("U8", "[3]", "[5,8]")},"a":{entry("U8", "[5]", "[0,5]")}}}', b"12345678"),
    "zero size between": (
        f'{{"a":{entry("U8", "[5]", "[0,5]")},"z":{entry("F32", "[0,7]", "[5,5]")},"b":{entry("U8", "[3]", "[5,8]")}}}',
        b"12345678",
    ),
    "zero size at the start": (f'{{"a":{entry()},"z":{entry("F32", "[0]", "[0,0]")}}}', b"12345678"),
    "tensor at an odd offset": (f'{{"a":{entry("U8", "[1]", "[0,1]")},"b":{entry("F32", "[1]", "[1,5]")}}}', b"12345"),
    "empty name": (f'{{"":{entry()}}}', b"12345678"),
    "name like a path": (f'{{"../../etc/passwd":{entry()}}}', b"12345678"),
    "long name": (f'{{"{"x" * 65536}":{entry()}}}', b"12345678"),
    "escaped name": (f'{{"\\u0061\\ud83d\\ude00\\\\\\"":{entry()}}}', b"12345678"),
    "Unicode twins": (
        f'{{"\u00e9":{entry("U8", "[4]", "[0,4]")},"e\u0301":{entry("U8", "[4]", "[4,8]")}}}',
        b"12345678",
    ),
    "case twins": (f'{{"A":{entry("U8", "[4]", "[0,4]")},"a":{entry("U8", "[4]", "[4,8]")}}}', b"12345678"),
    "escaped field": ('{"a":{"d\\u0074ype":"F32","shape":[2],"data_offsets":[0,8]}}', b"12345678"),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_accepted(case):
    header, data = ACCEPTED[case]
    assert assert_not_laxer(file_bytes(header, data))


REJECTED = {
    "not an object": ("[]", b"", "begin with"),
    "empty header": ("", b"", "begin with"),
    "leading space": (" {}", b"", "begin with"),
    "byte order mark": (b"\xef\xbb\xbf{}", b"", "begin with"),
    "not UTF-8": (b'{"\xff":1}', b"", "not UTF-8"),
    "UTF-8 surrogate": (b'{"\xed\xa0\x80":1}', b"", "not UTF-8"),
    "not JSON": ("{nonsense}", b"", "expected a string"),
    "cut short": ('{"a":{"dtype":"F32"', b"", "not valid at character"),
    "trailing text": ("{}x", b"", "something follows"),
    "trailing newline": ("{}\n", b"", "something follows"),
    "trailing NUL": ("{}\0", b"", "something follows"),
    "trailing comma": (f'{{"a":{entry()},}}', b"12345678", "expected a string"),
    "deep": ('{"a":' + "[" * 100_000, b"", "not valid"),
    "deep object": ('{"a":' * 100_000, b"", "unknown field 'a'"),
    "lone surrogate": (f'{{"\\ud800":{entry()}}}', b"12345678", "malformed string"),
    "duplicate, same offsets": (f'{{"a":{entry()},"a":{entry("I32")}}}', b"12345678", "duplicate name"),
    "duplicate by escape": (f'{{"a":{entry()},"\\u0061":{entry("I32")}}}', b"12345678", "duplicate name"),
    "duplicate field": (
        '{"a":{"dtype":"F32","dtype":"I32","shape":[2],"data_offsets":[0,8]}}',
        b"12345678",
        "duplicate field 'dtype'",
    ),
    "two __metadata__": ('{"__metadata__":{},"__metadata__":{}}', b"", "duplicate key '__metadata__'"),
    "duplicate in metadata": ('{"__metadata__":{"a":"1","a":"2"}}', b"", "duplicate key 'a' in __metadata__"),
    "metadata not strings": ('{"__metadata__":{"a":1}}', b"", "expected a string"),
    "metadata null": ('{"__metadata__":null}', b"", "metadata maps strings"),
    "unknown field": (
        '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"layout":"sparse"}}',
        b"12345678",
        "unknown field 'layout'",
    ),
    "missing field": ('{"a":{"dtype":"F32","shape":[2]}}', b"", "field 'data_offsets' is missing"),
    "NUL in a name": (f'{{"a\\u0000":{entry()}}}', b"12345678", "control character"),
    "newline in a name": (f'{{"a\\n":{entry()}}}', b"12345678", "control character"),
    "delete in a name": (f'{{"a\x7f":{entry()}}}', b"12345678", "control character"),
    "overlap": (
        f'{{"a":{entry()},"b":{entry("F32", "[1]", "[4,8]")}}}',
        b"12345678",
        "overlaps another tensor; expected data at 8",
    ),
    "hole": (f'{{"a":{entry("U8", "[2]", "[0,2]")},"b":{entry("U8", "[5]", "[3,8]")}}}', b"12345678", "leaves a hole"),
    "hole at the start": (f'{{"a":{entry("U8", "[7]", "[1,8]")}}}', b"12345678", "leaves a hole"),
    "bytes at the end": (f'{{"a":{entry()}}}', b"123456789", "bytes after the last tensor; expected 8 bytes"),
    "truncated": (f'{{"a":{entry()}}}', b"1234567", "past the end of the file"),
    "empty tensor inside another": (
        f'{{"a":{entry()},"z":{entry("F32", "[0]", "[2,2]")}}}',
        b"12345678",
        "overlaps another tensor",
    ),
    "backwards": (f'{{"a":{entry("F32", "[2]", "[8,0]")}}}', b"12345678", "run backwards"),
    "negative": (f'{{"a":{entry("F32", "[-2]")}}}', b"12345678", "bad shape"),
    "negative zero": (f'{{"a":{entry("F32", "[2]", "[-0,8]")}}}', b"12345678", "bad data_offsets"),
    "float": (f'{{"a":{entry("F32", "[2.0]")}}}', b"12345678", "bad shape"),
    "exponent": (f'{{"a":{entry("F32", "[2]", "[0,8e0]")}}}', b"12345678", "bad data_offsets"),
    "string": (
        f'{{"a":{entry("F32", "[2]", chr(91) + "0," + chr(34) + "8" + chr(34) + "]")}}}',
        b"12345678",
        "bad data_offsets",
    ),
    "leading zero": (f'{{"a":{entry("F32", "[02]")}}}', b"12345678", "bad shape"),
    "three offsets": (f'{{"a":{entry("F32", "[2]", "[0,4,8]")}}}', b"12345678", "two integers"),
    "offset over 2^53": (
        f'{{"a":{entry("F32", "[2]", "[9007199254740993,9007199254741001]")}}}',
        b"12345678",
        "leaves a hole",
    ),
    "offset over 2^64": (f'{{"a":{entry("F32", "[2]", "[0,18446744073709551624]")}}}', b"12345678", "too large"),
    "offset of 400 digits": (
        f'{{"a":{entry("F32", "[2]", "[0," + "9" * 400 + "]")}}}',
        b"12345678",
        "bad data_offsets",
    ),
    "shape overflow": (f'{{"a":{entry("F32", "[4294967296,4294967296]", "[0,0]")}}}', b"", "too large"),
    "shape overflow with a zero": (f'{{"a":{entry("F32", "[4294967296,4294967296,0]", "[0,0]")}}}', b"", "too large"),
    "unknown dtype": (f'{{"a":{entry("F128")}}}', b"12345678", "unknown dtype"),
    "lower-case dtype": (f'{{"a":{entry("f32")}}}', b"12345678", "unknown dtype"),
    "torch's name of a dtype": (f'{{"a":{entry("float32")}}}', b"12345678", "unknown dtype"),
    "F4": (f'{{"a":{entry("F4", "[16]")}}}', b"12345678", "F4 is not supported yet"),
    "F4, odd last dimension": (f'{{"a":{entry("F4", "[3]", "[0,2]")}}}', b"12", "F4 is not supported yet"),
    "F6": (f'{{"a":{entry("F6_E2M3", "[4]", "[0,3]")}}}', b"123", "F6_E2M3 is not supported yet"),
    "size mismatch": (f'{{"a":{entry("F32", "[3]")}}}', b"12345678", "expected 12 bytes for F32 [3]; got 8"),
    "rank 65": (f'{{"a":{entry("F64", "[" + ",".join("1" * 65) + "]")}}}', b"12345678", "bad shape"),
}


@pytest.mark.parametrize("case", REJECTED)
def test_rejected(case, tmp_path):
    header, data, message = REJECTED[case]
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_bytes(header, data))
    with pytest.raises(FormatError) as caught:
        inspect(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    assert caught.value.file == str(path)


def test_errors_name_the_tensor():
    with pytest.raises(FormatError) as caught:
        parse_header(f'{{"model.norm.weight":{entry("F32", "[3]")}}}'.encode(), 8, file="f")
    assert caught.value.tensor == "model.norm.weight"
    assert str(caught.value) == (
        "f: tensor 'model.norm.weight': not a valid safetensors file: size does not match shape and dtype; "
        "expected 12 bytes for F32 [3]; got 8"
    )


@pytest.mark.parametrize("size", range(8))
def test_files_shorter_than_a_length(size, tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"\0" * size)
    with pytest.raises(FormatError, match="file too short for a safetensors header; expected at least 8 bytes; got"):
        inspect(path)


@pytest.mark.parametrize("length", [3, 100_000_000, 100_000_001, 2**63, 2**64 - 1])
def test_bad_lengths_take_no_memory(length, tmp_path):
    path = tmp_path / "x"
    path.write_bytes(length.to_bytes(8, "little") + b"{}")
    tracemalloc.start()
    with pytest.raises(FormatError, match=r"header length over the limit|header longer than the file"):
        inspect(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000


@pytest.mark.parametrize("unit", ["[],", "{}", '"a":{},', "0,", '"",', " ", "0 ,", "\\\\", '"'])
@pytest.mark.parametrize(
    "start", ['{"a":{"dtype":"F32","shape":[', '{"a":{"dtype":"F32","shape":[1', "{", '{"a', '{"__metadata__":{']
)
def test_large_hostile_headers_stop_early(unit, start, tmp_path):
    path = tmp_path / "x"
    body = start.encode() + unit.encode() * (2_000_000 // len(unit))
    path.write_bytes(file_bytes(body))
    begin = time.process_time()
    with pytest.raises(FormatError):
        inspect(path)
    assert time.process_time() - begin < 1
    tracemalloc.start()
    with pytest.raises(FormatError):
        inspect(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * len(body)


def test_many_tensors():
    entries = layout((f"model.layers.{i}.weight", dtype_of("BF16"), (2, 3)) for i in range(20_000))
    raw = build_header(entries)
    assert parse_header(raw[8:], 20_000 * 12)[1] == entries


def test_only_regular_files(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "socket"))
        (tmp_path / "loop").symlink_to("loop")
        (tmp_path / "dangling").symlink_to("nowhere")
        for name, message in {
            "fifo": "not a regular file",
            "socket": "not a regular file",
            ".": "not a regular file",
            "/dev/zero": "not a regular file",
            "loop": "cannot open: Too many levels of symbolic links",
            "dangling": "cannot open: No such file or directory",
            "absent": "cannot open: No such file or directory",
        }.items():
            with pytest.raises(InputError, match=message):
                inspect(tmp_path / name)
    (tmp_path / "blob").write_bytes(file_bytes("{}"))
    (tmp_path / "link").symlink_to("blob")
    assert inspect(tmp_path / "link").size == 10


def test_identity(tmp_path):
    import hashlib

    path = tmp_path / "x.safetensors"
    blob = file_bytes(f'{{"__metadata__":{{"format":"pt"}},"a":{entry()}}}  ', b"12345678")
    path.write_bytes(blob)
    header = inspect(path)
    info = path.stat()
    assert (header.size, header.mtime_ns, header.inode) == (info.st_size, info.st_mtime_ns, info.st_ino)
    assert header.sha256 == hashlib.sha256(blob[:-8]).hexdigest()
    assert header.data_start == len(blob) - 8
    assert read_header(path) == (len(blob) - 16, {"format": "pt"}, header.entries)


def reference_writer(tensors, metadata):
    """The bytes that the safetensors package writes for {name: (dtype, shape, data)}."""
    buffers = {n: ctypes.create_string_buffer(d, max(len(d), 1)) for n, (_, _, d) in tensors.items()}
    specs = {
        n: safetensors.TensorSpec(
            dtype=dtype_of(t).torch, shape=list(s), data_ptr=ctypes.addressof(buffers[n]), data_len=len(d)
        )
        for n, (t, s, d) in tensors.items()
    }
    return safetensors.serialize(specs, metadata)


NAMES = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=12).filter(lambda n: n != "__metadata__")
TENSORS = st.dictionaries(
    NAMES,
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)),
    max_size=8,
).flatmap(
    lambda d: st.fixed_dictionaries(
        {
            n: st.tuples(st.just(t), st.just(s), st.binary(min_size=(k := size(t, s)), max_size=k))
            for n, (t, s) in d.items()
        }
    )
)


def size(dtype, shape):
    n = dtype_of(dtype).itemsize
    for s in shape:
        n *= s
    return n


@settings(max_examples=100, deadline=None)
@given(TENSORS, st.sampled_from([None, {}, {"format": "pt"}, {"é\n": '"\\\x7f'}]))
def test_writes_what_the_reference_writes(tensors, metadata):
    entries = layout((n, dtype_of(t), tuple(s)) for n, (t, s, _) in tensors.items())
    blob = build_header(entries, metadata) + b"".join(tensors[n][2] for n in entries)
    if tensors or metadata != {}:  # for these two 0.8.0 writes `{},"__metadata__":{}}`, which nothing can read
        assert blob == reference_writer(tensors, metadata)
    assert assert_not_laxer(blob)


def test_every_dtype_is_read_and_written_alike():
    tensors = {f"x{i}": (t, [3], bytes(range(size(t, [3])))) for i, t in enumerate(DTYPES)}
    blob = reference_writer(tensors, {"format": "pt"})
    assert assert_not_laxer(blob)
    entries = layout((n, dtype_of(t), tuple(s)) for n, (t, s, _) in tensors.items())
    assert blob.startswith(build_header(entries, {"format": "pt"}))


def test_differential_fuzzing():
    """Random damage to valid files: no crash, and never laxer than the reference."""
    rng = random.Random(7)
    seeds = [file_bytes(h, d) for h, d in ACCEPTED.values() if len(h) < 2000]
    seeds += [file_bytes(h, d) for h, d, _ in REJECTED.values() if len(h) < 2000]
    tokens = [
        b'"',
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b"0",
        b"1",
        b"8",
        b"-",
        b".",
        b"e",
        b" ",
        b"\\u0000",
        b"\n",
        b'"a"',
    ]
    tokens += [
        b'"dtype"',
        b'"shape"',
        b'"data_offsets"',
        b"F32",
        b"U8",
        b"I64",
        b"__metadata__",
        b"\xff",
        b"null",
        b"\0",
    ]
    accepted = 0
    for _ in range(20_000):
        blob = bytearray(rng.choice(seeds))
        n = int.from_bytes(blob[:8], "little")
        header, data = blob[8 : 8 + n], blob[8 + n :]
        for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
            at = rng.randrange(len(header) + 1)
            kind = rng.randrange(5)
            if kind == 0 and header:
                header[at % len(header)] ^= 1 << rng.randrange(8)
            elif kind == 1:
                header[at:at] = rng.choice(tokens)
            elif kind == 2:
                del header[at : at + rng.randrange(1, 6)]
            elif kind == 3:
                other = rng.choice(seeds)
                start = rng.randrange(8, len(other) + 1)
                header[at:at] = other[start : start + rng.randrange(40)]
            else:
                data = data[: rng.randrange(len(data) + 1)] if rng.random() < 0.5 else data + b"x"
        length = len(header) if rng.random() < 0.95 else rng.randrange(2 * len(header) + 2)
        accepted += assert_not_laxer(length.to_bytes(8, "little") + bytes(header) + bytes(data))
    assert accepted > 250


@settings(max_examples=150, deadline=None)
@given(
    st.recursive(
        st.none() | st.integers() | st.floats() | st.text(max_size=3),
        lambda c: (
            st.lists(c, max_size=3)
            | st.dictionaries(st.sampled_from(["a", "dtype", "shape", "data_offsets", "__metadata__"]), c, max_size=4)
        ),
        max_leaves=12,
    )
)
def test_any_json(value):
    assert_not_laxer(file_bytes(json.dumps({"a": value})))


def test_errors_survive_a_process_boundary(tmp_path):
    path: Path = tmp_path / "x"
    path.write_bytes(file_bytes("{}x"))
    with pytest.raises(FormatError) as caught:
        inspect(path)
    assert str(MergeError.from_dict(caught.value.to_dict())) == str(caught.value)
