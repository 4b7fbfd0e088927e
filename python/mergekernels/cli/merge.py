"""The commands `run` and `plan`."""

from __future__ import annotations

from typing import Any

from .guard import guarded
from .output import Output
from .reported import reported

__all__ = ["plan_command", "run_command"]


def run_command(
    recipe: str,
    out: str,
    *,
    backend: str | None,
    device: str,
    threads: int | None,
    memory: str | None,
    seed: int | None,
    shard_size: str,
    overwrite: bool,
    lenient: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """See `mergekernels run --help`."""
    output = Output("run", as_json=as_json, quiet=quiet)

    def work() -> int:
        from ..engine.memory import parse_size
        from ..engine.run import run
        from ..report.run import run_text

        def call(progress: Any) -> Any:
            return run(
                recipe,
                out,
                backend=backend,
                device=device,
                threads=threads,
                memory=memory,
                seed=seed,
                overwrite=overwrite,
                lenient=lenient,
                shard_size=parse_size(shard_size),
                progress=progress,
            )

        return reported(output, call, run_text)

    guarded(output, work, interrupted="Finished files are kept beside OUT; the same command resumes.")


def plan_command(
    recipe: str,
    *,
    out: str | None,
    backend: str | None,
    device: str,
    threads: int | None,
    memory: str | None,
    seed: int | None,
    shard_size: str,
    lenient: bool,
    as_json: bool,
) -> None:
    """See `mergekernels plan --help`."""
    output = Output("plan", as_json=as_json)

    def work() -> int:
        from ..engine.memory import parse_size
        from ..engine.run import plan
        from ..report.plan import plan_text

        made = plan(
            recipe,
            memory=memory,
            threads=threads,
            seed=seed,
            backend=backend,
            device=device,
            lenient=lenient,
            out=out,
            shard_size=parse_size(shard_size),
        ).to_dict()
        output.result(made, plan_text(made))
        return 0

    guarded(output, work)
