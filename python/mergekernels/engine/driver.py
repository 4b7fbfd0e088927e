"""One run from plan to published folder, in one process."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from ..errors import MergeError
from .committer import Committer
from .context import Context, Worker
from .copying import CopyJob
from .events import Progress, ProgressSink, RunReport
from .fileops import output_error
from .inputs import Stream, streams_of
from .io import Io
from .jobs import MergeJob
from .layout import OutputFile
from .matrixjob import MatrixJob, measure_model
from .plan import Plan
from .publish import publish
from .readahead import ReadAhead
from .receipts import Receipt
from .resume import finished_units
from .scheduler import Scheduler
from .staging import Staging, published
from .unit import Unit, sync_failure
from .waves import run_waves
from .writer import Target

__all__ = ["execute"]

_ATTEMPTS = 2
"""Times that a unit is written: once, and once more into a new file after a sync that failed."""


class _Run:
    """The state of one run."""

    def __init__(self, plan: Plan, io: Io, progress: ProgressSink | None) -> None:
        assert plan.out is not None
        self.plan = plan
        self.ctx = Context.of(plan, io)
        self.staging = Staging(io, plan.out, plan.hash)
        self.progress = progress
        self.workers: list[Worker] = []
        self.written = 0

    def tell(self, event: Progress) -> None:
        """Passes progress on; a sink that fails loses its events and nothing else."""
        if self.progress is None:
            return
        try:
            self.progress(event)
        except Exception:
            self.progress = None

    def units(self, receipts: list[Receipt], scheduler: Scheduler[Worker], coeffs: Any) -> list[Receipt]:
        """Merges all files without a receipt; the receipts of these files."""
        done = {r.file for r in receipts}
        pending = [f for f in self.plan.files if f.name not in done]
        made: list[Receipt] = []
        for attempt in range(_ATTEMPTS):
            committer = self._merge(pending, scheduler, coeffs)
            made += committer.receipts
            if not committer.failed:
                break
            pending = [unit.file for unit, _ in committer.failed]
            if attempt == _ATTEMPTS - 1:
                unit, error = committer.failed[0]
                raise sync_failure(unit.file, error)
        return made

    def _merge(self, files: list[OutputFile], scheduler: Scheduler[Worker], coeffs: Any) -> Committer:
        plan, ctx = self.plan, self.ctx
        units = [Unit(ctx.io, self.staging, plan.hash, i, f) for i, f in enumerate(files)]
        members = set(plan.specs.members)
        total = self._total(files)
        committer = Committer(scheduler.fail)
        ahead = ReadAhead(ctx.inputs, (self._streams(t.index) for f in files for t in f.tensors), scheduler.fail)

        def jobs() -> Iterator[MergeJob | MatrixJob | CopyJob]:
            for unit in units:
                for placed in unit.file.tensors:
                    target = Target(unit, placed, ahead.passed, committer.sync, committer.commit)
                    if placed.index in members and plan.specs.whole is not None:
                        yield MatrixJob(ctx, target, coeffs)
                    elif placed.index in members:
                        yield MergeJob(ctx, target, coeffs)
                    else:
                        yield CopyJob(ctx, target)

        def tick(done: int, name: str) -> None:
            self.tell(Progress("merge", min(done, total), total, self.written + sum(u.written for u in units), name))

        try:
            with committer, ahead:
                scheduler.run(jobs(), tick, reserved=plan.survey.held)
                tick(total, "")
            if committer.error is not None:
                raise committer.error
        finally:
            for unit in units:
                unit.abandon()
        self.written += sum(u.file.size for u in units)
        return committer

    def _streams(self, index: int) -> list[Stream]:
        return streams_of(self.plan.merge.inputs, self.plan.specs.read_sources(index), self.ctx.inputs.first)

    def _total(self, files: list[OutputFile]) -> int:
        merge = self.plan.merge
        members = set(self.plan.specs.members)
        once = self.plan.specs.model_scope is not None or self.plan.specs.whole is not None
        total = 0
        for file in files:
            for placed in file.tensors:
                sources = self.plan.specs.read_sources(placed.index)
                size = sum(merge.inputs[s.input].tensors[s.tensor].nbytes for s in sources)
                total += size * (self.plan.reads if placed.index in members and not once else 1)
        return total

    def _resume(self, scheduler: Scheduler[Worker]) -> list[Receipt]:
        size = sum(f.size for f in self.plan.files)
        return finished_units(
            self.ctx, self.staging, scheduler, lambda done, name: self.tell(Progress("resume", done, size, 0, name))
        )

    def _measured(self, scheduler: Scheduler[Worker]) -> Any:
        """What is measured over the whole model: coefficients, or the state of a method over matrices."""

        def tick(done: int, total: int, name: str) -> None:
            self.tell(Progress("measure", done, total, 0, name))

        if self.plan.specs.whole is not None:
            return measure_model(self.ctx, scheduler, tick)
        return run_waves(self.ctx, self.staging, scheduler, tick)

    def merge(self, overwrite: bool, start: float) -> RunReport:
        """Everything between the lock and the report."""
        plan = self.plan
        self.workers = self.ctx.workers()
        scheduler: Scheduler[Worker] = Scheduler(self.workers, plan.budget.window, plan.budget.pool)
        resumed = self._resume(scheduler)
        made: list[Receipt] = []
        if len(resumed) < len(plan.files):
            made = self.units(resumed, scheduler, self._measured(scheduler))
        self.tell(Progress("publish", 0, 0, self.written))
        digest, small = publish(self.ctx, self.staging, [*resumed, *made], overwrite=overwrite)
        tiles = sum(len(w.tiles.buffers) * w.tiles.nbytes for w in self.workers)
        return self.report(
            digest,
            start,
            bytes_read=sum(w.bytes_read for w in self.workers),
            bytes_written=self.written + small,
            peak=tiles + scheduler.peak,
            resumed=len(resumed),
        )

    def report(
        self,
        digest: str,
        start: float,
        *,
        bytes_read: int = 0,
        bytes_written: int = 0,
        peak: int = 0,
        resumed: int = 0,
        done: bool = False,
    ) -> RunReport:
        """The report of a run that began at `start` (monotonic seconds)."""
        plan = self.plan
        return RunReport(
            out=str(plan.out),
            plan_hash=plan.hash,
            checkpoint_sha256=digest,
            bytes_read=bytes_read,
            bytes_written=bytes_written,
            seconds=time.monotonic() - start,
            peak_tensor_memory=peak,
            memory=plan.budget.limit,
            threads=plan.budget.threads,
            backend=plan.backend,
            device=plan.device,
            units=len(plan.files),
            resumed_units=resumed,
            already_done=done,
            warnings=(*plan.warnings, *sorted(self.ctx.warnings)),
        )


def execute(plan: Plan, *, overwrite: bool, progress: ProgressSink | None, io: Io, start: float) -> RunReport:
    """Carries out a plan that has an output.

    Raises
    ------
    InputError, DataError, OutputError, BackendError : the staging is left as it is, and the same call resumes.
    """
    run = _Run(plan, io, progress)
    staging = run.staging
    try:
        if staging.enter(overwrite=overwrite):
            return run.merge(overwrite, start)
        manifest = published(io, staging.out, plan.hash)
        if manifest is None:
            raise MergeError(
                "the output vanished while it was looked at", code="output.vanished", file=str(staging.out)
            )
        staging.leave()
        return run.report(str(manifest["checkpoint_sha256"]), start, resumed=len(plan.files), done=True)
    except OSError as error:
        raise output_error("the output cannot be written", error.filename or staging.out, error) from error
    finally:
        run.ctx.inputs.close()
        staging.unlock()
