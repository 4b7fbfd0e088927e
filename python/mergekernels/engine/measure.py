"""The measuring passes over one tensor: a sample, a sweep, a vote count. They add to statistics and write nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .._cpu import StreamStats, SweepStats
from .._methods.protocol import Method, Round, Spec
from ..ops.program import Program
from ..ops.select import new_stats
from ..ops.selection import SAMPLE_BLOCK
from ..ops.sweeps import Sweep
from ..tensors import Piece
from .context import Context, OpenTensor, Worker
from .memory import ENTRY_BYTES, MIN_ENTRIES
from .sampling import sample_starts

__all__ = ["Measure", "new_statistics"]


def new_statistics(round_: Round, num_models: int, nbytes: int, most: int) -> SweepStats | StreamStats:
    """Empty statistics for a round. nbytes : memory for entries. most : more entries than this cannot come."""
    if round_.op == "votes":
        return StreamStats(num_models, 0)
    assert round_.selection is not None
    sweep = round_.selection.sweep
    models = max(1, sum(i is not None for i in sweep.intervals))
    capacity = min(most, max(MIN_ENTRIES, nbytes // (ENTRY_BYTES * models)))
    return new_stats(sweep, capacity)


@dataclass
class Measure:
    """One pass of a round over one tensor, adding to `stats`.

    tiles : how many tasks it is cut into; 0 if a sample has nothing to visit here. visited : elements it looks at.
    """

    ctx: Context
    source: OpenTensor
    spec: Spec
    stats: SweepStats | StreamStats
    tiles: int
    visited: int
    sweep: Sweep | None = None
    program: Program | None = None
    starts: tuple[int, ...] = ()

    @staticmethod
    def of(
        ctx: Context, source: OpenTensor, spec: Spec, method: Method, round_: Round, stats: SweepStats | StreamStats
    ) -> Measure:
        """The pass for a round."""
        if round_.op == "votes":
            assert round_.coeffs is not None
            program = method.apply(spec, round_.coeffs)
            return Measure(ctx, source, spec, stats, source.num_tiles, source.n, program=program)
        selection = round_.selection
        assert selection is not None
        whole = Measure(ctx, source, spec, stats, source.num_tiles, source.n, sweep=selection.sweep)
        if selection.sample >= 1.0:
            return whole
        starts = tuple(sample_starts(source.n, selection.sample, spec.tensor))
        per_tile = source.tile // SAMPLE_BLOCK
        visited = len(starts) * SAMPLE_BLOCK
        return replace(whole, tiles=-(-len(starts) // per_tile), visited=visited, starts=starts)

    @property
    def sampled(self) -> bool:
        """True if this pass looks at a part of the tensor."""
        return self.visited < self.source.n

    @property
    def nbytes(self) -> int:
        """Bytes that the pass reads, about."""
        return self.source.nbytes * self.visited // max(1, self.source.n)

    def run(self, worker: Worker, index: int) -> None:
        """One tile."""
        if self.program is not None:
            self._votes(worker, index)
        else:
            self._sweep(worker, index)

    def _sweep(self, worker: Worker, index: int) -> None:
        sweep, source = self.sweep, self.source
        assert sweep is not None and isinstance(self.stats, SweepStats)
        searched = {interval.model for interval in sweep.intervals if interval is not None}
        wanted = [m for m in range(source.num_models) if m in searched or sweep.joint]
        if source.has_base and sweep.base:
            wanted.append(source.num_models)
        if self.starts:
            per_tile = source.tile // SAMPLE_BLOCK
            starts = self.starts[index * per_tile : (index + 1) * per_tile]
            views = {m: source.load_blocks(worker, m, starts, SAMPLE_BLOCK) for m in wanted}
            piece = Piece.flat(0, len(starts) * SAMPLE_BLOCK)
        else:
            start = index * source.tile
            count = min(source.tile, source.n - start)
            views = {m: source.load(worker, m, start, count) for m in wanted}
            piece = Piece.flat(start, count)
        self.ctx.backend.sweep(
            sweep,
            self.stats,
            piece,
            views.get(source.num_models) if sweep.base else None,
            [views.get(m) for m in range(source.num_models)],
            compute=self.spec.compute,
            tensor=self.spec.tensor,
            offset=self.spec.offset,
            threads=1,
        )

    def _votes(self, worker: Worker, index: int) -> None:
        source = self.source
        assert self.program is not None and isinstance(self.stats, StreamStats)
        start = index * source.tile
        count = min(source.tile, source.n - start)
        views = [source.load(worker, m, start, count) for m in range(len(source.streams))]
        self.ctx.backend.stream(
            self.program,
            Piece.flat(start, count),
            views.pop() if source.has_base else None,
            views,
            None,
            compute=self.spec.compute,
            stats=self.stats,
            threads=1,
        )
