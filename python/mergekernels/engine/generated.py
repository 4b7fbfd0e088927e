"""Tiles of models that an adapter makes: the stored tensor of a model, and the product of the adapter's factors.

Two ways, by method:

- *by deltas*, where the result is the base plus a function of task vectors: the models' tiles are their task vectors
  and the base's are zeros, until the writing pass adds the merged task vector to the base. The task vector of an
  adapter on the base itself is the product alone, not rounded to the base's dtype, and nothing of the model is read.
- *as models*, for all other methods: the stored values widened to the compute dtype, plus the product, rounded once.

An element of a product is +0 + b[0] a[0] + b[1] a[1] + ..., every operation rounded to the compute dtype, so that it
has the same bits in whatever tile, on whatever machine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from .. import _cpu
from .._backends._isa import isa
from .._native import as_tuple
from ..adapters.model import Module
from ..errors import DataError
from ..ops.program import Program
from ..tensors import F64, DType, Piece, TensorView
from .adapted import factor_bytes, low_rank_sources, module_of
from .resolved import ResolvedMerge, ResolvedTensor, sources_of

if TYPE_CHECKING:
    from .._backends.dispatch import Backend
    from ..adapters.model import Factors
    from .context import Worker

__all__ = ["SPARE_SLOTS", "Generated", "weight_factors"]

SPARE_SLOTS = 2
"""Tiles of a worker beside those of the sources: what a model stores, and what the base does."""

_COPY = Program((1.0,), (None,), base=False, copy=True)
_DIFFERENCE = Program((1.0, -1.0), (None, None), base=False)


class Reader(Protocol):
    """Reads a piece of a source, as it is stored, into a tile of a worker."""

    def __call__(self, worker: Worker, source: int, piece: Piece, slot: int) -> TensorView: ...


def weight_factors(module: Module, *, fold_scale: bool = True) -> Factors:
    """Factors whose product has the orientation of the weight as it is stored, flattened to two dimensions.

    Raises
    ------
    DataError : NaN or Inf in a factor.
    """
    import torch

    from ..adapters.model import Factors

    factors = module.factors(fold_scale=fold_scale)
    for name, factor in (("B", factors.b), ("A", factors.a)):
        if not bool(torch.isfinite(factor).all()):
            raise DataError(
                f"factor {name} of an adapter holds NaN or Inf",
                code="data.nonfinite",
                tensor=module.site.weight,
                file=getattr(getattr(getattr(module.load, "b", None), "source", None), "path", None) or None,
                expected="finite values",
            )
    if module.site.kind in ("fan_in_fan_out", "embedding"):
        return Factors(factors.a.T, factors.b.T)
    return factors


class Generated:
    """The sources of one output tensor, some of which are made. Made for tensors with an adapted model or base.

    by_deltas : see the module. fold_scale : whether alpha / r goes into the factors.
    """

    def __init__(
        self,
        merge: ResolvedMerge,
        tensor: ResolvedTensor,
        compute: DType,
        by_deltas: bool,
        backend: Backend,
        fold_scale: bool = True,
    ) -> None:
        self._fold_scale = fold_scale
        self._compute = compute
        self._backend = backend
        self._by_deltas = by_deltas
        sources = sources_of(tensor)
        self._base = len(tensor.models) if tensor.base is not None else -1
        found = (module_of(merge.inputs[s.input], s.tensor) for s in sources)
        self.modules: dict[int, Module] = {slot: m for slot, m in enumerate(found) if m is not None}
        self._same = low_rank_sources(merge, tensor)
        self._factors: dict[int, tuple[Any, Any]] = {}
        self.held = factor_bytes(merge, tensor, compute)

    @property
    def unread(self) -> frozenset[int]:
        """Sources of whose stored bytes nothing is read."""
        return self._same if self._by_deltas else frozenset()

    def low_rank(self, slot: int) -> bool:
        """Whether the task vector of a model is a product and nothing else (or nothing at all)."""
        return slot in self._same

    def open(self) -> None:
        """Reads the factors.

        Raises
        ------
        DataError : NaN or Inf in one.
        """
        import torch

        kind = torch.float64 if self._compute is F64 else torch.float32
        for slot, module in self.modules.items():
            factors = weight_factors(module, fold_scale=self._fold_scale)
            self._factors[slot] = (factors.b.to(kind).contiguous(), factors.a.to(kind).contiguous())

    def close(self) -> None:
        """Gives the factors back."""
        self._factors.clear()

    def factors(self, slot: int) -> tuple[Any, Any] | None:
        """(b, a) of an open source in the orientation of the weight; None without an adapter's module."""
        return self._factors.get(slot)

    def load(
        self, worker: Worker, source: int, piece: Piece, read: Reader, *, slot: int, anchor: bool
    ) -> TensorView | None:
        """A piece of a source in tile `slot`; None where it is read as it is stored.

        anchor : of the base, what the result is added to, also where task vectors stand for the models.
        """
        if self._by_deltas and source != self._base:
            return self._delta(worker, source, slot, piece, read)
        if self._by_deltas and not anchor:
            return self._zeros(worker, slot, piece)
        return self._model(worker, source, slot, piece, read) if source in self.modules else None

    def _zeros(self, worker: Worker, slot: int, piece: Piece) -> TensorView:
        size = piece.numel * self._compute.itemsize
        worker.tiles.memory[slot][:size] = bytes(size)
        return worker.tiles.view(slot, self._compute, None, piece.numel)

    def _model(self, worker: Worker, source: int, slot: int, piece: Piece, read: Reader) -> TensorView:
        """Stored values and product."""
        view = worker.tiles.view(slot, self._compute, None, piece.numel)
        stored = read(worker, source, piece, -2)
        self._backend.stream(
            _COPY, Piece.flat(0, piece.numel), None, [stored], view, compute=self._compute, stats=None, threads=1
        )
        self._add(source, piece, view, add=True)
        return view

    def _delta(self, worker: Worker, source: int, slot: int, piece: Piece, read: Reader) -> TensorView:
        """Stored values without the base's, and product."""
        view = worker.tiles.view(slot, self._compute, None, piece.numel)
        if source in self._same:
            if source in self.modules:
                self._add(source, piece, view, add=False)
                return view
            return self._zeros(worker, slot, piece)
        if self._base in self.modules:
            base = self._model(worker, self._base, -3, piece, read)
        else:
            base = read(worker, self._base, piece, -3)
        stored = read(worker, source, piece, -2)
        flat = Piece.flat(0, piece.numel)
        self._backend.stream(
            _DIFFERENCE, flat, None, [stored, base], view, compute=self._compute, stats=None, threads=1
        )
        self._add(source, piece, view, add=True)
        return view

    def _add(self, source: int, piece: Piece, view: TensorView, *, add: bool) -> None:
        factors = self._factors.get(source)
        if factors is None:
            return
        b, a = ((t.data_ptr(), self._compute.code, -1, tuple(t.shape), (t.shape[1], 1)) for t in factors)
        _cpu.product(b, a, (piece.g0, piece.rows, piece.cols, piece.ld), as_tuple(view), add, isa())
