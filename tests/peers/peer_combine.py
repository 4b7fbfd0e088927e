"""Runs in the peer's environment: merges adapters by PEFT's add_weighted_adapter.

usage: python peer_combine.py CASES FOLDER. CASES is a JSON file, see `combination_cases`. Left in FOLDER: the adapters
of each set as PEFT saves them, and per case the deltas of the merged adapter and, for random types, the masks drawn.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D


class Net(nn.Module):
    """One layer of every kind; no weight is square."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 24)
        self.q_proj = nn.Linear(24, 32)
        self.c_attn = Conv1D(40, 24)
        self.conv = nn.Conv2d(8, 28, 3)
        self.head = nn.Linear(36, 26)


def build(adapters: list[dict[str, Any]]) -> Any:
    """The model with adapters a0, a1, ..., all factors random."""
    torch.manual_seed(0)
    model: Any = None
    for i, fields in enumerate(adapters):
        config = LoraConfig(**{**fields, "target_modules": list(fields["target_modules"])})
        if model is None:
            model = get_peft_model(Net(), config, adapter_name="a0")
        else:
            model.add_adapter(f"a{i}", config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return model


def combine(model: Any, case: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(deltas of the merged adapter by module, masks that PEFT drew by number)."""
    masks: dict[str, torch.Tensor] = {}
    drawing = torch.bernoulli

    def recorded(p: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        mask = drawing(p, *args, **kwargs)
        masks[f"{len(masks):03d}"] = mask.clone()
        return mask

    torch.manual_seed(7)
    torch.bernoulli = recorded  # type: ignore[assignment]
    names = [f"a{i}" for i in range(len(case["weights"]))]
    try:
        model.add_weighted_adapter(names, case["weights"], "merged", case["type"], **case["options"])
    finally:
        torch.bernoulli = drawing  # type: ignore[assignment]
    deltas = {
        name.removeprefix("base_model.model."): layer.get_delta_weight("merged").contiguous()
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and ("merged" in layer.lora_A or "merged" in layer.lora_embedding_A)
    }
    model.delete_adapter("merged")
    return deltas, masks


def main(cases: Path, folder: Path) -> None:
    """All cases."""
    given = json.loads(cases.read_text())
    for name, adapters in given["sets"].items():
        model = build(adapters)
        model.save_pretrained(folder / name)
        with torch.no_grad():
            for case in (c for c in given["cases"] if c["set"] == name):
                deltas, masks = combine(model, case)
                save_file(deltas, folder / f"{case['name']}.deltas")
                if masks:
                    save_file(masks, folder / f"{case['name']}.masks")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
