"""Statistics over the whole checkpoint: each round of a method is a wave of passes, durable per output file.

A wave's statistics are taken for the tensors of one output file after the other, written to `waves/`, added in order of
files and resolved once; then the next wave runs, or the units. After a crash finished parts are read instead of swept
again.
"""

from __future__ import annotations

import hashlib
import threading
from bisect import bisect_right
from collections.abc import Callable
from math import prod
from typing import TypeAlias

from .._cpu import StreamStats, SweepStats
from .._methods.protocol import Coeffs, Round, Spec
from ..ops.sums import Sums
from .context import Context, OpenTensor, Worker
from .each import resolve_each
from .fileops import read_small, write_small
from .layout import OutputFile
from .measure import Search, Shared, measure_of, new_shared, sweep_nonfinite
from .memory import WAVE_COPIES
from .needs import is_sum, of_round, of_scope
from .passes import Measure, refuse
from .readahead import ReadAhead
from .scheduler import Scheduler
from .scopesums import ScopeSums
from .staging import Staging
from .summing import Folded, SumsMeasure

__all__ = ["run_waves"]

Stats = Shared | ScopeSums
_Add: TypeAlias = "Callable[[str, Folded | Shared], None]"


class _MeasureJob:
    """One tensor of one wave. add : takes what it found, if it does not add to shared statistics on its way."""

    def __init__(self, measure: Measure, passed: Callable[[int], None], add: _Add | None, nbytes: int) -> None:
        self._measure = measure
        self._passed = passed
        self._add = add
        self.name = measure.source.tensor.name
        self.want = self.least = nbytes
        self.granted = 0
        self.tiles = measure.tiles
        self.weight = measure.nbytes
        self.moved = 0

    def open(self) -> None:
        """Opens the sources."""
        if isinstance(self._measure, SumsMeasure):
            self._measure.begin()
        self._measure.source.open()

    def run(self, worker: Worker, index: int) -> None:
        """One tile."""
        before = worker.bytes_read
        self._measure.run(worker, index)
        self.moved += worker.bytes_read - before
        self._passed(worker.bytes_read - before)

    def advance(self) -> bool:
        """The pass is over; where a sum shows NaN or Inf and these are refused, another finds them."""
        measure = self._measure
        strict = measure.spec.nan == "error"
        if isinstance(measure, SumsMeasure):
            found = measure.finish()
            if self._add is not None:
                self._add(self.name, found)
            if strict and measure.doubtful(found):
                source = measure.source
                self._measure = Search(measure.ctx, source, measure.spec, StreamStats(source.num_models, 0))
                self._add = None
                self.tiles = self._measure.tiles
                return True
        elif isinstance(measure, Search):
            if strict:
                refuse(measure.source, measure.nonfinite())
            if self._add is not None:
                self._add(self.name, measure.stats)
        measure.source.close()
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
        if state.op == "each":
            found = resolve_each(ctx, scheduler, specs, state, tick)
            state = ctx.plan.method.resolve(specs[0], state, found, specs[0].scope.n)
            continue
        wave = _Wave(ctx, staging, specs, state, number)
        stats, visited = wave.run(scheduler, tick)
        result: Shared | Sums = stats.sums([s.name for s in specs]) if isinstance(stats, ScopeSums) else stats
        state = ctx.plan.method.resolve(specs[0], state, result, visited)
    return state


