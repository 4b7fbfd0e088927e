"""Models with several adapters for the tests of PEFT, made of random numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["ALL", "Net", "adapted", "deltas", "distance", "lora"]

ALL = ["embed", "q_proj", "k_proj", "c_attn", "conv", "point", "head"]


class Net(nn.Module):
    """One layer of every kind, two of one shape."""

    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.embed = nn.Embedding(50, 24)
        self.q_proj = nn.Linear(24, 32)
        self.k_proj = nn.Linear(24, 32)
        self.c_attn = Conv1D(40, 32)
        self.conv = nn.Conv2d(8, 28, 3)
        self.point = nn.Conv2d(8, 28, 1)
        self.head = nn.Linear(40, 26)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Everything but the convolutions."""
        x = self.embed(ids)
        return self.head(self.c_attn(self.q_proj(x) + self.k_proj(x)))


def lora(r: int = 4, alpha: float = 6, targets: list[str] | None = None, **fields: Any) -> Any:
    """A config whose factors are random."""
    from peft import LoraConfig

    return LoraConfig(r=r, lora_alpha=alpha, target_modules=targets or ALL, **{"init_lora_weights": False, **fields})


def adapted(*configs: Any, dtype: torch.dtype = torch.float32, make: Any = Net, seed: int = 0) -> Any:
    """A model with adapters a0, a1, ... in its dtype."""
    from peft import get_peft_model

    torch.manual_seed(seed)
    model = get_peft_model(make().to(dtype), configs[0], adapter_name="a0", autocast_adapter_dtype=False)
    for i, config in enumerate(configs[1:], 1):
        model.add_adapter(f"a{i}", config, autocast_adapter_dtype=False)
    return model


def deltas(model: Any, adapter: str) -> dict[str, torch.Tensor]:
    """What an adapter adds to each weight, in float64 and with its scale."""
    found = {}
    for name, layer in model.base_model.model.named_modules():
        if adapter in getattr(layer, "lora_A", {}):
            a, b = layer.lora_A[adapter].weight.data, layer.lora_B[adapter].weight.data
        elif adapter in getattr(layer, "lora_embedding_A", {}):
            a, b = layer.lora_embedding_A[adapter].data, layer.lora_embedding_B[adapter].data
        else:
            continue
        found[name] = b.flatten(1).double() @ a.flatten(1).double() * layer.scaling[adapter]
    return found


def distance(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    """The largest relative difference of a layer."""
    assert one.keys() == two.keys() and one
    return max(float((one[n] - two[n]).norm() / two[n].norm().clamp_min(1e-30)) for n in one)
