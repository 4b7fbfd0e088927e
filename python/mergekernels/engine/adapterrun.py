"""One run from plan to adapter: merged task vectors, module by module, each cut to low rank as soon as it is there."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from .._version import __version__
from ..errors import InputError
from ..formats.checkpoint import Checkpoint
from ..formats.hub import looks_like_hub
from ..tensors import dtype_of
from .adapted import AdaptedCheckpoint
from .context import Context, Worker
from .events import Progress, ProgressSink, RunReport
from .factoring import Collector, Memory
from .fileops import fsync_dir, output_error, publish_swap
from .identity import input_identities
from .inputs import streams_of
from .io import Io
from .jobs import MergeJob
from .layout import PlacedTensor
from .matrixjob import MatrixJob, measure_model
from .plan import Plan
from .readahead import ReadAhead
from .resolved import ResolvedMerge
from .scheduler import Scheduler
from .staging import Staging
from .target import check_apart, refuse_to_replace
from .unit import Unit
from .waves import run_waves
from .writer import Target

__all__ = ["execute_adapter"]

_WEIGHTS = "adapter_model.safetensors"


def execute_adapter(plan: Plan, *, overwrite: bool, progress: ProgressSink | None, io: Io, start: float) -> RunReport:
    """Carries out a plan whose output is an adapter. OUT is absent or complete; a killed call starts again.

    Raises
    ------
    InputError, DataError, OutputError, BackendError.
    """
    assert plan.out is not None
    ctx = Context.of(plan, io)
    staging = Staging(io, plan.out, plan.hash)
    try:
        staging.enter(overwrite=overwrite)
        return _run(ctx, staging, overwrite, progress, start)
    except OSError as error:
        raise output_error("the output cannot be written", error.filename or staging.out, error) from error
    finally:
        ctx.inputs.close()
        staging.unlock()


def _run(ctx: Context, staging: Staging, overwrite: bool, progress: ProgressSink | None, start: float) -> RunReport:
    plan, io = ctx.plan, ctx.io
    workers = ctx.workers()
    scheduler: Scheduler[Worker] = Scheduler(workers, plan.budget.window, plan.budget.pool)

    def tell(phase: Any, done: int, total: int, name: str) -> None:
        if progress is not None:
            progress(Progress(phase, min(done, total), total, 0, name))

    def measured(done: int, total: int, name: str) -> None:
        tell("measure", done, total, name)

    whole = plan.specs.whole is not None
    state = measure_model(ctx, scheduler, measured) if whole else run_waves(ctx, staging, scheduler, measured)
    collector = Collector(ctx)
    total = plan.bytes_in
    order = plan.specs.members
    merge = plan.merge
    streams = (streams_of(merge.inputs, plan.specs.read_sources(i), ctx.inputs.first) for i in order)
    with ReadAhead(ctx.inputs, streams, scheduler.fail) as ahead:

        def jobs() -> Iterator[MergeJob | MatrixJob]:
            for index in order:
                tensor = merge.tensors[index]
                nbytes = tensor.dtype.itemsize
                for size in tensor.shape:
                    nbytes *= size
                # A method over matrices hands its result over in memory.
                memory = Memory(0 if whole else nbytes)
                placed = PlacedTensor(index, tensor.name, 0, nbytes)

                def done(unit: Unit, name: str = tensor.name, memory: Memory = memory) -> None:
                    collector.written(name, memory)
                    memory.data = bytearray()

                target = Target(cast(Unit, memory), placed, ahead.passed, lambda unit: None, done)
                if whole:
                    yield MatrixJob(ctx, target, state, collector.merged)
                else:
                    yield MergeJob(ctx, target, state)

        held = plan.survey.held
        scheduler.run(jobs(), lambda done, name: tell("merge", done, total, name), reserved=held)
    if not collector.factors:
        raise InputError("the merged task vector is zero in every module", code="output.zero", file=str(plan.out))
    tell("publish", 0, 0, "")
    _write(ctx, staging, collector)
    if overwrite:
        touched = check_apart(staging.out, merge, ())
        if touched is not None:
            raise touched
        if staging.out.exists():
            refuse_to_replace(staging.out)
    publish_swap(io, staging.tree, staging.out, staging.root / "replaced", replace=overwrite)
    staging.remove()
    fsync_dir(io, staging.out.parent)
    tiles = sum(len(w.tiles.buffers) * w.tiles.nbytes for w in workers)
    return RunReport(
        out=str(plan.out),
        plan_hash=plan.hash,
        checkpoint_sha256=hashlib.sha256((staging.out / _WEIGHTS).read_bytes()).hexdigest(),
        bytes_read=sum(w.bytes_read for w in workers),
        bytes_written=sum(p.stat().st_size for p in staging.out.iterdir()),
        seconds=time.monotonic() - start,
        peak_tensor_memory=tiles + scheduler.peak,
        memory=plan.budget.limit,
        threads=plan.budget.threads,
        backend=plan.backend,
        device=plan.device,
        units=1,
        resumed_units=0,
        already_done=False,
        warnings=(*plan.warnings, *sorted(ctx.warnings)),
    )


def _write(ctx: Context, staging: Staging, collector: Collector) -> None:
    """The adapter into the staging's tree, in order of module."""
    from ..formats.adapters import write_peft

    merge = ctx.plan.merge
    assert merge.output is not None
    dtype = dtype_of(merge.output.dtype)
    assert dtype is not None
    donor = merge.inputs[merge.donor]
    modules = {s: collector.factors[s] for s in sorted(collector.factors, key=lambda s: s.module)}
    report = {name: collector.report[name] for name in sorted(collector.report)}
    metadata = {
        "version": __version__,
        "plan_hash": ctx.plan.hash,
        "method": merge.method,
        "recipe": dict(merge.recipe),
        "inputs": input_identities(merge),
        "modules": report,
    }
    name, config = _inherited(merge, donor)
    shapes = {n: t.shape for n, t in donor.tensors.items()}
    write_peft(
        Path(staging.tree),
        modules,
        base_name=name,
        dtype=dtype.name,
        metadata=metadata,
        config=config,
        base=shapes,
        overwrite=True,
    )


def _inherited(merge: ResolvedMerge, donor: Checkpoint) -> tuple[str, dict[str, Any]]:
    """The name of the base, and the fields in which the configs of all adapters on it agree."""
    from ..adapters.result import agreed

    name, _, revision = donor.label.partition("@")
    if donor.path.parent.name != "snapshots" or not looks_like_hub(name):
        name, revision = donor.label, ""
    adapters = [c.adapter for c in merge.inputs if isinstance(c, AdaptedCheckpoint)]
    config = agreed(adapters) if adapters else {}
    if revision:
        config["revision"] = revision
    elif any(a.base != name for a in adapters):
        config.pop("revision", None)  # of what the adapters call their base
    return name, config
