"""What the jobs of a run share: input files, backend, counters; and what each worker owns."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from .._backends._device import place
from .._backends.dispatch import Backend, load
from .._methods.matrix import folds_scale
from ..errors import ArgumentError, DataError
from ..tensors import CANONICAL_BLOCK, DType, Piece, TensorView
from .buffers import Tiles
from .fileops import read_exact
from .generated import Generated
from .inputs import InputFiles, Stream, streams_of
from .io import Io
from .plan import Plan
from .resolved import ResolvedTensor, sources_of
from .survey import widest
from .tiling import Tiling

__all__ = ["Context", "OpenTensor", "Worker"]


class Worker:
    """One thread's tiles, and the bytes it has read."""

    def __init__(self, slots: int, nbytes: int) -> None:
        self.tiles = Tiles(slots, nbytes)
        self.bytes_read = 0


@dataclass
class Context:
    """Shared by all jobs of one run. warnings : said by jobs, in any order."""

    plan: Plan
    io: Io
    inputs: InputFiles
    backend: Backend
    warnings: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @staticmethod
    def of(plan: Plan, io: Io) -> Context:
        """The context of a plan; nothing is opened yet."""
        return Context(plan, io, InputFiles(io, plan.merge.inputs), place(load(plan.backend), plan.device))

    def workers(self) -> list[Worker]:
        """The workers that the plan's budget pays for."""
        budget = self.plan.budget
        return [Worker(budget.sources + 1, budget.buffer) for _ in range(budget.threads)]

    def warn(self, text: str) -> None:
        """Adds a warning to the report."""
        with self._lock:
            self.warnings.append(text)


