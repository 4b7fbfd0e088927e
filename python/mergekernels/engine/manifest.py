"""merge_manifest.json: what was merged, how, and the digest of everything that was published.

Keys: format; versions {mergekernels, numeric_policy}; plan_hash; checkpoint_sha256; method, then, dialect, nan, seed;
recipe; inputs [{label, path, files [{name, size, mtime_ns, header_sha256}]}]; files [{name, size, sha256, tensors
[names in order of offset]}]; small_files [{name, size, sha256}]; tensors [{name, dtype, shape, sha256, file,
statistics}] in order of name; aliases; warnings; manifest_sha256. An input's label is its name in the recipe, its path
is absolute. The manifest holds no time, no host, no output path and nothing about threads, memory or backend, so equal
plans give equal bytes.

`manifest_sha256` is the SHA-256 of the file's bytes with the 64 digits of that value left out (the value is "").
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .digests import checkpoint_sha256
from .identity import input_identities, versions

if TYPE_CHECKING:
    from .plan import Plan
    from .receipts import Receipt

__all__ = ["FORMAT", "MANIFEST_NAME", "check_form", "manifest_bytes", "manifest_digest"]

MANIFEST_NAME = "merge_manifest.json"
FORMAT = "mergekernels.manifest/1"


def manifest_bytes(plan: Plan, receipts: Sequence[Receipt]) -> tuple[bytes, str]:
    """(the manifest, checkpoint_sha256). receipts : of all files of the plan, in any order."""
    by_file = {r.file: r for r in receipts}
    ordered = [by_file[f.name] for f in plan.files]
    records = [(r, receipt.file) for receipt in ordered for r in receipt.tensors]
    records.sort(key=lambda item: item[0].name.encode())
    digest = checkpoint_sha256((r.name, r.dtype, r.shape, r.sha256) for r, _ in records)
    merge = plan.merge
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "versions": versions(),
        "plan_hash": plan.hash,
        "checkpoint_sha256": digest,
        "method": merge.method,
        "then": [{name: dict(params)} for name, params in merge.then],
        "dialect": merge.dialect,
        "nan": merge.nan,
        "seed": merge.seed,
        "recipe": merge.recipe,
        "inputs": input_identities(merge),
        "files": [
            {"name": r.file, "size": r.size, "sha256": r.sha256, "tensors": [t.name for t in r.tensors]}
            for r in ordered
        ],
        "small_files": [{"name": s.name, "size": s.size, "sha256": s.sha256} for s in plan.small],
        "tensors": [
            {
                "name": r.name,
                "dtype": r.dtype,
                "shape": list(r.shape),
                "sha256": r.sha256,
                "file": file,
                "statistics": dict(sorted(r.statistics.items())),
            }
            for r, file in records
        ],
        "aliases": dict(merge.aliases),
        "warnings": [*plan.warnings, *(w for r, _ in records for w in r.warnings)],
        "manifest_sha256": "",
    }
    text = (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode()
    own = hashlib.sha256(text).hexdigest()
    # The field is last, so that its empty value is the last pair of quotes.
    head, tail = text.rsplit(b'""', 1)
    return head + f'"{own}"'.encode() + tail, digest


def manifest_digest(text: bytes) -> str:
    """What `manifest_sha256` must be for a manifest's bytes."""
    own = json.loads(text).get("manifest_sha256")
    head, found, tail = text.rpartition(f'"{own}"'.encode())
    return hashlib.sha256(head + b'""' + tail if found else text).hexdigest()


def check_form(manifest: Mapping[str, Any]) -> None:
    """Raises if a part that is compared lacks or has another type."""
    for key in ("files", "small_files"):
        for entry in manifest[key]:
            name = entry["name"]
            if not isinstance(name, str) or name != os.path.basename(name) or name in ("", ".", ".."):
                raise ValueError(f"{key}: not a file name: {name!r}")
            if not isinstance(entry["size"], int) or not isinstance(entry["sha256"], str):
                raise TypeError(f"{key}: {name}")
    for entry in manifest["files"]:
        if not all(isinstance(n, str) for n in entry["tensors"]):
            raise TypeError("files: tensors")
    for record in manifest["tensors"]:
        if not all(isinstance(record[k], str) for k in ("name", "dtype", "sha256", "file")):
            raise TypeError("tensors")
        if not all(isinstance(s, int) for s in record["shape"]):
            raise TypeError("tensors: shape")
    if not isinstance(manifest["checkpoint_sha256"], str):
        raise TypeError("checkpoint_sha256")
