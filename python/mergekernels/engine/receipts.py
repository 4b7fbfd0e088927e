"""Receipts: the durable proof that a unit is done, and the check of one that an earlier attempt left."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .fileops import read_small, write_small
from .identity import canonical_json
from .io import Io
from .staging import Staging

__all__ = ["Receipt", "TensorRecord", "read_receipt", "write_receipt"]

_FORMAT = "mergekernels.receipt/1"


@dataclass(frozen=True)
class TensorRecord:
    """What is published about one tensor. statistics : of interest to reports, see docs/engine.md. warnings : about
    its data.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str
    statistics: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Receipt:
    """One finished unit. sha256 : the file's digest, over header and tensor digests. tensors : in order of offset."""

    plan_hash: str
    file: str
    size: int
    sha256: str
    tensors: tuple[TensorRecord, ...]


def write_receipt(io: Io, staging: Staging, receipt: Receipt) -> None:
    """Writes it durably: temporary, fsync, rename, fsync of the folder."""
    data = {"format": _FORMAT, **asdict(receipt)}
    body = canonical_json(data)
    text = canonical_json({"receipt": data, "sha256": hashlib.sha256(body).hexdigest()})
    name = receipt.file + ".json"
    write_small(io, staging.temporary(name), staging.receipts / name, text)


def read_receipt(io: Io, staging: Staging, file: str) -> Receipt | None:
    """The receipt of an output file, None if there is none that is whole and of this plan."""
    try:
        outer = json.loads(read_small(io, staging.receipts / (file + ".json")))
        data = outer["receipt"]
        if hashlib.sha256(canonical_json(data)).hexdigest() != outer["sha256"] or data.pop("format") != _FORMAT:
            return None
        tensors = tuple(
            TensorRecord(**{**t, "shape": tuple(t["shape"]), "warnings": tuple(t["warnings"])})
            for t in data.pop("tensors")
        )
        receipt = Receipt(tensors=tensors, **data)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return receipt if receipt.plan_hash == staging.plan_hash and receipt.file == file else None
