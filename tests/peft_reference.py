"""PEFT's combination types in plain float64, from their definitions: dense matrices, full sorts, full SVDs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from adapter_cases import best
from mergekernels.adapters.model import Adapter

Prune = Callable[[int, str, torch.Tensor], torch.Tensor]
"""(adapter, name of the tensor, its values) -> the pruned values."""

NAMES = ("magnitude_prune", "dare_linear", "ties", "dare_ties")


def largest(density: Sequence[float]) -> Prune:
    """The int(density n) largest magnitudes; values must differ."""

    def prune(t: int, name: str, values: torch.Tensor) -> torch.Tensor:
        if density[t] >= 1.0:
            return values
        kept = values.abs().reshape(-1).argsort(descending=True)[: int(density[t] * values.numel())]
        mask = torch.zeros(values.numel(), dtype=values.dtype)
        mask[kept] = 1.0
        return values * mask.reshape(values.shape)

    return prune


def masked(masks: Callable[[int, str, int], torch.Tensor], density: Sequence[float]) -> Prune:
    """Given masks, kept values divided by the density."""

    def prune(t: int, name: str, values: torch.Tensor) -> torch.Tensor:
        if density[t] >= 1.0:
            return values
        mask = masks(t, name, values.numel()).to(values.dtype).reshape(values.shape)
        return values * mask / density[t] if density[t] else values * 0.0

    return prune


def combine(values: Sequence[torch.Tensor], weights: Sequence[float], vote: str) -> torch.Tensor:
    """The weighted sum; with a vote of those that agree, over their number."""
    stack = torch.stack(list(values))
    weighted = stack * torch.tensor(list(weights), dtype=stack.dtype).reshape(-1, *[1] * (stack.dim() - 1))
    if vote == "none":
        return weighted.sum(0)
    ballot = stack.sum(0) if vote == "total" else stack.sign().sum(0)
    agree = stack.sign() == torch.where(ballot >= 0, 1.0, -1.0).to(stack.dtype)
    return (weighted * agree).sum(0) / agree.sum(0).clamp(min=1)


def on_factors(
    group: Sequence[Adapter], module: str, weights: Sequence[float], prune: Prune, vote: str
) -> torch.Tensor:
    """The delta of linear, magnitude_prune, dare_linear, ties and dare_ties."""
    sides: list[list[torch.Tensor]] = [[], []]
    roots: list[list[float]] = [[], []]
    for t, adapter in enumerate(group):
        if module not in adapter.modules:
            continue
        entry = adapter.modules[module]
        b, a = entry.load()
        product = weights[t] * entry.scale
        for side, (values, root) in enumerate(
            ((a, math.copysign(math.sqrt(abs(product)), product)), (b, math.sqrt(abs(product))))
        ):
            sides[side].append(prune(t, f"{module}.lora_{'AB'[side]}.weight", values.double()))
            roots[side].append(root)
    a, b = (combine(values, root, vote) for values, root in zip(sides, roots, strict=True))
    return b @ a


def on_deltas(
    group: Sequence[Adapter],
    module: str,
    weights: Sequence[float],
    prune: Prune,
    vote: str,
    rank: int,
    *,
    rounded: bool = True,
) -> torch.Tensor:
    """The delta of the types that end in _svd, and of svd itself with a prune that keeps everything.

    rounded : each adapter's delta to float32 first.
    """
    values, used = [], []
    for t, adapter in enumerate(group):
        if module not in adapter.modules:
            continue
        entry = adapter.modules[module]
        b, a = entry.load()
        delta = entry.scale * (b.double() @ a.double())
        delta = delta.float().double() if rounded else delta
        values.append(prune(t, f"{module}.weight", delta))
        used.append(weights[t])
    return best(combine(values, used, vote), rank)


def vote_of(method: str, majority: str = "total") -> str:
    """Who votes in a type."""
    return majority if "ties" in method else "none"
