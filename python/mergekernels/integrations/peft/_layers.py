"""LoRA layers as adapters of this package: factors by name, read where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...adapters.model import Module, Site
from ...tensors import dtype_of
from .._hooks import NotServed

__all__ = ["Slot", "common_device", "module_in", "module_of", "plain_tensor", "slot_of"]


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
    parts = layer._modules  # looked up once per adapter and layer, which `layer.lora_A[adapter]` makes slow
    found = parts["lora_A"]._modules.get(adapter)
    if found is not None:
        return Slot(found.weight, parts["lora_B"]._modules[adapter].weight)
    if adapter in parts["lora_embedding_A"]:
        return Slot(parts["lora_embedding_A"][adapter], parts["lora_embedding_B"][adapter])
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

    Raises
    ------
    NotServed : factors that are no two plain tensors which multiply.
    """
    slot = slot_of(layer, adapter)
    return None if slot is None else module_in(layer, slot, adapter, name)


def module_in(layer: Any, slot: Slot, adapter: str, name: str) -> Module:
    """The same where the factors are at hand.

    Convolutions and embeddings too are matrices (out, in) here, as their factors are.
    """
    a, b = slot.a, slot.b
    _refuse_odd(layer, a, b, adapter)
    m, n, rank = b.shape[0], a.shape[1] if a.ndim == 2 else a[0].numel(), a.shape[0]
    scale = float(layer.scaling[adapter])
    dtype = dtype_of(str(a.dtype).removeprefix("torch."))
    assert dtype is not None

    def load() -> tuple[Any, Any]:
        return b.detach().reshape(m, rank), a.detach().reshape(rank, n)

    return Module(Site(name, "linear", (m, n)), rank, scale * rank, scale, dtype.name, load)


def _refuse_odd(layer: Any, a: Any, b: Any, adapter: str) -> None:
    if adapter in layer.lora_variant:
        raise NotServed("a variant of LoRA")
    if not (plain_tensor(a) and plain_tensor(b)):
        raise NotServed("factors that are no plain tensors of floats")
    if a.dtype != b.dtype or a.device != b.device:
        raise NotServed("factors of two dtypes or on two devices")
    if b.ndim != a.ndim or tuple(b.shape[1:]) != (a.shape[0], *(1,) * (a.ndim - 2)):
        raise NotServed("factors that do not multiply")
    if a.ndim > 2 and getattr(layer._modules.get("base_layer"), "groups", 1) != 1:
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
