"""The job of a merged tensor: through its method's rounds, then the writing pass."""

from __future__ import annotations

from dataclasses import replace
from math import isfinite, prod, sqrt

from .._backends.dispatch import require
from .._cpu import StreamStats
from .._keeping import Kept
from .._methods.protocol import Coeffs, Round
from ..errors import ArgumentError
from ..ops.program import Program
from ..ops.sums import Sums
from ..tensors import CANONICAL_BLOCK
from .context import Context, OpenTensor, Worker
from .measure import Search, Shared, Sharing, measure_of, new_shared
from .needs import Needs, is_sum, of_program, of_round, of_tensor
from .passes import Measure, refuse
from .summing import Folded, SumsMeasure
from .survey import widest
from .tiling import Tiling, flat, slab_unit
from .writer import Target, Writer

__all__ = ["MergeJob"]


def _norm(squares: float) -> float | None:
    """The root, None where it is not a number that JSON has."""
    return sqrt(squares) if isfinite(squares) else None


class MergeJob:
    """One merged tensor: rounds until the method has its coefficients (unless they are given), then the fused pass."""

    def __init__(self, ctx: Context, target: Target, coeffs: Coeffs | None) -> None:
        self._ctx = ctx
        self._target = target
        plan = ctx.plan
        tensor = plan.merge.tensors[target.placed.index]
        self.name = tensor.name
        self._n = prod(tensor.shape)
        self._source = OpenTensor(ctx, tensor, self._n)
        self._spec = plan.specs.spec(target.placed.index)
        self._state: Round | Coeffs = plan.method.start(self._spec) if coeffs is None else coeffs
        needs = of_tensor(plan.method, self._spec, self._state, widest(plan.specs, tensor))
        self._held = plan.specs.held(target.placed.index)
        self.least = needs.statistics + self._held
        self.want = self.least + needs.entries
        reads = plan.reads if isinstance(self._state, Round) else 1
        self.weight = reads * self._source.nbytes
        self.granted = 0
        self.moved = 0
        self.tiles = 1
        self._measure: Measure | None = None
        self._doubtful: Folded | None = None
        self._kept: Kept | None = None
        self._program: Program | None = None
        self._tiling: Tiling | None = None
        self._stats: StreamStats | None = None
        self._writer: Writer | None = None

    def open(self) -> None:
        """Opens sources and unit."""
        self._source.open()
        self._target.unit.open()
        self._next_pass()

    def _next_pass(self) -> None:
        plan = self._ctx.plan
        method, spec, state = plan.method, self._spec, self._state
        if isinstance(state, Round):
            shared, room = None, self.granted - self.least
            if not is_sum(state):
                shared = new_shared(state, self._source.num_models, room, self._n)
            elif state.op == "reduce" and state.coeffs is not None and not self._source.marks:
                self._kept = Kept.of(self._ctx.backend, method.apply(spec, state.coeffs), self._n, room)
            self._begin(measure_of(self._ctx, self._source, spec, method, state, shared, self._kept))
            return
        self._measure = None
        self._program = method.apply(spec, state)
        if self._source.by_deltas:
            # The models' tiles are task vectors already.
            self._program = replace(self._program, subtract=False, base=plan.merge.output is None)
        if self._kept is not None:
            self._program = self._kept.marked(self._program)
        require(self._ctx.backend, self._program.features)
        self._refuse_size(of_program(self._program, spec))
        self._tiling = flat(self._n, self._source.tile, slab_unit(self._program))
        self._source.check_room(self._tiling)
        self._stats = StreamStats(self._source.num_models, -(-self._n // CANONICAL_BLOCK))
        itemsize = self._source.tensor.dtype.itemsize
        self._writer = Writer(self._target, self._tiling.wide * itemsize, self._tiling.count)
        self.tiles = self._tiling.count

    def _begin(self, measure: Measure) -> None:
        if isinstance(self._state, Round) and isinstance(measure, SumsMeasure):
            self._refuse_size(of_round(self._ctx.plan.method, self._spec, self._state, 1))
            measure.begin()
        self._measure = measure
        self.tiles = measure.tiles

    def _refuse_size(self, needs: Needs) -> None:
        """Statistics beyond what was granted, in a pass that the method's first round did not let foresee."""
        if needs.statistics > max(self.granted, self.least) - self._held:
            raise ArgumentError(
                "the memory budget cannot hold the statistics of the tensor",
                code="memory.too-small",
                tensor=self.name,
                expected=f"{needs.statistics + self._held} bytes",
                got=f"{self.granted}",
                hint="Give more memory or fewer threads.",
            )

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
        assert self._program is not None and self._tiling is not None and self._writer is not None
        piece = self._tiling.piece(index)
        views = [source.load(worker, m, piece) for m in range(source.num_models)]
        base = None
        if source.has_base and (self._program.base or not source.by_deltas):
            base = source.load(worker, source.num_models, piece, anchor=True)
        self._ctx.backend.stream(
            self._program,
            piece,
            base if self._program.base else None,
            views,
            worker.tiles.view(-1, dtype, None, piece.numel),
            compute=self._spec.compute,
            stats=self._stats,
            threads=1,
            marks=source.load_marks(worker, piece) if self._kept is None else self._kept.views(piece),
        )
        self._writer.put(worker, index, worker.tiles.out[: piece.numel * dtype.itemsize])

    def advance(self) -> bool:
        """After a pass: the method goes on, or the tensor is done."""
        measure = self._measure
        if measure is None:
            self._finish()
            return False
        if self._spec.nan == "error":
            refuse(self._source, measure.nonfinite())
        if isinstance(measure, SumsMeasure):
            folded = measure.finish()
            if self._spec.nan == "error" and SumsMeasure.doubtful(folded):
                # A sum does not know where it went wrong: look at the values once more.
                self._doubtful = folded
                self._begin(Search(self._ctx, self._source, self._spec, StreamStats(self._source.num_models, 0)))
                return True
            self._resolve(Sums((folded,)), measure.visited)
        elif self._doubtful is not None:
            folded, self._doubtful = self._doubtful, None
            self._resolve(Sums((folded,)), measure.visited)
        else:
            assert isinstance(measure, Sharing)
            self._resolve(measure.stats, measure.visited)
        self._next_pass()
        return True

    def _resolve(self, stats: Shared | Sums, visited: int) -> None:
        assert isinstance(self._state, Round)
        self._measure = None
        self._state = self._ctx.plan.method.resolve(self._spec, self._state, stats, visited)

    def _finish(self) -> None:
        stats = self._stats
        assert stats is not None and self._writer is not None
        if self._spec.nan == "error":
            sources = range(len(self._source.streams))
            refuse(self._source, ((source, *stats.nonfinite(source)) for source in sources))
        warnings = self._look_at_values(stats)
        self._source.close()
        models = range(self._spec.num_models)
        n = self._n
        statistics = {
            "density": [stats.kept(m) / n for m in models],
            "norms": [_norm(stats.sum_squares(m)) for m in models],
            "sign_conflicts": stats.conflicts() / n,
        }
        self._stats = self._kept = None
        self._writer.finish(self._ctx, statistics, warnings)

    def _look_at_values(self, stats: StreamStats) -> list[str]:
        first, count = stats.nonfinite(self._source.num_models + 1)
        if first < 0:
            return []
        if self._spec.nan == "error":
            raise self._source.refuse_nonfinite(None, first, count)
        text = f"tensor '{self.name}': {count} values of the output are NaN or Inf, the first at flat index {first}"
        self._ctx.warn(text)
        return [text]
