"""The jobs of a unit: one per output tensor. A merge goes through its method's rounds and the writing pass; a copy is
one pass.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite, prod, sqrt
from typing import Any

from .._cpu import StreamStats, SweepStats
from .._methods.protocol import Coeffs, Round
from ..errors import DataError
from ..ops.program import Program
from ..tensors import CANONICAL_BLOCK, Piece
from .context import Context, OpenTensor, Worker
from .digesting import OrderedDigest
from .layout import PlacedTensor
from .measure import Measure, new_statistics
from .memory import least_statistics, wanted_statistics
from .receipts import TensorRecord
from .unit import Unit

__all__ = ["CopyJob", "MergeJob", "Target"]


@dataclass(frozen=True)
class Target:
    """Where a job writes.

    passed : told of input bytes read for the first time. sync, done : told when a background sync of the unit is due,
    and when its last tensor is written.
    """

    unit: Unit
    placed: PlacedTensor
    passed: Callable[[int], None]
    sync: Callable[[Unit], None]
    done: Callable[[Unit], None]


class _Writer:
    """The output side of a job: tiles to planned offsets, digest in order, record at the end."""

    def __init__(self, target: Target, tile_bytes: int, tiles: int) -> None:
        self._target = target
        self._tile_bytes = tile_bytes
        self._digest = OrderedDigest(tiles)

    def put(self, worker: Worker, index: int, data: memoryview) -> None:
        """Writes tile `index`, which is `data`, and hashes what can be hashed."""
        unit, placed = self._target.unit, self._target.placed
        if unit.write(data, placed.offset + index * self._tile_bytes):
            self._target.sync(unit)

        def again(other: int) -> memoryview:
            start = other * self._tile_bytes
            size = min(self._tile_bytes, placed.nbytes - start)
            return unit.read_back(worker.tiles.out[:size], placed.offset + start)

        self._digest.add(index, data, again)

    def finish(self, ctx: Context, statistics: dict[str, Any], warnings: list[str]) -> None:
        """Hands the tensor's record to the unit."""
        placed = self._target.placed
        tensor = ctx.plan.merge.tensors[placed.index]
        digest = self._digest.hexdigest() if placed.nbytes else hashlib.sha256(b"").hexdigest()
        record = TensorRecord(tensor.name, tensor.dtype.name, tensor.shape, digest, statistics, tuple(warnings))
        if self._target.unit.finish(record):
            self._target.done(self._target.unit)


def _norm(squares: float) -> float | None:
    """The root, None where it is not a number that JSON has."""
    return sqrt(squares) if isfinite(squares) else None


