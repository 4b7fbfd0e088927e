"""The documented encoding of digests, written out byte by byte."""

from __future__ import annotations

import hashlib
import struct

from mergekernels.engine.digests import checkpoint_sha256, file_sha256

A, B = hashlib.sha256(b"a").hexdigest(), hashlib.sha256(b"b").hexdigest()


def test_checkpoint_records_are_length_prefixed_and_ordered_by_bytes() -> None:
    """ "Z" comes before "a", and the shape () has no dimensions."""
    first = struct.pack("<Q", 1) + b"Z" + struct.pack("<Q", 3) + b"F32" + struct.pack("<Q", 0) + bytes.fromhex(B)
    second = struct.pack("<Q", 2) + "é".encode() + struct.pack("<Q", 4) + b"BF16"
    second += struct.pack("<QQQ", 2, 3, 5) + bytes.fromhex(A)
    want = hashlib.sha256(first + second).hexdigest()
    records = [("é", "BF16", (3, 5), A), ("Z", "F32", (), B)]
    assert checkpoint_sha256(records) == checkpoint_sha256(records[::-1]) == want


def test_names_and_dtypes_cannot_run_into_each_other() -> None:
    """Without the lengths these two would have one encoding."""
    assert checkpoint_sha256([("xF", "32", (), A)]) != checkpoint_sha256([("x", "F32", (), A)])


def test_file_digest_is_over_header_and_tensor_digests() -> None:
    header = b"\x08\0\0\0\0\0\0\0{}      "
    assert file_sha256(header, [B, A]) == hashlib.sha256(header + bytes.fromhex(B + A)).hexdigest()
