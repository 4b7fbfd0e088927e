"""The plan: what is read, what is written, where, and what it costs. Immutable and hashed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .resolved import ResolvedMerge

__all__ = ["Plan"]


@dataclass(frozen=True)
class Plan:
    """A merge laid out. `to_dict` is the dry run that `mergekernels plan` prints.

    Keys of `to_dict()`: plan_hash, method, dialect, seed, nan, backend, device, threads, memory (bytes), tile_bytes,
    inputs [{label, path, files, tensors, bytes}], output {files: [{name, bytes, tensors}], tensors, bytes, buffers, copies, aliases},
    scope ("tensor" or "model"), passes {reads, sampled, writes}, bytes_read, bytes_written, peak_memory,
    disk {path, needed, free}, time {seconds, read_rate, write_rate, assumed: true},
    parameters [{params, tensors: count, examples: [names]}], state ("absent" | "done" | "resumable" | "exists"), warnings [str].
    """

    merge: ResolvedMerge
    hash: str

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data."""
        raise NotImplementedError
