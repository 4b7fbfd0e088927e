"""What a plan is: everything that determines the published bytes, as data, and its digest.

Backend, threads, memory and estimates stay out, because they change no byte; for methods of tier T2, whose last bits
depend on where they are computed, the kind of device is in.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .._version import __version__
from .adapted import AdaptedCheckpoint
from .layout import OutputFile
from .resolved import ResolvedMerge, Source
from .smallfiles import SmallFile

__all__ = ["NUMERIC_POLICY", "canonical_json", "input_identities", "plan_hash", "real_path", "versions"]

NUMERIC_POLICY = 1
"""Version of the arithmetic: raised when a release gives other bits for the same recipe."""


def canonical_json(data: Any) -> bytes:
    """JSON with sorted keys and no spaces: equal data, equal bytes."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def versions() -> dict[str, Any]:
    """The versions that a manifest states."""
    return {"mergekernels": __version__, "numeric_policy": NUMERIC_POLICY}


def input_identities(merge: ResolvedMerge) -> list[dict[str, Any]]:
    """Per input: label as written, real absolute path, and name, size, modification time (ns) and header digest of
    each file; of a model with an adapter also what is used of that. It is the same from every working directory.
    """
    return [
        {
            "label": c.label or c.path.name,
            "path": real_path(c.path),
            "files": [
                {"name": f.path.name, "size": f.size, "mtime_ns": f.mtime_ns, "header_sha256": f.header_sha256}
                for f in c.files
            ],
            **({"adapter": c.identity} if isinstance(c, AdaptedCheckpoint) else {}),
        }
        for c in merge.inputs
    ]


def real_path(path: Path) -> str:
    """The absolute path without links. A single file keeps its name: in a cache it may be a link to a bare digest."""
    if path.is_dir():
        return os.path.realpath(path)
    return os.path.join(os.path.realpath(path.parent), path.name)


def _source(source: Source | None) -> list[Any] | None:
    return None if source is None else [source.input, source.tensor]


def _params(params: Mapping[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in params.items()}


def plan_hash(
    merge: ResolvedMerge, files: Sequence[OutputFile], small: Sequence[SmallFile], computed: str | None = None
) -> str:
    """The digest of a plan: resolved recipe, numeric policy, identity of every input, seed, layout, small files.

    computed : the kind of device, for a method whose bits depend on it (T2); None for the others.
    """
    tensors = [
        [
            t.name,
            t.dtype.name,
            list(t.shape),
            t.action,
            [_source(s) for s in t.models],
            _source(t.base),
            None if t.cast is None else t.cast.name,
            _params(t.params),
            t.companions,
            [_source(s) for s in t.marks],
            t.block,
        ]
        for t in merge.tensors
    ]
    data: dict[str, Any] = {
        "format": "mergekernels.plan/1",
        "versions": versions(),
        "method": merge.method,
        "then": merge.then,
        "dialect": merge.dialect,
        "nan": merge.nan,
        "seed": merge.seed,
        "inputs": input_identities(merge),
        "tensors": tensors,
        "aliases": dict(merge.aliases),
        "recipe": merge.recipe,
        "warnings": list(merge.warnings),
        "files": [[f.name, f.size, f.header_sha256] for f in files],
        "small": [[s.name, s.sha256] for s in small],
    }
    if merge.output is not None:
        data["output"] = asdict(merge.output)
    if computed is not None:
        data["computed"] = computed
    return hashlib.sha256(canonical_json(data)).hexdigest()
