"""The command `lora apply`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .guard import guarded
from .lora_merge import numbers
from .output import Output
from .reported import reported

__all__ = ["apply_command"]


def apply_command(
    base: str,
    adapters: Sequence[str],
    out: str,
    *,
    weights: str | None,
    out_dtype: str | None,
    backend: str | None,
    device: str,
    threads: int | None,
    memory: str | None,
    shard_size: str,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """See `mergekernels lora apply --help`."""
    output = Output("lora apply", as_json=as_json, quiet=quiet)

    def work() -> int:
        from ..adapters.apply import apply_adapters
        from ..engine.memory import parse_size
        from ..report.run import run_text

        given = None if weights is None else numbers(weights)

        def call(progress: Any) -> Any:
            return apply_adapters(
                base,
                list(adapters),
                out,
                weights=given,
                out_dtype=out_dtype,
                backend=backend,
                device=device,
                threads=threads,
                memory=memory,
                shard_size=parse_size(shard_size),
                overwrite=overwrite,
                progress=progress,
            )

        return reported(output, call, run_text)

    guarded(output, work, interrupted="Finished files are kept beside OUT; the same command resumes.")