class OpenTensor:
    """The sources of one output tensor: models (and what accompanies them) in order, then the base; open files, and
    tiles of elements.

    made : of a tensor for which adapters make some of the sources, else None. held : bytes of their factors.
    by_deltas : whether the models' tiles are task vectors, see `engine.generated`.
    n : elements. tile : elements of a usual tile, a multiple of 4096. room : elements that a tile's memory can hold.
    """

    def __init__(self, ctx: Context, tensor: ResolvedTensor, n: int) -> None:
        self.tensor = tensor
        self.n = n
        merge = ctx.plan.merge
        self._io = ctx.io
        self._files = ctx.inputs
        self.streams: list[Stream] = streams_of(merge.inputs, sources_of(tensor), ctx.inputs.first)
        self.has_base = tensor.base is not None
        self._first_companion = len(tensor.models) - tensor.companions
        self.marks = streams_of(merge.inputs, tensor.marks, ctx.inputs.first)
        self.made: Generated | None = None
        self.by_deltas = ctx.plan.specs.generated.get(tensor.name, False)
        if tensor.name in ctx.plan.specs.generated:
            compute = ctx.plan.specs.compute_of(tensor.name)
            specs = ctx.plan.specs
            fold = not specs.wants.raw and (specs.whole is None or folds_scale(tensor.params, merge.dialect))
            self.made = Generated(merge, tensor, compute, self.by_deltas, ctx.backend, fold)
        self.held = self.made.held if self.made is not None else 0
        unread = self.made.unread if self.made is not None else ()
        self.read_streams = [s for i, s in enumerate(self.streams) if i not in unread]
        self.nbytes = sum(s.nbytes for s in (*self.read_streams, *self.marks))
        budget = ctx.plan.budget
        size = widest(ctx.plan.specs, tensor)
        self.tile = budget.tile * budget.itemsize // size // CANONICAL_BLOCK * CANONICAL_BLOCK
        self.room = budget.buffer // size
        self._fds: dict[int, int] = {}
        self._where: list[tuple[int, Stream, str]] = []

    @property
    def num_models(self) -> int:
        """Sources without the base: models, and what accompanies them."""
        return len(self.streams) - self.has_base

    def open(self) -> None:
        """Takes descriptors.

        Raises
        ------
        InputError : a file is gone or was changed.
        """
        streams = [*self.streams, *self.marks]
        self._fds = self._files.acquire([s.file for s in streams])
        self._where = [(self._fds[s.file], s, str(self._files.files[s.file].path)) for s in streams]
        if self.made is not None:
            self.made.open()

    def close(self) -> None:
        """Gives descriptors back, after a last look at the files."""
        if self.made is not None:
            self.made.close()
        if self._fds:
            numbers, self._fds = list(self._fds), {}
            try:
                self._files.check(numbers)
            finally:
                self._files.release(numbers)

    def read_bytes(self, worker: Worker, source: int, memory: memoryview, start: int) -> None:
        """Fills `memory` from byte `start` of a source."""
        fd, stream, path = self._where[source]
        read_exact(self._io, fd, memory, stream.offset + start, path)
        worker.bytes_read += len(memory)

    def check_room(self, tiling: Tiling) -> None:
        """Refuses a cut into pieces that the tiles of this run cannot hold.

        Raises
        ------
        ArgumentError : where the plan could not foresee the pass.
        """
        if tiling.largest <= self.room:
            return
        raise ArgumentError(
            "the tiles of this run cannot hold whole rows of the tensor",
            code="memory.too-small",
            tensor=self.tensor.name,
            expected=f"tiles of {tiling.largest} elements",
            got=f"{self.room}",
            hint="Give more memory or fewer threads.",
        )

    def load(
        self, worker: Worker, source: int, piece: Piece, *, slot: int | None = None, anchor: bool = False
    ) -> TensorView:
        """A piece of a source in one of the worker's tiles, read or made; the view of it, dense and flat.

        slot : the tile; that of the source if None. anchor : of the base, what the merged task vector is added to;
        matters where task vectors stand for the models.
        """
        slot = source if slot is None else slot
        if self.made is not None:
            view = self.made.load(worker, source, piece, self._read, slot=slot, anchor=anchor)
            if view is not None:
                return view
        return self._read(worker, source, piece, slot)

    def _read(self, worker: Worker, source: int, piece: Piece, slot: int) -> TensorView:
        """Reads a piece of a source, as it is stored, into a tile."""
        fd, stream, path = self._where[source]
        size = stream.dtype.itemsize
        memory, offset = worker.tiles.memory[slot], stream.offset
        if piece.rows <= 1 or piece.cols == piece.ld:
            read_exact(self._io, fd, memory[: piece.numel * size], offset + piece.g0 * size, path)
        else:
            step = piece.cols * size
            for row in range(piece.rows):
                start = offset + (piece.g0 + row * piece.ld) * size
                read_exact(self._io, fd, memory[row * step : (row + 1) * step], start, path)
        worker.bytes_read += piece.numel * size
        return worker.tiles.view(slot, stream.dtype, self._cast(source), piece.numel)

    def load_marks(self, worker: Worker, piece: Piece) -> list[TensorView]:
        """Reads the masks of a flat piece that begins at a multiple of 8."""
        views = []
        for slot in range(len(self.streams), len(self.streams) + len(self.marks)):
            fd, stream, path = self._where[slot]
            size = -(-piece.numel // 8)
            read_exact(self._io, fd, worker.tiles.memory[slot][:size], stream.offset + piece.g0 // 8, path)
            worker.bytes_read += size
            views.append(worker.tiles.view(slot, stream.dtype, None, size))
        return views

    def _cast(self, source: int) -> DType | None:
        """The load cast of a source: models and base have it, what accompanies the models does not."""
        return None if self._first_companion <= source < self.num_models else self.tensor.cast

    def load_blocks(self, worker: Worker, source: int, starts: Sequence[int], block: int) -> TensorView:
        """Reads blocks of `block` elements, one after the other into one tile. Not for sources that are made."""
        fd, stream, path = self._where[source]
        size = stream.dtype.itemsize
        step = block * size
        memory = worker.tiles.memory[source]
        position = 0
        for start in starts:
            read_exact(self._io, fd, memory[position : position + step], stream.offset + start * size, path)
            position += step
        worker.bytes_read += position
        return worker.tiles.view(source, stream.dtype, self._cast(source), len(starts) * block)

    def label(self, source: int) -> str:
        """What an error calls a source: its input, and the base as such."""
        name = self.streams[source].label
        return f"base {name}" if self.has_base and source == len(self.streams) - 1 else name

    def refuse_nonfinite(self, source: int | None, first: int, count: int) -> DataError:
        """The error for NaN or Inf in a source, or (None) for overflow in the output."""
        if source is None:
            return DataError(
                f"{count} results do not fit in {self.tensor.dtype}, or are NaN, the first at flat index {first}",
                code="data.overflow",
                tensor=self.tensor.name,
                expected="finite results",
                hint="Use a wider out_dtype, or nan: propagate to let Inf through.",
            )
        path = self._files.files[self.streams[source].file].path
        return DataError(
            f"{count} values of {self.label(source)} are NaN or Inf, the first at flat index {first}",
            code="data.nonfinite",
            tensor=self.tensor.name,
            file=str(path),
            expected="finite values",
            hint="Repair the input, or use nan: propagate to let them through.",
        )
