"""Placement: how tensors come to a device and results back, and the form in which the GPU backends take operands.

A GPU backend computes on the device where its views lie. A caller whose tiles are in host memory (the engine) wraps the
backend once, `backend = place(backend, "cuda:0")`, and calls `sweep` and `stream` as ever: each call then copies its
inputs to the device, computes there, and copies the result back into the caller's memory before it returns.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from .._native import to_torch, torch_dtype, view_of
from ..errors import BackendError
from ..tensors import BF16, F64, DType, Piece, TensorView

if TYPE_CHECKING:
    from array import array

    import torch

    from .._cpu import BlockSums, StreamStats, SweepStats
    from ..ops.program import Program
    from ..ops.sums import Gram, Reduce
    from ..ops.sweeps import Sweep
    from .dispatch import Backend

__all__ = [
    "Operands",
    "Placed",
    "guard",
    "is_flat",
    "no_gpu",
    "operands",
    "place",
    "same_device",
    "split_tau",
]

_streams = threading.local()


@dataclass(frozen=True)
class Operands:
    """The inputs of one launch: dense flat tensors of one dtype on one device; None where an input is left out.

    converted : the values went through a conversion, so that the bits are not the inputs'.
    """

    dtype: DType
    base: torch.Tensor | None
    models: list[torch.Tensor | None]
    converted: bool

    @property
    def present(self) -> list[torch.Tensor]:
        """All tensors that are there."""
        return [x for x in [self.base, *self.models] if x is not None]

    @property
    def aligned(self) -> bool:
        """True if every tensor begins at a multiple of 16 bytes."""
        return all(x.data_ptr() % 16 == 0 for x in self.present)


def operands(base: TensorView | None, models: Sequence[TensorView | None], compute: DType) -> Operands:
    """The inputs as a kernel takes them.

    Inputs of one dtype without load casts are used where they are. Where dtypes are mixed or a load cast is asked for,
    every input is first converted by torch to `compute` (through the cast, if any), which is exact but takes memory for
    the copies. Strided inputs are copied to dense ones.
    """
    from .reference.common import to_dtype

    views = [v for v in [base, *models] if v is not None]
    dtypes = {v.dtype for v in views}
    plain = len(dtypes) == 1 and all(v.cast is None or v.cast is v.dtype for v in views)
    # Arithmetic in float64 takes float64 inputs, in float32 any other.
    plain = plain and (F64 in dtypes) == (compute is F64)

    def flat(view: TensorView | None) -> torch.Tensor | None:
        if view is None:
            return None
        x = to_torch(view)
        if not plain:
            if view.cast is not None:
                x = to_dtype(x, torch_dtype(view.cast))
            x = x.to(torch_dtype(compute))
        return x.reshape(-1).contiguous()

    return Operands(dtypes.pop() if plain else compute, flat(base), [flat(v) for v in models], not plain)


def is_flat(piece: Piece) -> bool:
    """True if the elements of a piece have consecutive flat indices."""
    return piece.rows <= 1 or piece.cols == piece.ld


def split_tau(tau: int, ties: str, compute: DType) -> tuple[int, int]:
    """A point's key and tie rule as kernels take them: (keep above this key, 0 no ties | 1 by index | 2 by word).

    Keeping every tie is keeping all above the key below. tau is clamped to the largest number that a key's type holds,
    which no key reaches.
    """
    top = (1 << (63 if compute.name == "F64" else 31)) - 1
    limit = min(tau, top)
    return (limit - 1, 0) if ties == "all" else (limit, {"none": 0, "index": 1, "hash": 2}[ties])


def same_device(views: Sequence[TensorView]) -> str | None:
    """A sentence if the views lie on different devices."""
    devices = sorted({v.device for v in views})
    return None if len(devices) < 2 else "the tensors are on different devices: " + ", ".join(devices)


def no_gpu() -> str | None:
    """Why torch cannot compute on a GPU here, None if it can."""
    import torch

    if torch.cuda.is_available():
        return None
    if not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
        return "no GPU: this torch is built without CUDA or ROCm"
    return "no GPU is visible to torch"


def guard(x: torch.Tensor) -> AbstractContextManager[object]:
    """Makes the device of a tensor the current one for launches."""
    import torch

    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


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
    ) -> None:
        """See ops.sums.Reduce."""
        with self._stream():
            base, models = self._load(base), self._load_all(models)
            self.backend.reduce(program, request, sums, piece, base, models, compute=compute, threads=threads)

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
