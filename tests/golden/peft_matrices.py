"""PEFT's add_weighted_adapter on the kit's adapters: deltas of the merged adapter, in the shape of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from make_kit import Case, case
from matrix_inputs import ADAPTERS, SITES, adapters
from torch import nn

__all__ = ["peft_matrices"]

_EQUAL, _MIXED = ("l1", "l2", "l3"), ("x1", "x2", "x3")
_WEIGHTS = [1.0, -0.7, 2.5]


def _case(id_: str, method: str, models: tuple[str, ...] = _EQUAL, **fields: Any) -> Case:
    params = {"weight": _WEIGHTS, **fields.pop("params", {})}
    entry = case(
        id_, method, dialect="peft", norm="frobenius", takes="adapters", params=params, **{"bound": 1e-5, **fields}
    )
    return {**entry, "models": list(models), "base": None}


CASES = [
    _case("adapters-cat", "cat"),
    _case("adapters-cat-mixed", "cat", _MIXED),
    _case("adapters-linear", "linear"),
    _case("adapters-svd", "svd", _MIXED, rank=6),
    _case("adapters-svd-all", "svd", rank=12),
    _case("adapters-magnitude_prune", "magnitude_prune", params={"density": 0.3}),
    _case("adapters-ties", "ties", params={"density": 0.3}),
    _case("adapters-ties-vote", "ties", params={"density": 0.6, "majority_sign_method": "frequency"}),
    _case("adapters-magnitude_prune_svd", "magnitude_prune_svd", _MIXED, params={"density": 0.3}, rank=6),
    _case("adapters-ties_svd", "ties_svd", _MIXED, params={"density": 0.3}, rank=6),
]


class Net(nn.Module):
    """A module for each site."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Module(), nn.Module()])
        self.embed = nn.Embedding(SITES["embed"][1], SITES["embed"][0])
        for name, (out, inner) in SITES.items():
            if name != "embed":
                setattr(self.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], nn.Linear(inner, out))


def peft_matrices(folder: Path) -> Iterator[tuple[Case, dict[str, torch.Tensor]]]:
    """Every case, in float32."""
    from peft import LoraConfig, get_peft_model

    stored = adapters(folder)
    for entry in CASES:
        model: Any = None
        for name in entry["models"]:
            fields = {k: v for k, v in ADAPTERS[name].items() if k != "peft_type"}
            if model is None:
                model = get_peft_model(Net(), LoraConfig(**fields), adapter_name=name)
            else:
                model.add_adapter(name, LoraConfig(**fields))
            for module, (b, a) in stored[name].items():
                layer = model.base_model.model.get_submodule(module)
                if module == "embed":
                    layer.lora_embedding_A[name].data, layer.lora_embedding_B[name].data = a.clone(), b.clone()
                else:
                    layer.lora_A[name].weight.data, layer.lora_B[name].weight.data = a.clone(), b.clone()
        params = {k: v for k, v in entry["params"].items() if k != "weight"}
        if "rank" in entry:
            params["svd_rank"] = entry["rank"]
        model.add_weighted_adapter(entry["models"], entry["params"]["weight"], "merged", entry["method"], **params)
        yield (
            entry,
            {m: model.base_model.model.get_submodule(m).get_delta_weight("merged").detach() for m in SITES},
        )
