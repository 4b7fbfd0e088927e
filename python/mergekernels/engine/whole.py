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


def matrix_spec(spec: Spec, flipped: bool = False) -> MatrixSpec:
    """What a method over matrices is told of a tensor, which it sees as a matrix (dimension 0, the rest).

    flipped : the weight is stored as (in, out), or is an embedding's: the method sees it transposed.
    """
    shape = (spec.shape[0], prod(spec.shape[1:])) if len(spec.shape) > 1 else (spec.n, 1)
    if flipped:
        shape = shape[::-1]
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
    """The task vectors of one tensor in memory, filled tile by tile; several workers at once.

    Those that are products of an adapter's factors stay factors. matrix : what the method is told of the tensor.
    """

    def __init__(self, ctx: Context, source: OpenTensor, spec: Spec) -> None:
        self._ctx = ctx
        self._source = source
        self._spec = spec
        modules = source.made.modules.values() if source.made is not None else ()
        self._flipped = any(m.site.kind in ("fan_in_fan_out", "embedding") for m in modules)
        self.matrix = matrix_spec(spec, self._flipped)
        self.tiling: Tiling = flat(source.n, source.tile)
        self._dense: dict[int, Any] = {}
        self._stats: dict[int, StreamStats] = {}

    @property
    def compute(self) -> DType:
        """The dtype of the task vectors."""
        return self._spec.compute

    @property
    def _kind(self) -> torch.dtype:
        import torch

        return torch.float64 if self.compute.name == "F64" else torch.float32

    def take(self) -> None:
        """Allocates the memory."""
        import torch

        made = self._source.made
        for m in range(self._spec.num_models):
            if made is None or not made.low_rank(m):
                self._dense[m] = torch.empty(self._source.n, dtype=self._kind)
                self._stats[m] = StreamStats(2 if self._source.has_base and made is None else 1, 0)

    def load(self, worker: Worker, index: int) -> None:
        """One tile of every task vector that is no product."""
        source, piece = self._source, self.tiling.piece(index)
        base = None
        if source.has_base and source.made is None:
            base = source.load(worker, source.num_models, piece)
        for m, delta in self._dense.items():
            # Where adapters make tiles, these are task vectors already.
            views = [source.load(worker, m, piece)] + ([base] if base is not None else [])
            self._ctx.backend.stream(
                _DIFFERENCE if base is not None else _COPY,
                piece,
                None,
                views,
                self.view(delta, piece.g0, piece.numel),
                compute=self.compute,
                stats=self._stats[m],
                threads=1,
            )

    def view(self, tensor: torch.Tensor, start: int, count: int) -> TensorView:
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
        if source.has_base and source.made is None and self._stats:
            refuse(source, [(source.num_models, *self._stats[0].nonfinite(1))])
        refuse(source, ((m, *stats.nonfinite(0)) for m, stats in self._stats.items()))

    def matrices(self) -> list[Delta]:
        """The task vectors as the method takes them, on the run's device; the memory is the caller's from here on."""
        dense, self._dense = self._dense, {}
        return [self._matrix(m, dense.pop(m, None)) for m in range(self._spec.num_models)]

    def _matrix(self, model: int, dense: torch.Tensor | None) -> Delta:
        import torch

        from ..adapters.model import Factors

        device = self._ctx.plan.device
        m, n = self.matrix.shape
        if dense is not None:
            return (dense.view(n, m).T if self._flipped else dense.view(m, n)).to(device)
        if len(self._spec.shape) < 2:
            return torch.zeros((m, n), dtype=self._kind, device=device)
        made = self._source.made
        factors = made.factors(model) if made is not None else None
        if factors is None:
            empty = torch.zeros(0, dtype=self._kind, device=device)
            return Factors(empty.reshape(m, 0), empty.reshape(0, n))
        b, a = factors if not self._flipped else (factors[1].T, factors[0].T)
        return Factors(b.to(device), a.to(device))

    def flat(self, result: Delta) -> torch.Tensor:
        """A merged task vector as the weight is stored: in the machine's memory, in one dimension, dense."""
        import torch

        dense = result if isinstance(result, torch.Tensor) else result.dense()
        if self._flipped:
            dense = dense.T
        return dense.to("cpu", self._kind).reshape(-1).contiguous()
