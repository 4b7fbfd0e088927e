"""The job of a merged tensor: through its method's rounds, then the writing pass."""

from __future__ import annotations

from dataclasses import replace
from math import isfinite, sqrt

from .._backends.dispatch import require
from .._cpu import StreamStats
from .._methods.protocol import Coeffs, Round
from ..ops.program import Program
from ..tensors import CANONICAL_BLOCK
from .context import Context, Worker
from .needs import of_program
from .passes import refuse
from .rounds import Rounds
from .tiling import Tiling, flat, slab_unit
from .writer import Target, Writer

__all__ = ["MergeJob"]


def _norm(squares: float) -> float | None:
    """The root, None where it is not a number that JSON has."""
    return sqrt(squares) if isfinite(squares) else None


class MergeJob(Rounds):
    """One merged tensor: rounds until the method has its coefficients (unless they are given), then the fused pass."""

    def __init__(self, ctx: Context, target: Target, coeffs: Coeffs | None) -> None:
        plan, index = ctx.plan, target.placed.index
        spec = plan.specs.spec(index)
        state: Round | Coeffs = plan.method.start(spec) if coeffs is None else coeffs
        super().__init__(ctx, index, plan.method, spec, state, keeps=True)
        self._target = target
        self.weight = (plan.reads if isinstance(state, Round) else 1) * self._source.nbytes
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
        if self._next_measure():
            return
        plan, spec, state = self._ctx.plan, self._spec, self._state
        assert isinstance(state, Coeffs)
        self._program = self._method.apply(spec, state)
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

    def run(self, worker: Worker, index: int) -> None:
        """One tile of the current pass."""
        self._target.passed(self._tile(worker, index))

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
        if self._measured(measure):
            self._next_pass()
        return True

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
