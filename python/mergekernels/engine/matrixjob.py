"""The job of a tensor that a method over matrices merges: task vectors whole, the method, then the writing pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import isfinite
from typing import TYPE_CHECKING, Any

from .._backends.dispatch import require
from .._cpu import StreamStats
from .._methods.matrix import MatrixMethod, MatrixSpec, Merged, measured_state
from .._methods.protocol import Spec
from .._methods.spectral.layout import merge_plain
from .._methods.whole import refuse_rounds, whole_of
from ..errors import DataError, MergeError
from ..ops.program import Program
from .context import Context, OpenTensor, Worker
from .readahead import ReadAhead
from .scheduler import Scheduler
from .whole import TaskVectors, all_threads
from .wholeneeds import whole_bytes
from .writer import Target, Writer

if TYPE_CHECKING:
    from ..adapters.model import Delta

__all__ = ["Collect", "MatrixJob", "measure_model"]

Collect = Callable[[str, Merged, bool, float], None]
"""Takes a tensor's name, its merged task vector, whether that is transposed, and its scale."""

Tick = Callable[[int, int, str], None]


class _Whole:
    """What measuring and merging share: sources, task vectors, progress."""

    def __init__(self, ctx: Context, index: int) -> None:
        self.ctx = ctx
        method = whole_of(ctx.plan.method)
        assert method is not None
        self.method: MatrixMethod = method
        self.spec: Spec = ctx.plan.specs.spec(index)
        self.name = self.spec.name
        self.source = OpenTensor(ctx, ctx.plan.merge.tensors[index], self.spec.n)
        self.vectors = TaskVectors(ctx, self.source, self.spec)
        self.want = self.least = whole_bytes(ctx.plan.specs, index)
        self.granted = 0
        self.weight = self.source.nbytes
        self.moved = 0
        self.tiles = self.vectors.tiling.count

    def load(self, worker: Worker, index: int, passed: Callable[[int], None]) -> None:
        """One tile of all task vectors."""
        before = worker.bytes_read
        self.vectors.load(worker, index)
        size = worker.bytes_read - before
        self.moved += size
        passed(size)


class MatrixJob(_Whole):
    """One merged tensor: a pass that loads, a pass of one piece that merges, a pass that writes.

    state : what the method found over the whole model. collect : takes the merged task vectors, where they become an
    adapter and nothing is written.
    """

    def __init__(self, ctx: Context, target: Target, state: Any, collect: Collect | None = None) -> None:
        super().__init__(ctx, target.placed.index)
        self._collect = collect
        self._target = target
        self._state = state
        self._program = scale_program(ctx, self.spec)
        self._pass = "load"
        self._report: dict[str, Any] = {}
        self._warnings: list[str] = []
        self._result: Any = None
        self._norms: list[float | None] = []
        self._stats: StreamStats | None = None
        self._writer: Writer | None = None

    def open(self) -> None:
        """Opens sources and unit, takes memory."""
        self.source.open()
        self._target.unit.open()
        self.vectors.take()

    def run(self, worker: Worker, index: int) -> None:
        """One tile of the current pass."""
        if self._pass == "load":
            self.load(worker, index, self._target.passed)
        elif self._pass == "merge":
            self._merge()
        else:
            self._write(worker, index)

    def advance(self) -> bool:
        """Loading, then merging, then writing."""
        if self._pass == "load":
            self.vectors.check()
            self._pass, self.tiles = "merge", 1
            return True
        if self._pass == "merge" and self._collect is not None:
            self.source.close()
            for text in self._warnings:
                self.ctx.warn(text)
            return False
        if self._pass == "merge":
            self._pass = "write"
            require(self.ctx.backend, self._program.features)
            self._stats = StreamStats(1, 0)
            tiling = self.vectors.tiling
            self._writer = Writer(self._target, tiling.wide * self.source.tensor.dtype.itemsize, tiling.count)
            self.tiles = tiling.count
            return True
        self._finish()
        return False

    def _merge(self) -> None:
        matrices = self.vectors.matrices()
        self._norms = [_norm(column) for column in zip(*matrices, strict=True)]
        found = []
        with all_threads(self.ctx.plan.budget.threads):
            for spec in self.vectors.specs:
                deltas = matrices.pop(0)
                found.append(self._one(spec, deltas))
                del deltas
            if self._collect is None:
                self._result = self.vectors.flat([merged.delta for merged in found])
            else:
                self._collect(self.name, found[0], self.vectors.flipped, self._program.scale)
        reports = [{key: plain(value) for key, value in merged.report.items()} for merged in found]
        self._report = reports[0] if len(reports) == 1 else {"matrices": reports}
        self._warnings = [
            f"tensor '{spec.name}': {text}"
            for spec, merged in zip(self.vectors.specs, found, strict=True)
            for text in merged.warnings
        ]

    def _one(self, spec: MatrixSpec, deltas: list[Delta]) -> Merged:
        try:
            if not spec.plain:
                return self.method.merge(spec, deltas, self._state)
            merged = merge_plain(self.method, spec, deltas, self._state)
            return merged if merged.report else replace(merged, report={"route": "mean"})
        except MergeError as error:
            if error.tensor:
                raise
            raise MergeError.from_dict({**error.to_dict(), "tensor": spec.name}) from error

    def _write(self, worker: Worker, index: int) -> None:
        source, dtype, tiling = self.source, self.source.tensor.dtype, self.vectors.tiling
        assert self._writer is not None
        piece = tiling.piece(index)
        base = source.load(worker, source.num_models, piece, slot=0, anchor=True) if source.has_base else None
        self.ctx.backend.stream(
            self._program,
            piece,
            base,
            [self.vectors.view(self._result, piece.g0, piece.numel)],
            worker.tiles.view(-1, dtype, None, piece.numel),
            compute=self.spec.compute,
            stats=self._stats,
            threads=1,
        )
        self._writer.put(worker, index, worker.tiles.out[: piece.numel * dtype.itemsize])

    def _finish(self) -> None:
        stats = self._stats
        assert stats is not None and self._writer is not None
        first, count = stats.nonfinite(0)
        if first >= 0:
            raise DataError(
                f"{self.method.info.name} gave {count} values that are NaN or Inf, the first at flat index {first}",
                code="data.result",
                tensor=self.name,
                expected="a finite merged task vector",
            )
        first, count = stats.nonfinite(2)
        if first >= 0:
            raise self.source.refuse_nonfinite(None, first, count)
        self.source.close()
        for text in self._warnings:
            self.ctx.warn(text)
        statistics = {**self._report, "norms": self._norms, "merged_norm": _norm([self._result])}
        self._result = None
        self._writer.finish(self.ctx, statistics, self._warnings)


