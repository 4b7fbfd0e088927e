"""The job of a tensor that is copied."""

from __future__ import annotations

from math import prod

from ..errors import DataError
from .context import Context, OpenTensor, Worker
from .writer import Target, Writer

__all__ = ["CopyJob"]


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
        self._writer = Writer(target, self._tile, tiles)

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
