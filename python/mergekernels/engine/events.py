"""What a run tells its caller: progress while it goes on, a report at the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

__all__ = ["Progress", "ProgressSink", "RunReport"]


@dataclass(frozen=True)
class Progress:
    """One snapshot of a run, at most ten a second, always from the thread that called `run`.

    phase : "resume" re-reads what an earlier attempt left, "measure" sweeps the checkpoint for statistics over the
        whole model, "merge" reads and writes, "publish" syncs and renames.
    done, total : bytes of input read and to be read in this phase (an estimate where a method may need a further
        sweep; done never exceeds total).
    written : bytes of output written so far. tensor : name of an output tensor in work, "" if none.
    """

    phase: Literal["resume", "measure", "merge", "publish"]
    done: int
    total: int
    written: int = 0
    tensor: str = ""


ProgressSink = Callable[[Progress], None]


@dataclass(frozen=True)
class RunReport:
    """What a finished run did.

    out : the published folder. plan_hash, checkpoint_sha256 : hex digests, as in its manifest.
    bytes_read : input bytes read, re-reads included. bytes_written : bytes of the published files written by this
        process.
    seconds : wall time. peak_tensor_memory : most bytes of tiles and statistics held at once. memory : the budget.
    units, resumed_units : output files, and how many of them an earlier attempt had finished.
    already_done : OUT carried this plan before; nothing was merged.
    """

    out: str
    plan_hash: str
    checkpoint_sha256: str
    bytes_read: int
    bytes_written: int
    seconds: float
    peak_tensor_memory: int
    memory: int
    threads: int
    backend: str
    device: str
    units: int
    resumed_units: int
    already_done: bool
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable form."""
        return asdict(self)
