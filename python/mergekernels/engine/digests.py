"""Digests of outputs. SHA-256 everywhere, and no second hash.

A tensor's digest is over its bytes. `checkpoint_sha256` is over one record per tensor, in order of name (UTF-8 bytes):
u64 length and bytes of the name, u64 length and bytes of the dtype's safetensors name, u64 number of dimensions and
one u64 each, then the 32 bytes of the tensor's digest; all integers little endian. It does not depend on the sharding.
A file's digest is over its header (8 length bytes and JSON) followed by the digests of its tensors in order of offset.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

__all__ = ["checkpoint_sha256", "file_sha256"]


def _u64(value: int) -> bytes:
    return value.to_bytes(8, "little")


def checkpoint_sha256(tensors: Iterable[tuple[str, str, tuple[int, ...], str]]) -> str:
    """The digest of a checkpoint from (name, safetensors dtype, shape, hex digest) of each tensor, in any order."""
    total = hashlib.sha256()
    for name, dtype, shape, digest in sorted(tensors, key=lambda t: t[0].encode()):
        raw = name.encode()
        total.update(_u64(len(raw)) + raw + _u64(len(dtype)) + dtype.encode())
        total.update(_u64(len(shape)) + b"".join(map(_u64, shape)) + bytes.fromhex(digest))
    return total.hexdigest()


def file_sha256(header: bytes, digests: Iterable[str]) -> str:
    """The digest of a safetensors file from its header bytes and its tensors' hex digests in order of offset."""
    total = hashlib.sha256(header)
    for digest in digests:
        total.update(bytes.fromhex(digest))
    return total.hexdigest()
