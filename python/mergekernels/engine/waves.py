"""Statistics over the whole checkpoint: each round of a method is a wave of sweeps, durable per output file.

A wave's statistics are taken for the tensors of one output file after the other, written to `waves/`, added in order of
files and resolved once; then the next wave runs, or the units. After a crash finished parts are read instead of swept
again.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable
from math import prod

from .._cpu import StreamStats, SweepStats
from .._methods.protocol import Coeffs, Round, Spec
from .context import Context, OpenTensor, Worker
from .fileops import read_small, write_small
from .layout import OutputFile
from .measure import Measure, new_statistics
from .memory import WAVE_COPIES
from .readahead import ReadAhead
from .scheduler import Scheduler
from .staging import Staging

__all__ = ["run_waves"]

Stats = SweepStats | StreamStats


class _MeasureJob:
    """One tensor of one wave."""

    want = 0
    least = 0
    granted = 0

    def __init__(self, source: OpenTensor, measure: Measure, passed: Callable[[int], None]) -> None:
        self._source = source
        self._passed = passed
        self._measure = measure
        self.name = source.tensor.name
        self.tiles = measure.tiles
        self.weight = measure.nbytes
        self.moved = 0

    def open(self) -> None:
        """Opens the sources."""
        self._source.open()

    def run(self, worker: Worker, index: int) -> None:
        """One tile."""
        before = worker.bytes_read
        self._measure.run(worker, index)
        self.moved += worker.bytes_read - before
        self._passed(worker.bytes_read - before)

    def advance(self) -> bool:
        """The only pass is over."""
        self._source.close()
        return False


def run_waves(
    ctx: Context,
    staging: Staging,
    scheduler: Scheduler[Worker],
    tick: Callable[[int, int, str], None],
) -> Coeffs | None:
    """The common coefficients of a merge in model scope, None in tensor scope.

    tick : called with (bytes done in this wave, bytes of this wave, name of a tensor).

    Raises
    ------
    DataError : NaN or Inf in an input, unless they are let through. InputError : tensors of the scope ask for unlike
        things.
    """
    scope = ctx.plan.specs.model_scope
    if scope is None:
        return None
    specs, state = ctx.plan.specs.first_state(ctx.plan.method)
    number = 0
    while isinstance(state, Round):
        number += 1
        wave = _Wave(ctx, staging, specs, state, number)
        stats, visited = wave.run(scheduler, tick)
        if visited == scope.n and ctx.plan.merge.nan == "error":
            _refuse(ctx, specs, stats)
        state = ctx.plan.method.resolve(specs[0], state, stats, visited)
    return state


def _refuse(ctx: Context, specs: list[Spec], stats: Stats) -> None:
    scope = ctx.plan.specs.model_scope
    assert scope is not None
    for source in range(specs[0].num_models + 1):
        first, count = stats.nonfinite(source)
        if first < 0:
            continue
        place = bisect_right(scope.offsets, first) - 1
        tensor = ctx.plan.merge.tensors[ctx.plan.specs.members[place]]
        opened = OpenTensor(ctx, tensor, prod(tensor.shape))
        if source < len(opened.streams):
            raise opened.refuse_nonfinite(source, first - scope.offsets[place], count)


class _Wave:
    """One round over the whole scope."""

    def __init__(self, ctx: Context, staging: Staging, specs: list[Spec], round_: Round, number: int) -> None:
        self._ctx = ctx
        self._staging = staging
        self._round = round_
        self._specs = {spec.name: spec for spec in specs}
        self._room = ctx.plan.budget.pool // WAVE_COPIES
        state = repr((ctx.plan.hash, number, round_))
        self._name = f"{number:02d}-{hashlib.sha256(state.encode()).hexdigest()[:16]}"
        self._done = 0
        empty = self._new()
        self._total = sum(m.nbytes for f in ctx.plan.files for m in self._measures(f, empty))

    def _new(self) -> Stats:
        models = next(iter(self._specs.values())).num_models
        most = next(iter(self._specs.values())).scope.n
        return new_statistics(self._round, models, self._room, most)

    def _measures(self, file: OutputFile, stats: Stats) -> list[Measure]:
        result = []
        for placed in file.tensors:
            spec = self._specs.get(placed.name)
            if spec is not None:
                tensor = self._ctx.plan.merge.tensors[placed.index]
                source = OpenTensor(self._ctx, tensor, spec.n)
                result.append(Measure.of(self._ctx, source, spec, self._ctx.plan.method, self._round, stats))
        return result

    def run(self, scheduler: Scheduler[Worker], tick: Callable[[int, int, str], None]) -> tuple[Stats, int]:
        """(statistics of the whole scope, elements visited)."""
        total, visited = self._new(), 0
        for file in self._ctx.plan.files:
            stats = self._new()
            measures = self._measures(file, stats)
            known = self._read(file)
            if known is None:
                whole = (m.source.streams for m in measures if not m.sampled)
                with ReadAhead(self._ctx.inputs, whole, scheduler.fail) as ahead:
                    jobs = [_MeasureJob(m.source, m, ahead.passed) for m in measures if m.tiles]
                    scheduler.run(jobs, lambda done, name: tick(self._done + done, self._total, name))
                self._write(file, stats)
            else:
                stats = known
            self._done += sum(m.nbytes for m in measures)
            visited += sum(m.visited for m in measures)
            total.merge(stats)  # type: ignore[arg-type]
        return total, visited

    def _path_name(self, file: OutputFile) -> str:
        return f"{self._name}-{file.name}"

    def _read(self, file: OutputFile) -> Stats | None:
        try:
            raw = read_small(self._ctx.io, self._staging.waves / self._path_name(file))
        except OSError:
            return None
        if len(raw) < 32 or hashlib.sha256(raw[32:]).digest() != raw[:32]:
            return None
        kind = StreamStats if self._round.op == "votes" else SweepStats
        try:
            return kind.load(raw[32:])
        except (ValueError, RuntimeError):
            return None

    def _write(self, file: OutputFile, stats: Stats) -> None:
        raw = stats.dump()
        name = self._path_name(file)
        target = self._staging.waves / name
        write_small(self._ctx.io, self._staging.temporary(name), target, hashlib.sha256(raw).digest() + raw)
