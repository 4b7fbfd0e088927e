"""Whole tensors as task vectors, for methods over matrices: read tile by tile into torch tensors, and merged."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import TYPE_CHECKING, Any

from .._cpu import StreamStats
from .._methods.matrix import MatrixSpec
from .._methods.protocol import Spec
from ..ops.program import Program
from ..tensors import DType, TensorView
from .context import Context, OpenTensor, Worker
from .passes import refuse
from .tiling import Tiling, flat

if TYPE_CHECKING:
    import torch

    from ..adapters.model import Delta

__all__ = ["TaskVectors", "all_threads", "matrix_spec"]

_COPY = Program((1.0,), (None,), base=False, copy=True)
_DIFFERENCE = Program((1.0, -1.0), (None, None), base=False)
"""x - x0: the task vector, with the bits that a program on top of a base gives it."""

_turn = threading.Lock()
"""One decomposition at a time: each uses all threads of the run."""


def matrix_spec(spec: Spec) -> MatrixSpec:
    """What a method over matrices is told of a tensor, which it sees as a matrix (dimension 0, the rest)."""
    shape = (spec.shape[0], prod(spec.shape[1:])) if len(spec.shape) > 1 else (spec.n, 1)
    return MatrixSpec(spec.name, shape, spec.num_models, spec.params, spec.dialect, spec.seed, spec.tensor)


@contextmanager
def all_threads(count: int) -> Iterator[None]:
    """Torch with `count` threads for the caller, one caller at a time."""
    import torch

    with _turn:
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            yield
        finally:
            torch.set_num_threads(before)


class TaskVectors:
    """The task vectors of one tensor in memory, filled tile by tile; several workers at once."""

    def __init__(self, ctx: Context, source: OpenTensor, spec: Spec) -> None:
        self._ctx = ctx
        self._source = source
        self._spec = spec
        self.tiling: Tiling = flat(source.n, source.tile)
        self.deltas: list[Delta] = []
        self._stats: list[StreamStats] = []

    @property
    def compute(self) -> DType:
        """The dtype of the task vectors."""
        return self._spec.compute

    def take(self) -> None:
        """Allocates the memory."""
        import torch

        kind = torch.float64 if self._spec.compute.name == "F64" else torch.float32
        self.deltas = [torch.empty(self._source.n, dtype=kind) for _ in range(self._spec.num_models)]
        self._stats = [StreamStats(2, 0) for _ in self.deltas]

    def load(self, worker: Worker, index: int) -> None:
        """One tile of every task vector."""
        source, piece = self._source, self.tiling.piece(index)
        base = source.load(worker, source.num_models, piece) if source.has_base else None
        for m, delta in enumerate(self.deltas):
            views = [source.load(worker, m, piece)] + ([base] if base is not None else [])
            program = _DIFFERENCE if base is not None else _COPY
            self._ctx.backend.stream(
                program,
                piece,
                None,
                views,
                self.view(delta, piece.g0, piece.numel),
                compute=self.compute,
                stats=self._stats[m],
                threads=1,
            )

    def view(self, tensor: Any, start: int, count: int) -> TensorView:
        """Consecutive elements of a dense task vector (or of a result like one)."""
        pointer = tensor.data_ptr() + start * tensor.element_size()
        return TensorView(pointer, (count,), (1,), self.compute, tensor)

    def check(self) -> None:
        """After the last tile.

        Raises
        ------
        DataError : NaN or Inf in an input.
        """
        source = self._source
        if source.has_base and self._stats:
            refuse(source, [(source.num_models, *self._stats[0].nonfinite(1))])
        refuse(source, ((m, *stats.nonfinite(0)) for m, stats in enumerate(self._stats)))

    def matrices(self) -> list[Delta]:
        """The task vectors in the shape in which the method takes them, on the run's device."""
        shape = matrix_spec(self._spec).shape
        return [d.view(shape).to(self._ctx.plan.device) for d in self.deltas]  # type: ignore[union-attr]

    def flat(self, result: Delta) -> torch.Tensor:
        """A merged task vector in the machine's memory, in the dtype of the task vectors, in one dimension."""
        import torch

        dense = result if isinstance(result, torch.Tensor) else result.dense()
        kind = torch.float64 if self.compute.name == "F64" else torch.float32
        return dense.to("cpu", kind).reshape(-1).contiguous()
