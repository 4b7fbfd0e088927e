"""Which tensors these kernels take from mergekit, and which go back to its own code with the reason."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .._hooks import NotServed

__all__ = ["check_tensors"]


def check_tensors(tensors: Sequence[Any]) -> None:
    """Refuse what is not a plain float tensor on a CPU or a GPU, and what a gradient shall flow through.

    Raises
    ------
    NotServed
    """
    import torch
    from torch.autograd import forward_ad

    for tensor in tensors:
        if type(tensor) is not torch.Tensor and type(tensor) is not torch.nn.Parameter:
            raise NotServed("a tensor of another class than torch.Tensor")
        if tensor.layout is not torch.strided:
            raise NotServed("a tensor that is not dense")
        if tensor.dtype not in _dtypes():
            raise NotServed("a dtype other than bfloat16, float16, float32 and float64")
        if tensor.device.type not in ("cpu", "cuda"):
            raise NotServed("a device other than a CPU or a GPU")
    first = tensors[0]
    if any(t.dtype != first.dtype or t.shape != first.shape or t.device != first.device for t in tensors):
        raise NotServed("tensors of different dtypes, shapes or devices")
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise NotServed("a gradient is wanted")
    if getattr(forward_ad, "_current_level", -1) >= 0:
        raise NotServed("a forward-mode gradient is wanted")


def _dtypes() -> tuple[Any, ...]:
    import torch

    return (torch.bfloat16, torch.float16, torch.float32, torch.float64)
