"""The measuring passes over one tensor: a sample, a sweep, votes, sums. They take statistics and write nothing."""

from __future__ import annotations

from collections.abc import Iterator

from .._backends.dispatch import require
from .._cpu import StreamStats, SweepStats
from .._keeping import Kept
from .._methods.protocol import Method, Round, Spec
from ..ops.program import Program
from ..ops.select import new_stats
from ..ops.selection import SAMPLE_BLOCK, Selection
from ..ops.sweeps import Sweep
from ..tensors import Piece, TensorView
from .context import Context, OpenTensor, Worker
from .memory import ENTRY_BYTES, MIN_ENTRIES
from .needs import num_slots, of_round
from .passes import Measure
from .sampling import sample_starts
from .summing import BlocksMeasure, DivergenceMeasure
from .tiling import Tiling, flat, slab_unit

__all__ = ["Search", "Shared", "Sharing", "measure_of", "new_shared", "sweep_nonfinite"]

Shared = SweepStats | StreamStats
"""Statistics to which any number of tensors may add."""


def new_shared(round_: Round, num_models: int, nbytes: int, most: int) -> Shared:
    """Empty statistics of a selection or a vote. nbytes : memory for entries. most : more entries cannot come."""
    if round_.op == "votes":
        return StreamStats(num_models, 0)
    assert round_.selection is not None
    sweep = round_.selection.sweep
    searches = max(1, sum(i is not None for i in sweep.intervals))
    capacity = min(most, max(MIN_ENTRIES, nbytes // (ENTRY_BYTES * searches)))
    return new_stats(sweep, capacity)


class Sharing(Measure):
    """A pass that adds to `stats`, which other tensors may share."""

    def __init__(self, ctx: Context, source: OpenTensor, spec: Spec, tiling: Tiling, stats: Shared) -> None:
        super().__init__(ctx, source, spec, tiling)
        self.stats = stats


class _Sweep(Sharing):
    """A sweep of a selection, or a sample for it."""

    def __init__(self, ctx: Context, source: OpenTensor, spec: Spec, selection: Selection, stats: SweepStats) -> None:
        super().__init__(ctx, source, spec, flat(source.n, source.tile), stats)
        self._counts = stats
        self._sweep = sweep = selection.sweep
        searched = {interval.model for interval in sweep.intervals if interval is not None}
        self._wanted = [m for m in range(source.num_models) if m in searched or sweep.joint]
        self._starts: tuple[int, ...] = ()
        if selection.sample < 1.0:
            self._starts = tuple(sample_starts(source.n, selection.sample, spec.tensor))
            self._per_tile = source.tile // SAMPLE_BLOCK
            self.tiles = -(-len(self._starts) // self._per_tile)
            self.visited = len(self._starts) * SAMPLE_BLOCK

    def run(self, worker: Worker, index: int) -> None:
        """One tile."""
        if not self.sampled:
            piece = self.tiling.piece(index)
            self._add(piece, {m: self.source.load(worker, m, piece) for m in self._sources})
            return
        starts = self._starts[index * self._per_tile : (index + 1) * self._per_tile]
        if self._sweep.rows is None and self.source.made is None:
            views = {m: self.source.load_blocks(worker, m, starts, SAMPLE_BLOCK) for m in self._sources}
            self._add(Piece.flat(0, len(starts) * SAMPLE_BLOCK), views)
            return
        # Where the key depends on the row, or tiles are made, every block must be at its place.
        for start in starts:
            piece = Piece.flat(start, SAMPLE_BLOCK)
            self._add(piece, {m: self.source.load(worker, m, piece) for m in self._sources})

    @property
    def _sources(self) -> list[int]:
        base = [self.source.num_models] if self.source.has_base and self._sweep.base else []
        return self._wanted + base

    def _add(self, piece: Piece, views: dict[int, TensorView]) -> None:
        self.ctx.backend.sweep(
            self._sweep,
            self._counts,
            piece,
            views.get(self.source.num_models),
            [views.get(m) for m in range(self.source.num_models)],
            compute=self.spec.compute,
            tensor=self.spec.tensor,
            offset=self.spec.offset,
            threads=1,
        )

    def nonfinite(self) -> Iterator[tuple[int, int, int]]:
        """By search."""
        if not self.sampled:
            yield from sweep_nonfinite(self._sweep, self._counts, self.source.num_models)


def sweep_nonfinite(sweep: Sweep, stats: SweepStats, num_models: int) -> Iterator[tuple[int, int, int]]:
    """(source, first scope index, count) by search. Of a joint key it is not known whose value it was: a later pass
    tells.
    """
    if sweep.joint:
        return
    for number, interval in enumerate(sweep.intervals):
        if interval is not None:
            yield interval.model, *stats.nonfinite(number)
    yield num_models, *stats.nonfinite(len(sweep.intervals))


class Search(Sharing):
    """A program without output: votes, and whether and where a value is not finite."""

    def __init__(
        self, ctx: Context, source: OpenTensor, spec: Spec, stats: StreamStats, program: Program | None = None
    ) -> None:
        if program is None:
            models = source.num_models
            program = Program((1.0,) * models, (None,) * models, base=source.has_base)
        super().__init__(ctx, source, spec, flat(source.n, source.tile, slab_unit(program)), stats)
        self._votes = stats
        self._program = program

    def run(self, worker: Worker, index: int) -> None:
        """One tile."""
        piece = self.tiling.piece(index)
        base, models = self.load(worker, piece)
        base = base if self._program.base else None
        self.ctx.backend.stream(
            self._program, piece, base, models, None, compute=self.spec.compute, stats=self._votes, threads=1
        )

    def nonfinite(self) -> Iterator[tuple[int, int, int]]:
        """By source."""
        for source in range(len(self.source.streams)):
            yield source, *self._votes.nonfinite(source)


def measure_of(
    ctx: Context,
    source: OpenTensor,
    spec: Spec,
    method: Method,
    round_: Round,
    shared: Shared | None,
    kept: Kept | None = None,
) -> Measure:
    """The pass for a round. shared : where it adds, for selections and votes. kept : where to leave what a program
    keeps, for sums over one.

    Raises
    ------
    BackendError : the backend lacks what the pass needs. ArgumentError : a tile of this run cannot hold its pieces.
    """
    require(ctx.backend, of_round(method, spec, round_, 1).features)
    if round_.op == "select":
        assert round_.selection is not None and isinstance(shared, SweepStats)
        return _Sweep(ctx, source, spec, round_.selection, shared)
    if round_.op == "divergence":
        return DivergenceMeasure(ctx, source, spec, round_.row_length)
    slots = num_slots(method, spec, round_)
    if round_.op == "gram":
        assert round_.gram is not None
        return BlocksMeasure(ctx, source, spec, round_, slots, round_.gram)
    assert round_.coeffs is not None
    program = method.apply(spec, round_.coeffs)
    if round_.op == "votes":
        assert isinstance(shared, StreamStats)
        return Search(ctx, source, spec, shared, program)
    assert round_.reduce is not None
    return BlocksMeasure(ctx, source, spec, round_, slots, (program, round_.reduce), kept)
