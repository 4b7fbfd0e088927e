"""One tensor of a compression: one read of base and experts, one write of the vector and of a mask per expert."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import replace
from math import prod, sqrt
from typing import Literal

from ..._cpu import BlockSums, StreamStats
from ..._methods.protocol import Coeffs
from ...ops.program import Program
from ...ops.sums import Reduce
from ...tensors import CANONICAL_BLOCK, F32, F64, TensorView, dtype_of
from ..buffers import Tiles
from ..context import Context, OpenTensor, Worker
from ..digesting import OrderedDigest
from ..layout import PlacedTensor
from ..passes import refuse
from ..receipts import TensorRecord
from ..tiling import flat
from ..unit import Unit
from ..writer import Target, Writer

__all__ = ["CompressJob", "Found", "MaskWorker"]

_DIFFERENCE = Program((1.0, -1.0), (None, None), base=False)
"""x - x0: the task vector, with the bits that a program on top of a base gives it."""


_MEANS = Reduce(("abs", "agreeing_abs"))


class MaskWorker(Worker):
    """A worker with room for task vectors (in the tiles after those of the sources) and masks."""

    def __init__(self, slots: int, nbytes: int, masks: int, mask_bytes: int) -> None:
        super().__init__(slots, nbytes)
        self.masks = Tiles(masks, mask_bytes)


class Found:
    """What a compression finds of one tensor beside what it writes. base_sha256 : of the base's bytes.

    means : per expert (mean of |d|, mean of |v| where its bit is set).
    """

    base_sha256: str = ""
    means: tuple[tuple[float, float], ...] = ()


class CompressJob:
    """See the module. kind : which marks are the masks. units : of the vector, then of each mask."""

    def __init__(
        self,
        ctx: Context,
        index: int,
        coeffs: Coeffs,
        kind: Literal["agreeing", "useful"],
        units: list[tuple[Unit, PlacedTensor]],
        passed: Callable[[int], None],
        sync: Callable[[Unit], None],
        done: Callable[[Unit], None],
        found: Found,
    ) -> None:
        self._ctx = ctx
        tensor = ctx.plan.merge.tensors[index]
        self._spec = spec = ctx.plan.specs.spec(index)
        self.name = tensor.name
        self._source = OpenTensor(ctx, tensor, prod(tensor.shape))
        self._wide = F64 if spec.compute.name == "F64" else F32
        program = ctx.plan.method.apply(spec, coeffs)
        # Over task vectors: without a base nothing is added to the vector.
        self._program = replace(program, base=False, scale=1.0)
        self._kind = kind
        self._units = units
        self._passed = passed
        self._found = found
        # Task vectors are wider than the sources may be: the usual tile, not the most elements that fit a buffer.
        self._tiling = flat(spec.n, ctx.plan.budget.tile)
        self.tiles = self._tiling.count
        self.want = self.least = 8 * 4 * spec.num_models * -(-spec.n // CANONICAL_BLOCK)
        self.granted = 0
        self.weight = self._source.nbytes
        self.moved = 0
        self._done = done
        targets = [Target(unit, placed, passed, sync, done) for unit, placed in units]
        sizes = [self._tiling.wide * tensor.dtype.itemsize, *([self._tiling.wide // 8] * spec.num_models)]
        self._writers = [Writer(t, size, self.tiles) for t, size in zip(targets, sizes, strict=True)]
        self._base = OrderedDigest(self.tiles)

    def open(self) -> None:
        """Opens sources and outputs, takes the memory of the sums."""
        self._source.open()
        for unit, _ in self._units:
            unit.open()
        models = self._spec.num_models
        self._finite = [StreamStats(2, 0) for _ in range(models)]
        self._stats = StreamStats(models, -(-self._spec.n // CANONICAL_BLOCK))
        # Masks that come with a scale need its two means.
        self._sums = BlockSums(2 * models, 1, self._spec.n) if self._kind == "agreeing" else None

    def run(self, worker: MaskWorker, index: int) -> None:
        """One tile."""
        before = worker.bytes_read
        source, backend = self._source, self._ctx.backend
        piece, compute, models = self._tiling.piece(index), self._spec.compute, self._spec.num_models
        count = piece.numel
        base = source.load(worker, models, piece)
        deltas: list[TensorView] = []
        for m in range(models):
            delta = worker.tiles.view(models + 1 + m, self._wide, None, count)
            views = [source.load(worker, m, piece), base]
            backend.stream(_DIFFERENCE, piece, None, views, delta, compute=compute, stats=self._finite[m], threads=1)
            deltas.append(delta)
        dtype = source.tensor.dtype
        out = worker.tiles.view(-1, dtype, None, count)
        backend.stream(self._program, piece, None, deltas, out, compute=compute, stats=self._stats, threads=1)
        mask_bytes = -(-count // 8)
        byte = dtype_of("U8")
        assert byte is not None
        marks = [worker.masks.view(m, byte, None, mask_bytes) for m in range(models)]
        backend.mark(self._program, self._kind, piece, None, deltas, marks, compute=compute, threads=1)
        if self._sums is not None:
            backend.reduce(self._program, _MEANS, self._sums, piece, None, deltas, compute=compute, threads=1)
        self._writers[0].put(worker, index, worker.tiles.out[: count * dtype.itemsize])
        for m in range(models):
            self._writers[1 + m].put(worker, index, worker.masks.memory[m][:mask_bytes])
        own = worker.tiles.memory[models]
        size = source.streams[models].dtype.itemsize

        def again(other: int) -> memoryview:
            piece = self._tiling.piece(other)
            source.load(worker, models, piece)
            return own[: piece.numel * size]

        self._base.add(index, own[: count * size], again)
        moved = worker.bytes_read - before
        self.moved += moved
        self._passed(moved)

    def advance(self) -> bool:
        """The tensor is done."""
        source, spec, stats = self._source, self._spec, self._stats
        models = range(spec.num_models)
        if spec.nan == "error":
            refuse(source, ((m, *self._finite[m].nonfinite(0)) for m in models))
            refuse(source, [(spec.num_models, *self._finite[0].nonfinite(1))])
            first, number = stats.nonfinite(spec.num_models + 1)
            if first >= 0:
                raise source.refuse_nonfinite(None, first, number)
        source.close()
        if self._sums is not None:
            sums = [array("d", self._sums.fold(slot))[0] / spec.n for slot in range(2 * spec.num_models)]
            self._found.means = tuple((sums[m], sums[spec.num_models + m]) for m in models)
        self._found.base_sha256 = self._base.hexdigest()
        tensor = source.tensor
        statistics = {"norms": [sqrt(s) if (s := stats.sum_squares(m)) < float("inf") else None for m in models]}
        shape: tuple[int, ...] = tensor.shape
        dtype = tensor.dtype.name
        for (unit, placed), writer in zip(self._units, self._writers, strict=True):
            if unit.finish(TensorRecord(placed.name, dtype, shape, writer.digest(), statistics)):
                self._done(unit)
            statistics, shape, dtype = {}, (-(-spec.n // 8),), "U8"
        return False