class _Wave:
    """One round over the whole scope."""

    def __init__(self, ctx: Context, staging: Staging, specs: list[Spec], round_: Round, number: int) -> None:
        self._ctx = ctx
        self._staging = staging
        self._round = round_
        self._specs = {spec.name: spec for spec in specs}
        self._room = ctx.plan.budget.pool // WAVE_COPIES
        self._held = ctx.plan.survey.held + (of_scope(ctx.plan.method, specs, round_) if is_sum(round_) else 0)
        state = repr((ctx.plan.hash, number, round_))
        self._name = f"{number:02d}-{hashlib.sha256(state.encode()).hexdigest()[:16]}"
        self._done = 0
        self._lock = threading.Lock()
        empty = self._new()
        self._total = sum(m.nbytes for f in ctx.plan.files for m in self._measures(f, empty))

    def _new(self) -> Stats:
        if is_sum(self._round):
            return ScopeSums()
        index = self._ctx.plan.specs.members[0]
        sources = len(self._ctx.plan.merge.tensors[index].models)
        most = next(iter(self._specs.values())).scope.n
        return new_shared(self._round, sources, self._room, most)

    def _measures(self, file: OutputFile, stats: Stats) -> list[Measure]:
        plan, round_ = self._ctx.plan, self._round
        result = []
        for placed in file.tensors:
            spec = self._specs.get(placed.name)
            if spec is not None:
                source = OpenTensor(self._ctx, plan.merge.tensors[placed.index], spec.n)
                shared: Shared | None = None
                if isinstance(stats, SweepStats):
                    shared = stats
                elif isinstance(stats, StreamStats):
                    # Its own: a vote knows the place of a value in its tensor alone.
                    shared = StreamStats(source.num_models, 0)
                result.append(measure_of(self._ctx, source, spec, plan.method, round_, shared))
        return result

    def run(self, scheduler: Scheduler[Worker], tick: Callable[[int, int, str], None]) -> tuple[Stats, int]:
        """(statistics of the whole scope, elements visited).

        Raises
        ------
        DataError : NaN or Inf in an input, unless they are let through.
        """
        total, visited = self._new(), 0
        for file in self._ctx.plan.files:
            stats = self._new()
            measures = self._measures(file, stats)
            known = self._read(file)
            if known is None:
                whole = (m.source.read_streams for m in measures if not m.sampled)
                with ReadAhead(self._ctx.inputs, whole, scheduler.fail) as ahead:
                    jobs = [self._job(m, ahead.passed, stats) for m in measures if m.tiles]
                    scheduler.run(
                        jobs, lambda done, name: tick(self._done + done, self._total, name), reserved=self._held
                    )
                self._write(file, stats)
            else:
                stats = known
            self._done += sum(m.nbytes for m in measures)
            visited += sum(m.visited for m in measures)
            total.merge(stats)  # type: ignore[arg-type]
        if isinstance(total, SweepStats) and visited == next(iter(self._specs.values())).scope.n:
            self._refuse(total)
        return total, visited

    def _job(self, measure: Measure, passed: Callable[[int], None], stats: Stats) -> _MeasureJob:
        nbytes = measure.source.held
        if isinstance(measure, SumsMeasure):
            nbytes += of_round(self._ctx.plan.method, measure.spec, self._round, 1).statistics

        def add(name: str, found: Folded | Shared) -> None:
            with self._lock:
                if isinstance(stats, ScopeSums):
                    stats.add(name, found)  # type: ignore[arg-type]
                else:
                    stats.merge(found)  # type: ignore[arg-type]

        return _MeasureJob(measure, passed, None if isinstance(stats, SweepStats) else add, nbytes)

    def _refuse(self, stats: SweepStats) -> None:
        """Strict policy: NaN or Inf in a source, whose place is known in the scope, ends the run."""
        plan, selection = self._ctx.plan, self._round.selection
        scope = plan.specs.model_scope
        assert scope is not None and selection is not None
        if plan.merge.nan != "error":
            return
        sources = len(plan.merge.tensors[plan.specs.members[0]].models)
        for source, first, count in sweep_nonfinite(selection.sweep, stats, sources):
            if first >= 0:
                place = bisect_right(scope.offsets, first) - 1
                tensor = plan.merge.tensors[plan.specs.members[place]]
                opened = OpenTensor(self._ctx, tensor, prod(tensor.shape))
                refuse(opened, [(source, first - scope.offsets[place], count)])

    def _path_name(self, file: OutputFile) -> str:
        return f"{self._name}-{file.name}"

    def _read(self, file: OutputFile) -> Stats | None:
        try:
            raw = read_small(self._ctx.io, self._staging.waves / self._path_name(file))
        except OSError:
            return None
        if len(raw) < 32 or hashlib.sha256(raw[32:]).digest() != raw[:32]:
            return None
        if is_sum(self._round):
            kind: type[Stats] = ScopeSums
        else:
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
