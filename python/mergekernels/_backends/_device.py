"""Devices, and the form in which the GPU backends take operands; `place` is in `_placed`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .._native import to_torch, torch_dtype
from ..tensors import F64, DType, Piece, TensorView
from ._placed import Placed, place

if TYPE_CHECKING:
    import torch

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
