"""Whole tensors as task vectors, for methods over matrices: read tile by tile into torch tensors, and merged."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .._cpu import StreamStats
from .._methods.matrix import MatrixSpec
from .._methods.protocol import Spec
from .._methods.spectral.layout import Layout
from ..ops.program import Program
from ..tensors import DType, TensorView
from .context import Context, OpenTensor, Worker
from .passes import refuse
from .specs import matrix_spec
from .tiling import Tiling, flat

if TYPE_CHECKING:
    import torch

    from ..adapters.model import Delta, Factors

__all__ = ["TaskVectors", "all_threads"]

_COPY = Program((1.0,), (None,), base=False, copy=True)
_DIFFERENCE = Program((1.0, -1.0), (None, None), base=False)
"""x - x0: the task vector, with the bits that a program on top of a base gives it."""

_turn = threading.Lock()
"""One decomposition at a time: each uses all threads of the run."""


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

    Those that are products of an adapter's factors stay factors. specs : what the method is told of the tensor, which
    it sees as one matrix, or as several (experts). plain : it is no matrix to the method. flipped : it sees the weight
    transposed, because it is stored as (in, out) or is an embedding's.
    """

    def __init__(self, ctx: Context, source: OpenTensor, spec: Spec) -> None:
        self._ctx = ctx
        self._source = source
        self._spec = spec
        modules = source.made.modules.values() if source.made is not None else ()
        self.layout: Layout = ctx.plan.specs.layout(spec)
        self.plain = self.layout.plain
        # Mathematics is done in (out, in), whatever the orientation in which the base stores a weight.
        transposed = any(m.site.kind in ("fan_in_fan_out", "embedding") for m in modules)
        self.flipped = transposed and not self.plain and self.layout.count == 1
        self.specs = [self._oriented(matrix_spec(spec, self.layout, i)) for i in range(self.layout.count)]
        self.tiling: Tiling = flat(source.n, source.tile)
        self._dense: dict[int, Any] = {}
        self._stats: dict[int, StreamStats] = {}

    def _oriented(self, spec: MatrixSpec) -> MatrixSpec:
        modules = self._source.made.modules if self._source.made is not None else {}
        scales = tuple(modules[m].scale if m in modules else 1.0 for m in range(spec.num_models))
        return replace(spec, shape=spec.shape[::-1] if self.flipped else spec.shape, scales=scales)

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
            base = source.load(worker, source.num_models, piece, slot=1)
        for m, delta in self._dense.items():
            # Where adapters make tiles, these are task vectors already.
            views = [source.load(worker, m, piece, slot=0)] + ([base] if base is not None else [])
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

    def matrices(self) -> list[list[Delta]]:
        """For each of `specs` the task vectors on the run's device; the memory is the caller's from here on."""
        dense, self._dense = self._dense, {}
        columns = [self._of_model(m, dense.pop(m, None)) for m in range(self._spec.num_models)]
        return [list(row) for row in zip(*columns, strict=True)]

    def _of_model(self, model: int, dense: torch.Tensor | None) -> list[Delta]:

        from ..adapters.model import Factors

        device, layout = self._ctx.plan.device, self.layout
        if dense is not None:
            parts = dense.view(layout.count, layout.m, layout.n).to(device)
            return [self._matrix(p.T if self.flipped else p) for p in parts]
        made = self._source.made
        factors = made.factors(model) if made is not None else None
        if factors is None:
            return [_nothing(*spec.shape, self._kind, device) for spec in self.specs]
        b, a = (f.to(device) for f in factors)
        if self.plain or layout.count > 1:
            product = (b @ a).view(layout.count, layout.m, layout.n)
            return [self._matrix(p) for p in product]
        return [Factors(a.T, b.T) if self.flipped else Factors(b, a)]

    def _matrix(self, matrix: torch.Tensor) -> Delta:
        """A dense task vector; of a model that changes nothing, factors of rank 0."""
        if self._source.has_base and not bool(matrix.any()):
            return _nothing(matrix.shape[0], matrix.shape[1], self._kind, matrix.device)
        return matrix

    def flat(self, results: list[Delta]) -> torch.Tensor:
        """Merged task vectors as the weight is stored: in the machine's memory, in one dimension, dense."""
        import torch

        parts = []
        for result in results:
            dense = result if isinstance(result, torch.Tensor) else result.dense()
            dense = dense.T if self.flipped else dense
            parts.append(dense.to("cpu", self._kind).reshape(-1))
        return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)


def _nothing(m: int, n: int, kind: torch.dtype, device: Any) -> Factors:
    import torch

    from ..adapters.model import Factors

    empty = torch.zeros(0, dtype=kind, device=device)
    return Factors(empty.reshape(m, 0), empty.reshape(0, n))