class _MeasureJob(_Whole):
    """One tensor that is measured: loaded, then handed to the method."""

    def __init__(
        self, ctx: Context, index: int, state: Any, passed: Callable[[int], None], found: dict[str, dict[str, Any]]
    ) -> None:
        super().__init__(ctx, index)
        self._state = state
        self._passed = passed
        self._found = found
        self._loaded = False

    def open(self) -> None:
        """Opens the sources, takes memory."""
        self.source.open()
        self.vectors.take()

    def run(self, worker: Worker, index: int) -> None:
        """One tile, or the measurement."""
        if not self._loaded:
            self.load(worker, index, self._passed)
            return
        matrices = self.vectors.matrices()
        with all_threads(self.ctx.plan.budget.threads):
            self._found[self.name] = {
                spec.name: self.method.measure(spec, deltas, self._state)
                for spec, deltas in zip(self.vectors.specs, matrices, strict=True)
            }

    def advance(self) -> bool:
        """Loaded, then measured."""
        if self._loaded:
            self.source.close()
            return False
        self.vectors.check()
        self._loaded, self.tiles = True, 1
        return True


def measure_model(ctx: Context, scheduler: Scheduler[Worker], tick: Tick) -> Any:
    """The state with which the method merges every matrix; None where it measures nothing over the model.

    Not kept on disk: a run that is resumed measures again, with the same result.
    """
    plan = ctx.plan
    method = whole_of(plan.method)
    members = plan.specs.matrices
    if method is None or not members:
        return None
    total = plan.bytes_in

    def measure(state: Any) -> Mapping[str, Any]:
        found: dict[str, dict[str, Any]] = {}
        streams = (OpenTensor(ctx, plan.merge.tensors[i], 1).read_streams for i in members)
        with ReadAhead(ctx.inputs, streams, scheduler.fail) as ahead:
            jobs = (_MeasureJob(ctx, i, state, ahead.passed, found) for i in members)
            scheduler.run(jobs, lambda done, name: tick(min(done, total), total, name))
        # In order of the tensors, whatever the order in which they were done.
        return {name: value for i in members for name, value in found[plan.merge.tensors[i].name].items()}

    return measured_state(method, plan.specs.spec(members[0]).params, plan.merge.dialect, measure)


def scale_program(ctx: Context, spec: Spec) -> Program:
    """Base plus the scaled result.

    Raises
    ------
    ArgumentError : a modifier wants to measure what only whole matrices give.
    """
    method = ctx.plan.method
    coeffs = refuse_rounds(method.start(spec), spec, method.info.name)
    return method.apply(spec, coeffs)


def plain(value: Any) -> Any:
    """A number or word of a report as JSON has it; None for what is not finite."""
    if isinstance(value, (bool, str, int)) or value is None:
        return value
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    number = float(value)
    return number if isfinite(number) else None


def _norm(deltas: Sequence[Delta]) -> float | None:
    """The Euclidean norm of matrices together."""
    import torch

    squares = 0.0
    for delta in deltas:
        if isinstance(delta, torch.Tensor):
            squares += float(torch.linalg.vector_norm(delta, dtype=torch.float64)) ** 2
        else:
            b, a = delta.b.double(), delta.a.double()
            squares += max(0.0, float(((b.T @ b) * (a @ a.T)).sum()))
    return squares**0.5 if isfinite(squares) else None
