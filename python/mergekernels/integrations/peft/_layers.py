"""LoRA layers as adapters of this package: factors by name, read where they lie."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ...adapters.model import Module, Site
from ...tensors import dtype_of
from .._hooks import NotServed

__all__ = ["Slot", "module_of", "plain_tensor", "slot_of"]


@dataclass(frozen=True, slots=True)
class Slot:
    """The two parameters of one adapter in one layer. a : (r, in) or (r, in, *kernel); b : (out, r) or (out, r, 1, ..);
    of an embedding (r, vocab) and (dim, r).
    """

    a: Any
    b: Any

    @property
    def rank(self) -> int:
        """Rows of a."""
        return int(self.a.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the product."""
        n = 1
        for size in self.a.shape[1:]:
            n *= int(size)
        return int(self.b.shape[0]), n


def slot_of(layer: Any, adapter: str) -> Slot | None:
    """The factors of an adapter in a LoRA layer; None if the layer does not have it."""
    if adapter in layer.lora_A:
        return Slot(layer.lora_A[adapter].weight, layer.lora_B[adapter].weight)
    if adapter in layer.lora_embedding_A:
        return Slot(layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter])
    return None


def plain_tensor(tensor: Any) -> bool:
    """Whether kernels can read a tensor: dense, of a float dtype, on the CPU or a GPU, whole."""
    import torch

    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.device.type not in ("cpu", "cuda"):
        return False
    floats = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    return tensor.dtype in floats and tensor.layout == torch.strided


def module_of(layer: Any, adapter: str, name: str) -> Module | None:
    """One adapter's factors in one layer. name : path of the module.

    Convolutions and embeddings too are matrices (out, in) here, as their factors are.

    Raises
    ------
    NotServed : factors that are no two plain tensors which multiply.
    """
    slot = slot_of(layer, adapter)
    if slot is None:
        return None
    _refuse_odd(layer, slot, adapter)
    dtype = dtype_of(str(slot.a.dtype).removeprefix("torch."))
    assert dtype is not None
    scale = float(layer.scaling[adapter])
    shape = slot.shape
    return Module(Site(name, "linear", shape), slot.rank, scale * slot.rank, scale, dtype.name, _loader(slot, shape))


def _loader(slot: Slot, shape: tuple[int, int]) -> Callable[[], tuple[Any, Any]]:
    rank = slot.rank
    return lambda: (slot.b.detach().reshape(shape[0], rank), slot.a.detach().reshape(rank, shape[1]))


def _refuse_odd(layer: Any, slot: Slot, adapter: str) -> None:
    if adapter in layer.lora_variant:
        raise NotServed("a variant of LoRA")
    if not (plain_tensor(slot.a) and plain_tensor(slot.b)):
        raise NotServed("factors that are no plain tensors of floats")
    if slot.a.dtype != slot.b.dtype or slot.a.device != slot.b.device:
        raise NotServed("factors of two dtypes or on two devices")
    if slot.b.ndim != slot.a.ndim or tuple(slot.b.shape[1:]) != (slot.rank, *(1 for _ in slot.a.shape[2:])):
        raise NotServed("factors that do not multiply")
    base = getattr(layer, "base_layer", None)
    if getattr(base, "groups", 1) != 1:
        raise NotServed("a convolution in groups")


def common_device(slots: Sequence[Slot]) -> Any:
    """The device of all factors.

    Raises
    ------
    NotServed : there are several.
    """
    devices = {slot.a.device for slot in slots}
    if len(devices) != 1:
        raise NotServed("adapters on several devices")
    return devices.pop()