class MergeJob:
    """One merged tensor: sweeps until the method has its coefficients (unless they are given), then the fused pass."""

    def __init__(self, ctx: Context, target: Target, coeffs: Coeffs | None) -> None:
        self._ctx = ctx
        self._target = target
        tensor = ctx.plan.merge.tensors[target.placed.index]
        self.name = tensor.name
        self._n = prod(tensor.shape)
        self._source = OpenTensor(ctx, tensor, self._n)
        self._spec = ctx.plan.specs.spec(target.placed.index)
        models = self._spec.num_models
        self.least = least_statistics(models, self._n)
        selects = coeffs is None and isinstance(ctx.plan.method.start(self._spec), Round)
        self.want = wanted_statistics(models, self._n, selects=selects)
        reads = ctx.plan.reads if selects else 1
        self.weight = reads * self._source.nbytes
        self.granted = 0
        self.moved = 0
        self.tiles = 1
        self._coeffs = coeffs
        self._state: Round | Coeffs | None = coeffs
        self._measure: Measure | None = None
        self._program: Program | None = None
        self._stats: StreamStats | None = None
        self._writer = _Writer(target, self._source.tile * tensor.dtype.itemsize, self._source.num_tiles)

    def open(self) -> None:
        """Opens sources and unit, and starts the method."""
        self._source.open()
        self._target.unit.open()
        if self._state is None:
            self._state = self._ctx.plan.method.start(self._spec)
        self._next_pass()

    def _next_pass(self) -> None:
        method, spec, state = self._ctx.plan.method, self._spec, self._state
        if isinstance(state, Round):
            room = self.granted - self.least
            stats = new_statistics(state, spec.num_models, room, self._n)
            self._measure = Measure.of(self._ctx, self._source, spec, method, state, stats)
            self.tiles = self._measure.tiles
            return
        assert state is not None
        self._measure = None
        self._program = method.apply(spec, state)
        self._stats = StreamStats(spec.num_models, -(-self._n // CANONICAL_BLOCK))
        self.tiles = self._source.num_tiles

    def run(self, worker: Worker, index: int) -> None:
        """One tile of the current pass."""
        before = worker.bytes_read
        if self._measure is not None:
            self._measure.run(worker, index)
        else:
            self._apply(worker, index)
        size = worker.bytes_read - before
        first = min(size, self._source.nbytes - self.moved)
        self.moved += size
        self._target.passed(first)

    def _apply(self, worker: Worker, index: int) -> None:
        source, dtype = self._source, self._source.tensor.dtype
        assert self._program is not None
        start = index * source.tile
        count = min(source.tile, source.n - start)
        views = [source.load(worker, m, start, count) for m in range(len(source.streams))]
        base = views.pop() if source.has_base else None
        self._ctx.backend.stream(
            self._program,
            Piece.flat(start, count),
            base if self._program.base else None,
            views,
            worker.tiles.view(-1, dtype, None, count),
            compute=self._spec.compute,
            stats=self._stats,
            threads=1,
        )
        self._writer.put(worker, index, worker.tiles.out[: count * dtype.itemsize])

    def advance(self) -> bool:
        """After a pass: the method goes on, or the tensor is done."""
        measure = self._measure
        if measure is None:
            self._finish()
            return False
        if not measure.sampled:
            self._refuse(measure.stats)
        assert isinstance(self._state, Round)
        self._state = self._ctx.plan.method.resolve(self._spec, self._state, measure.stats, measure.visited)
        self._measure = None
        self._next_pass()
        return True

    def _refuse(self, stats: SweepStats | StreamStats) -> None:
        """Strict policy: NaN or Inf in a source ends the run."""
        if self._spec.nan != "error":
            return
        for source in range(len(self._source.streams)):
            first, count = stats.nonfinite(source)
            if first >= 0:
                raise self._source.refuse_nonfinite(source, first, count)

    def _finish(self) -> None:
        stats = self._stats
        assert stats is not None
        self._refuse(stats)
        warnings = self._look_at_values(stats)
        self._source.close()
        models = range(self._spec.num_models)
        n = self._n
        statistics = {
            "density": [stats.kept(m) / n for m in models],
            "norms": [_norm(stats.sum_squares(m)) for m in models],
            "sign_conflicts": stats.conflicts() / n,
        }
        self._stats = None
        self._writer.finish(self._ctx, statistics, warnings)

    def _look_at_values(self, stats: StreamStats) -> list[str]:
        first, count = stats.nonfinite(self._spec.num_models + 1)
        if first < 0:
            return []
        if self._spec.nan == "error":
            raise self._source.refuse_nonfinite(None, first, count)
        text = f"tensor '{self.name}': {count} values of the output are NaN or Inf, the first at flat index {first}"
        self._ctx.warn(text)
        return [text]


class CopyJob:
    """One tensor whose bytes are copied; with several sources (an integer buffer) they are compared first.

    Empty tensors of any kind are jobs of this class with nothing to copy.
    """

    least = 0
    want = 0
    granted = 0

    def __init__(self, ctx: Context, target: Target) -> None:
        self._ctx = ctx
        self._target = target
        tensor = ctx.plan.merge.tensors[target.placed.index]
        self.name = tensor.name
        self._nbytes = target.placed.nbytes
        self._source = OpenTensor(ctx, tensor, prod(tensor.shape))
        self._tile = ctx.plan.budget.tile * ctx.plan.budget.itemsize
        self._own = len(self._source.streams) - 1 if tensor.base is not None else 0
        self._differs = False
        self.weight = self._source.nbytes
        self.moved = 0
        tiles = -(-self._nbytes // self._tile)
        self.tiles = max(1, tiles)
        self._writer = _Writer(target, self._tile, tiles)

    def open(self) -> None:
        """Opens sources and unit."""
        self._source.open()
        self._target.unit.open()

    def run(self, worker: Worker, index: int) -> None:
        """One tile: compare, then copy."""
        before = worker.bytes_read
        start = index * self._tile
        size = min(self._tile, self._nbytes - start)
        if size <= 0:
            return
        own = worker.tiles.out[:size]
        self._source.read_bytes(worker, self._own, own, start)
        for other in range(len(self._source.streams)):
            if other != self._own and not self._differs:
                memory = worker.tiles.memory[0][:size]
                self._source.read_bytes(worker, other, memory, start)
                if memory != own:
                    self._differs = True
                    self._unequal(other)
        self._writer.put(worker, index, own)
        size = worker.bytes_read - before
        self.moved += size
        self._target.passed(size)

    def _unequal(self, other: int) -> None:
        if self._source.has_base:
            return
        raise DataError(
            f"the values of {self._source.label(other)} and {self._source.label(self._own)} differ, "
            "and there is no base to decide",
            code="data.buffer",
            tensor=self.name,
            expected="equal integer buffers",
            hint="Name a base_model.",
        )

    def advance(self) -> bool:
        """The tensor is done."""
        self._source.close()
        warnings = []
        if self._differs:
            warnings.append(f"tensor '{self.name}': values differ between the inputs; the base's are taken")
            self._ctx.warn(warnings[0])
        self._writer.finish(self._ctx, {}, warnings)
        return False
