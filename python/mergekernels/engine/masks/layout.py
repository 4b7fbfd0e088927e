"""The folder that `masks compress` writes.

`vector.safetensors` holds, for every merged tensor, the vector v under the tensor's name and in its shape.
`mask-00000.safetensors` and so on hold, one file per expert, a tensor of bytes (U8) of ceil(n / 8) elements under the
same names: the bit of the element with row-major index g is bit g % 8 of byte g // 8; bits past the end are 0.
`masks.json` names experts, scales, the base, and the SHA-256 of every tensor. An expert is
base + scale * v where its bit is set, and the base elsewhere; in float32 (float64 if base or vector is), rounded once.

Keys of masks.json: format; versions {mergekernels, numeric_policy}; kind (the method); dialect; recipe; base {label,
path, files}; vector {file, size, sha256}; experts [{name, path, file, size, sha256, scale}]; tensors [{name, shape,
dtype, restored (dtype of each expert), base_sha256, vector_sha256, mask_sha256 (per expert)}] in order of name;
masks_sha256, the SHA-256 of the file with this value empty.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from ...errors import InputError
from ...tensors import dtype_of

__all__ = ["FORMAT", "INDEX", "VECTOR", "Masks", "index_bytes", "mask_name", "read_masks"]

FORMAT = "mergekernels.masks/1"
INDEX = "masks.json"
VECTOR = "vector.safetensors"


def mask_name(expert: int) -> str:
    """The file of an expert's mask."""
    return f"mask-{expert:05d}.safetensors"


@dataclass(frozen=True)
class Masks:
    """A folder of masks, read and checked against itself; tensor data is not looked at. data : see the module."""

    root: Path
    data: Mapping[str, Any]

    @property
    def experts(self) -> list[str]:
        """Their names."""
        return [e["name"] for e in self.data["experts"]]

    def expert(self, name: str) -> int:
        """The number of an expert, by name, by the last part of its name, or by number.

        Raises
        ------
        InputError : there is none, or several.
        """
        names = self.experts
        found = [i for i, n in enumerate(names) if n == name]
        found = found or [i for i, n in enumerate(names) if Path(n).name == Path(name).name]
        if not found and name.isdecimal() and int(name) < len(names):
            found = [int(name)]
        if len(found) != 1:
            raise InputError(
                f"{'no' if not found else 'more than one'} expert is called '{name}'",
                code="masks.expert",
                file=str(self.root),
                expected="one of " + ", ".join(names) + f", or a number from 0 to {len(names) - 1}",
                got=repr(name),
            )
        return found[0]


def index_bytes(data: dict[str, Any]) -> bytes:
    """masks.json with its own digest, which is its last value."""
    text = (json.dumps({**data, "masks_sha256": ""}, indent=1, ensure_ascii=False) + "\n").encode()
    head, tail = text.rsplit(b'""', 1)
    return head + f'"{hashlib.sha256(text).hexdigest()}"'.encode() + tail


def read_masks(root: Path) -> Masks:
    """Reads masks.json.

    Raises
    ------
    InputError : it is not there, was changed, or its parts do not fit together.
    """
    path = root / INDEX
    try:
        text = path.read_bytes()
    except OSError as error:
        raise InputError(
            "no folder of masks",
            code="masks.missing",
            file=str(path),
            got=error.strerror,
            hint="Make one with `mergekernels masks compress`.",
        ) from error
    try:
        data = json.loads(text)
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']}")
        head, found, tail = text.rpartition(f'"{data["masks_sha256"]}"'.encode())
        if not found or hashlib.sha256(head + b'""' + tail).hexdigest() != data["masks_sha256"]:
            raise ValueError("its digest is another")
        _check(path, data)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise InputError(
            f"the index of the masks is damaged: {error}", code="masks.index", file=str(path), expected=FORMAT
        ) from error
    return Masks(root, data)


def _check(path: Path, data: Mapping[str, Any]) -> None:
    count = len(data["experts"])
    for tensor in data["tensors"]:
        masks = len(tensor["mask_sha256"])
        if masks != count or len(tensor["restored"]) != count:
            raise InputError(
                f"there are {'more masks than models' if masks > count else 'other numbers of masks and models'}",
                code="masks.count",
                tensor=tensor["name"],
                file=str(path),
                expected=f"{count} masks, one per model",
                got=str(masks),
            )
        if not all(type(size) is int and size >= 0 for size in tensor["shape"]):
            raise ValueError(f"shape {tensor['shape']}")
        if not all((found := dtype_of(d)) and found.is_float for d in (tensor["dtype"], *tensor["restored"])):
            raise ValueError("unknown dtype")
        digests = (tensor["base_sha256"], tensor["vector_sha256"], *tensor["mask_sha256"])
        if not all(isinstance(text, str) for text in (tensor["name"], *digests)):
            raise TypeError("tensors")
    for expert in data["experts"]:
        if type(expert["scale"]) not in (int, float) or not isfinite(expert["scale"]):
            raise ValueError(f"scale {expert['scale']}")
        if not isinstance(expert["name"], str):
            raise TypeError("experts")
    if not all(isinstance(data["base"][key], str) for key in ("label", "path")):
        raise TypeError("base")
