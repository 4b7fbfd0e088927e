"""Placement: how tensors come to a device and results back.

A GPU backend computes on the device where its views lie. A caller whose tiles are in host memory (the engine) wraps the
backend once, `backend = place(backend, "cuda:0")`, and calls it as ever: each call then copies its inputs to the
device, computes there, and copies the result back into the caller's memory before it returns.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from .._native import to_torch, torch_dtype, view_of
from ..errors import BackendError
from ..tensors import BF16, DType, Piece, TensorView

if TYPE_CHECKING:
    from array import array

    from .._cpu import BlockSums, StreamStats, SweepStats
    from ..ops.program import Program
    from ..ops.sums import Gram, Reduce
    from ..ops.sweeps import Sweep
    from .dispatch import Backend

__all__ = ["Placed", "place"]

_streams = threading.local()


@dataclass(frozen=True)
class Placed:
    """A backend that computes on `device` for callers whose tensors are in host memory. Thread safe.

    Each thread uses a stream of its own, so that copies of one tile overlap with the computation of another.
    """

    backend: Backend
    device: str

    @property
    def FEATURES(self) -> frozenset[str]:
        """What the backend can do."""
        return self.backend.FEATURES

    def why_not(self, op: str, views: Sequence[TensorView]) -> str | None:
        """Why the backend cannot serve these views once they are on the device."""
        views = views or [TensorView(0, (0,), (1,), BF16)]
        return self.backend.why_not(op, [replace(v, device=self.device) for v in views])

    def sweep(
        self,
        request: Sweep,
        stats: SweepStats,
        piece: Piece,
        base: TensorView | None,
        models: Sequence[TensorView | None],
        *,
        compute: DType,
        tensor: int,
        offset: int,
        threads: int,
    ) -> None:
        """See ops.program.Sweep."""
        with self._stream():
            self.backend.sweep(
                request,
                stats,
                piece,
                self._load(base),
                [self._load(v) for v in models],
                compute=compute,
                tensor=tensor,
                offset=offset,
                threads=threads,
            )

    def stream(
        self,
        program: Program,
        piece: Piece,
        base: TensorView | None,
        models: Sequence[TensorView],
        out: TensorView | None,
        *,
        compute: DType,
        stats: StreamStats | None,
        threads: int,
        marks: Sequence[TensorView | None] = (),
    ) -> None:
        """See ops.program.Program."""
        import torch

        with self._stream():
            result = None
            if out is not None:
                result = torch.empty(out.shape, dtype=torch_dtype(out.dtype), device=self.device)
            self.backend.stream(
                program,
                piece,
                self._load(base),
                self._load_all(models),
                None if result is None else view_of(result),
                compute=compute,
                stats=stats,
                threads=threads,
                marks=[self._load(v) for v in marks],
            )
            if out is not None and result is not None:
                to_torch(out).copy_(result)

    def mark(
        self,
        program: Program,
        kind: Literal["kept", "agreeing", "useful"],
        piece: Piece,
        base: TensorView | None,
        models: Sequence[TensorView],
        marks: Sequence[TensorView],
        *,
        compute: DType,
        threads: int,
    ) -> None:
        """See dispatch.Backend."""
        import torch

        with self._stream():
            results = [torch.empty(v.shape, dtype=torch.uint8, device=self.device) for v in marks]
            self.backend.mark(
                program,
                kind,
                piece,
                self._load(base),
                self._load_all(models),
                [view_of(x) for x in results],
                compute=compute,
                threads=threads,
            )
            for target, result in zip(marks, results, strict=True):
                to_torch(target).copy_(result)

    def gram(
        self,
        request: Gram,
        sums: BlockSums,
        piece: Piece,
        base: TensorView | None,
        models: Sequence[TensorView],
        *,
        compute: DType,
        threads: int,
    ) -> None:
        """See ops.sums.Gram."""
        with self._stream():
            self.backend.gram(
                request, sums, piece, self._load(base), self._load_all(models), compute=compute, threads=threads
            )

    def reduce(
        self,
        program: Program,
        request: Reduce,
        sums: BlockSums,
        piece: Piece,
        base: TensorView | None,
        models: Sequence[TensorView],
        *,
        compute: DType,
        threads: int,
        kept: Sequence[TensorView | None] = (),
    ) -> None:
        """See dispatch.Backend."""
        import torch

        with self._stream():
            base, models = self._load(base), self._load_all(models)
            results = [None if v is None else torch.empty(v.shape, dtype=torch.uint8, device=self.device) for v in kept]
            marks = {"kept": [None if x is None else view_of(x) for x in results]} if kept else {}
            self.backend.reduce(program, request, sums, piece, base, models, compute=compute, threads=threads, **marks)
            for target, result in zip(kept, results, strict=True):
                if target is not None and result is not None:
                    to_torch(target).copy_(result)

    def divergence(
        self,
        row_length: int,
        piece: Piece,
        base: TensorView,
        model: TensorView,
        *,
        compute: DType,
        threads: int,
    ) -> array[float]:
        """See dispatch.Backend."""
        with self._stream():
            base, model = self._load_all([base, model])
            return self.backend.divergence(row_length, piece, base, model, compute=compute, threads=threads)

    def _load_all(self, views: Sequence[TensorView]) -> list[TensorView]:
        return [v for view in views if (v := self._load(view)) is not None]

    def _load(self, view: TensorView | None) -> TensorView | None:
        if view is None:
            return None
        return replace(view_of(to_torch(view).to(self.device)), cast=view.cast)

    def _stream(self) -> AbstractContextManager[object]:
        import torch

        device = torch.device(self.device)
        if device.type != "cuda":
            return nullcontext()
        streams = _streams.__dict__.setdefault("by_device", {})
        if device not in streams:
            streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return torch.cuda.stream(streams[device])


def place(backend: Backend, device: str) -> Backend:
    """`backend`, computing on `device` ("cpu", "cuda", "cuda:1") for callers with tensors in host memory.

    On "cpu" that is the backend itself (the interpreter of Triton, for one, computes in host memory).

    Raises
    ------
    BackendError : no such kind of device.
    """
    kind = device.split(":")[0]
    if kind == "cpu":
        return backend
    if kind != "cuda":
        raise BackendError(
            "unknown kind of device", code="backend.device", expected="cpu, cuda or cuda:N", got=repr(device)
        )
    return Placed(backend, device)
