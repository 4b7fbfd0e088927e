"""The engine's two calls: `plan` looks, `run` does."""

from __future__ import annotations

import time
from dataclasses import replace
from os import PathLike

from .driver import execute
from .events import Progress, ProgressSink, RunReport
from .io import Io
from .plan import Plan, make_plan
from .resolved import ResolvedMerge

__all__ = ["SHARD_SIZE", "Plan", "Progress", "ProgressSink", "RunReport", "plan", "run"]

SHARD_SIZE = 5_000_000_000
"""Default bound, in bytes of tensor data, on one output file."""


def plan(
    recipe: str | PathLike[str] | ResolvedMerge,
    *,
    memory: str | int | None = None,
    threads: int | None = None,
    seed: int | None = None,
    backend: str | None = None,
    device: str = "cpu",
    lenient: bool = False,
    out: str | PathLike[str] | None = None,
    shard_size: int = SHARD_SIZE,
) -> Plan:
    """Reads the recipe and all headers, refuses what can be refused, and says what `run` would do. Writes nothing.

    recipe : path of a recipe, or a merge that is already resolved.
    memory : bound on tensor memory, bytes or "2GiB"; default a quarter of what is available, at least 512 MiB.
    threads : workers; default MERGEKERNELS_NUM_THREADS, else the cores this process may use.
    seed : replaces the recipe's seed. backend : "auto" or a backend's name. device : "cpu" or "cuda".
    lenient : unknown recipe keys become warnings. out : where the result would go, checked as `run` would.
    shard_size : bytes of tensor data in one output file.

    Raises
    ------
    RecipeError, FormatError, InputError, PlanError, ArgumentError, BackendError, OutputError
    """
    return make_plan(
        _resolved(recipe, seed, lenient),
        memory=memory,
        threads=threads,
        backend=backend,
        device=device,
        out=out,
        shard_size=shard_size,
        io=Io(),
    )


def run(
    recipe: str | PathLike[str] | ResolvedMerge,
    out: str | PathLike[str],
    *,
    backend: str | None = None,
    device: str = "cpu",
    threads: int | None = None,
    memory: str | int | None = None,
    seed: int | None = None,
    overwrite: bool = False,
    lenient: bool = False,
    shard_size: int = SHARD_SIZE,
    progress: ProgressSink | None = None,
) -> RunReport:
    """Merges as `recipe` says and publishes the checkpoint `out`, which is absent until it is complete.

    A run that was killed is resumed by the same call and ends with the same bytes. See `plan` for the arguments.
    overwrite : replace `out` (swapped atomically) and drop another plan's staging.
    progress : called with `Progress` from this thread; what it raises is ignored, except KeyboardInterrupt and
        SystemExit.

    An exception raised in the calling thread (Ctrl-C, a signal handler's SystemExit) stops the workers within a tile,
    leaves the staging resumable, and propagates.

    Raises
    ------
    RecipeError, FormatError, InputError, PlanError, ArgumentError, BackendError, DataError, OutputError
    """
    start = time.monotonic()
    made = plan(
        recipe,
        memory=memory,
        threads=threads,
        seed=seed,
        backend=backend,
        device=device,
        lenient=lenient,
        out=out,
        shard_size=shard_size,
    )
    if made.merge.output is not None:
        from .adapterrun import execute_adapter

        return execute_adapter(made, overwrite=overwrite, progress=progress, io=Io(), start=start)
    return execute(made, overwrite=overwrite, progress=progress, io=Io(), start=start)


def _resolved(recipe: str | PathLike[str] | ResolvedMerge, seed: int | None, lenient: bool) -> ResolvedMerge:
    if isinstance(recipe, ResolvedMerge):
        return recipe if seed is None else replace(recipe, seed=seed)
    from .recipe import load_recipe, resolve

    return resolve(load_recipe(recipe, lenient=lenient, collect=True), seed=seed)
