"""One run from plan to adapter: merged task vectors, module by module, each cut to low rank as soon as it is there."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from .._methods.matrix import Merged
from .._version import __version__
from ..adapters.model import Factors, Site
from ..errors import InputError, MergeError
from ..formats.checkpoint import Checkpoint
from ..formats.hub import looks_like_hub
from ..tensors import F64, dtype_of
from .adapted import AdaptedCheckpoint, module_of
from .context import Context, Worker
from .events import Progress, ProgressSink, RunReport
from .fileops import fsync_dir, output_error, publish_swap
from .identity import input_identities
from .inputs import streams_of
from .io import Io
from .jobs import MergeJob
from .layout import PlacedTensor
from .matrixjob import MatrixJob, measure_model, plain
from .plan import Plan
from .readahead import ReadAhead
from .receipts import TensorRecord
from .resolved import ResolvedMerge
from .scheduler import Scheduler
from .sites import site_for
from .staging import Staging
from .target import check_apart, refuse_to_replace
from .unit import Unit
from .waves import run_waves
from .whole import all_threads
from .writer import Target

if TYPE_CHECKING:
    from ..adapters.model import Delta

__all__ = ["execute_adapter"]

_WEIGHTS = "adapter_model.safetensors"


class _Memory:
    """Where the writing pass of one tensor goes instead of to a file: what jobs need of a `Unit`."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self.data = bytearray()
        self.record: TensorRecord | None = None

    def open(self) -> None:
        """Takes the memory."""
        self.data = bytearray(self._nbytes)

    def write(self, data: memoryview, offset: int) -> bool:
        """A tile at its place."""
        self.data[offset : offset + len(data)] = data
        return False

    def read_back(self, memory: memoryview, offset: int) -> memoryview:
        """Fills `memory` from what was written at `offset`."""
        memory[:] = memoryview(self.data)[offset : offset + len(memory)]
        return memory

    def finish(self, record: TensorRecord) -> bool:
        """The tensor is written."""
        self.record = record
        return True


class _Collector:
    """Merged task vectors to factors; several workers at once."""

    def __init__(self, ctx: Context) -> None:
        assert ctx.plan.merge.output is not None
        self._ctx = ctx
        self._output = ctx.plan.merge.output
        self._lock = threading.Lock()
        self.factors: dict[Site, Factors] = {}
        self.report: dict[str, dict[str, Any]] = {}

    def site(self, name: str) -> Site:
        """Where the factors of a weight belong.

        Raises
        ------
        InputError : adapters disagree about its orientation.
        """
        merge = self._ctx.plan.merge
        tensor = next(t for t in merge.tensors if t.name == name)
        modules = [m for s in tensor.models if (m := module_of(merge.inputs[s.input], s.tensor)) is not None]
        if len({m.site.kind for m in modules}) > 1:
            raise InputError(
                "adapters disagree about the orientation of the weight",
                code="adapters.orientation",
                tensor=name,
                got=", ".join(sorted({m.site.kind for m in modules})),
            )
        if modules:
            return modules[0].site
        assert tensor.base is not None
        base = merge.inputs[tensor.base.input]
        found = site_for(base, name, base.tensors[tensor.base.tensor])
        assert found is not None
        return found

    def written(self, name: str, memory: _Memory) -> None:
        """The result of a writing pass: the merged task vector as the weight is stored."""
        import torch

        site = self.site(name)
        kind = torch.float64 if self._ctx.plan.specs.compute_of(name) is F64 else torch.float32
        weight = torch.frombuffer(memory.data, dtype=kind).reshape(site.weight_shape)
        with all_threads(self._ctx.plan.budget.threads):
            self._cut(site, site.to_matrix(weight), Merged(weight))

    def merged(self, name: str, merged: Merged, flipped: bool, scale: float) -> None:
        """What a method over matrices gives. flipped : in the orientation of the site, not of the stored weight."""
        site = self.site(name)
        delta = _scaled(merged.delta, scale)
        if not isinstance(delta, Factors) and tuple(delta.shape) not in (site.shape, site.shape[::-1]):
            # No matrix to the method, as one row.
            delta, flipped = site.to_matrix(delta.reshape(site.weight_shape)), True
        if not flipped and site.kind in ("fan_in_fan_out", "embedding"):
            delta = Factors(delta.a.T, delta.b.T) if isinstance(delta, Factors) else delta.T
        self._cut(site, delta, merged)

    def _cut(self, site: Site, delta: Delta, merged: Merged) -> None:
        from ..ops.spectral.lowrank import lowrank

        output = self._output
        told = {key: plain(value) for key, value in merged.report.items()}
        if _is_zero(delta):
            with self._lock:
                self.report[site.module] = {**told, "rank": 0, "kept_energy": 1.0}
            return
        rank = None if output.rank is None else min(output.rank, *site.shape)
        try:
            found = lowrank(delta, rank, output.energy, output.spread)
        except MergeError as error:
            raise MergeError.from_dict({**error.to_dict(), "tensor": site.weight}) from error
        factors = found.factors if merged.finish is None else merged.finish(found.factors)
        kept = Factors(factors.b.cpu().contiguous(), factors.a.cpu().contiguous())
        with self._lock:
            self.factors[site] = kept
            self.report[site.module] = {
                **told,
                "rank": kept.rank,
                "kept_energy": found.kept_energy,
                "cut": found.route,
            }


def _scaled(delta: Delta, scale: float) -> Delta:
    if scale == 1.0:
        return delta
    return Factors(delta.b * scale, delta.a) if isinstance(delta, Factors) else delta * scale


def _is_zero(delta: Delta) -> bool:
    if isinstance(delta, Factors):
        return delta.rank == 0 or not bool(delta.b.any()) or not bool(delta.a.any())
    return not bool(delta.any())


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
    collector = _Collector(ctx)
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
                memory = _Memory(0 if whole else nbytes)
                placed = PlacedTensor(index, tensor.name, 0, nbytes)

                def done(unit: Unit, name: str = tensor.name, memory: _Memory = memory) -> None:
                    collector.written(name, memory)
                    memory.data = bytearray()

                target = Target(cast(Unit, memory), placed, ahead.passed, lambda unit: None, done)
                if whole:
                    yield MatrixJob(ctx, target, state, collector.merged)
                else:
                    yield MergeJob(ctx, target, state)

        scheduler.run(jobs(), lambda done, name: tell("merge", done, total, name))
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


def _write(ctx: Context, staging: Staging, collector: _Collector) -> None:
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
