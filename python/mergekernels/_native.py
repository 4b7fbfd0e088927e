"""The seam between torch tensors and raw memory. The only Python file that turns tensors into pointers and back.

torch is imported inside functions: the engine on the CPU never needs it.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

from .tensors import DType, TensorView, dtype_of

if TYPE_CHECKING:
    import torch

    from ._cpu import View

__all__ = ["as_tuple", "to_torch", "torch_dtype", "view_of"]


def torch_dtype(dtype: DType) -> torch.dtype:
    """The torch dtype of `dtype`."""
    import torch

    return getattr(torch, dtype.torch)  # type: ignore[no-any-return]


def view_of(tensor: torch.Tensor) -> TensorView:
    """The view of a dense, strided torch tensor; the tensor is kept alive by the view."""
    dtype = dtype_of(str(tensor.dtype).removeprefix("torch."))
    assert dtype is not None
    return TensorView(
        tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()), dtype, tensor, None, str(tensor.device)
    )


def to_torch(view: TensorView) -> torch.Tensor:
    """A torch tensor over the memory of `view`, without copying; `cast` is not applied."""
    import torch

    if isinstance(view.owner, torch.Tensor):
        return view.owner
    dtype = torch_dtype(view.dtype)
    if view.numel == 0:
        return torch.empty(view.shape, dtype=dtype)
    extent = 1 + sum((size - 1) * stride for size, stride in zip(view.shape, view.strides, strict=True))
    memory: Any = (ctypes.c_char * (extent * view.dtype.itemsize)).from_address(view.ptr)
    flat = torch.frombuffer(memory, dtype=dtype)
    flat.mergekernels_owner = view.owner  # type: ignore[attr-defined]
    return flat.as_strided(view.shape, view.strides)


def as_tuple(view: TensorView) -> View:
    """The form in which native code takes a view."""
    cast = -1 if view.cast is None or view.cast is view.dtype else view.cast.code
    return (view.ptr, view.dtype.code, cast, view.shape, view.strides)
