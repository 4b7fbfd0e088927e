"""The measuring passes that sum: over a program, of dot products, of the divergence of rows."""

from __future__ import annotations

from abc import abstractmethod
from array import array
from math import isfinite
from typing import TypeAlias

from .._cpu import BlockSums
from .._keeping import Kept
from .._methods.protocol import Round, Spec
from ..ops.program import Program
from ..ops.sums import Gram, Reduce
from .context import Context, OpenTensor, Worker
from .needs import sum_segments
from .passes import Measure
from .tiling import Tiling, flat, gram_tiling, slab_unit

__all__ = ["BlocksMeasure", "DivergenceMeasure", "Folded", "SumsMeasure"]

Folded: TypeAlias = "tuple[array[float], ...]"
"""The sums of one tensor: per slot, a number for each segment."""


class SumsMeasure(Measure):
    """A pass that sums over each tensor by itself. Its memory is taken by `begin` and given back by `finish`."""

    def __init__(self, ctx: Context, source: OpenTensor, spec: Spec, tiling: Tiling, num_slots: int) -> None:
        super().__init__(ctx, source, spec, tiling)
        self._num_slots = num_slots

    @abstractmethod
    def begin(self) -> None:
        """Takes the memory of the sums."""

    @abstractmethod
    def finish(self) -> Folded:
        """The sums, after the last tile."""

    @staticmethod
    def doubtful(sums: Folded) -> bool:
        """Whether an input may hold NaN or Inf."""
        return not all(isfinite(x) for numbers in sums for x in numbers)


class BlocksMeasure(SumsMeasure):
    """Sums of a program, or dot products, in canonical blocks. kept : where to leave what the program keeps."""

    def __init__(
        self,
        ctx: Context,
        source: OpenTensor,
        spec: Spec,
        round_: Round,
        slots: int,
        request: Gram | tuple[Program, Reduce],
        kept: Kept | None = None,
    ) -> None:
        segments = sum_segments(spec, round_)
        if isinstance(request, Gram):
            tiling = gram_tiling(segments, source.n, source.tile, source.room)
        else:
            tiling = flat(source.n, source.tile, slab_unit(request[0]))
        super().__init__(ctx, source, spec, tiling, slots)
        self._segments = segments
        self._request = request
        self._kept = kept
        self._sums: BlockSums | None = None

    def begin(self) -> None:
        """Takes the memory of the block sums."""
        self._sums = BlockSums(self._num_slots, self._segments.count, self._segments.length)

    def run(self, worker: Worker, index: int) -> None:
        """One tile."""
        piece, backend, compute = self.tiling.piece(index), self.ctx.backend, self.spec.compute
        base, models = self.load(worker, piece)
        assert self._sums is not None
        if isinstance(self._request, Gram):
            base = base if self._request.subtract else None
            backend.gram(self._request, self._sums, piece, base, models, compute=compute, threads=1)
            return
        program, request = self._request
        base = base if program.base else None
        if self._kept is None:
            backend.reduce(program, request, self._sums, piece, base, models, compute=compute, threads=1)
            return
        marks = self._kept.views(piece)
        backend.reduce(program, request, self._sums, piece, base, models, compute=compute, threads=1, kept=marks)

    def finish(self) -> Folded:
        """The tree over the blocks of each segment."""
        assert self._sums is not None
        sums, self._sums = self._sums, None
        return tuple(array("d", sums.fold(slot)) for slot in range(self._num_slots))


class DivergenceMeasure(SumsMeasure):
    """The divergence of each row."""

    def __init__(self, ctx: Context, source: OpenTensor, spec: Spec, row_length: int) -> None:
        super().__init__(ctx, source, spec, flat(source.n, source.tile, row_length), 1)
        self._row_length = row_length
        self._rows: array[float] = array("d")

    def begin(self) -> None:
        """Takes the memory of the rows."""
        self._rows = array("d", bytes(8 * (self.source.n // self._row_length)))

    def run(self, worker: Worker, index: int) -> None:
        """One tile of whole rows."""
        piece = self.tiling.piece(index)
        base, models = self.load(worker, piece)
        assert base is not None
        found = self.ctx.backend.divergence(
            self._row_length, piece, base, models[0], compute=self.spec.compute, threads=1
        )
        first = piece.g0 // self._row_length
        self._rows[first : first + len(found)] = found

    def finish(self) -> Folded:
        """One slot."""
        rows, self._rows = self._rows, array("d")
        return (rows,)
