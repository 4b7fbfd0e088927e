"""Which tensors of a tool these kernels can take as they are."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import DataError
from ._hooks import NotServed

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

__all__ = ["MOST_MODELS", "check_alike", "check_plain", "finite_only"]

MOST_MODELS = 64
"""Tensors that one program takes."""


def check_plain(tensor: Any) -> torch.Tensor:
    """The tensor, if it is dense, of a common float dtype, on the CPU or a GPU, and no gradient is to flow through it.

    Raises :class:`NotServed`.
    """
    import torch

    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        raise NotServed("an input that is no plain tensor")
    if tensor.layout != torch.strided or tensor.is_neg():
        raise NotServed("a tensor that is not dense")
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise NotServed("a dtype other than bfloat16, float16, float32 and float64")
    if tensor.device.type not in ("cpu", "cuda"):
        raise NotServed("a device other than the CPU and CUDA")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise NotServed("an input that needs a gradient")
    found: torch.Tensor = tensor.detach()
    return found


def check_alike(tensors: Sequence[Any]) -> list[torch.Tensor]:
    """The tensors, if each is plain and all have one shape, dtype and device.

    Raises :class:`NotServed`.
    """
    if len(tensors) > MOST_MODELS:
        raise NotServed(f"more than {MOST_MODELS} models")
    plain = [check_plain(t) for t in tensors]
    if any((t.shape, t.dtype, t.device) != (plain[0].shape, plain[0].dtype, plain[0].device) for t in plain):
        raise NotServed("inputs of unequal shape, dtype or device")
    return plain


@contextmanager
def finite_only() -> Iterator[None]:
    """NaN, Inf or overflow inside becomes :class:`NotServed`: what a tool makes of them is the tool's own business."""
    try:
        yield
    except DataError as error:
        if error.code in ("data.nonfinite", "data.overflow"):
            raise NotServed("values that are not finite") from error
        raise
