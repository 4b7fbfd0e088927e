"""What PEFT 0.21.2 does beside the mathematics of a combination type."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .._methods.matrix import Wants
from .model import Adapter

__all__ = ["rslora_factor"]


def rslora_factor(adapters: Sequence[Adapter], wants: Wants, rank: int | None, largest: int) -> tuple[float, int]:
    """(what the result is multiplied with, default rank of a truncation).

    PEFT copies the first adapter's config with r = lora_alpha = the new rank, and leaves use_rslora on: the result is
    then scaled by r / sqrt(r). Its ranks are those of the configs, whether or not a module uses them.
    """
    ranks = [_config_rank(adapter, largest) for adapter in adapters]
    new = max(ranks)
    if wants.rank == "exact":
        total = sum(ranks)
    elif wants.rank == "largest":
        total = rank or new
    else:
        total = ranks[0]
    return (math.sqrt(total) if adapters[0].config.get("use_rslora") else 1.0), new


def _config_rank(adapter: Adapter, largest: int) -> int:
    """r, or the largest of r and the rank pattern."""
    found = adapter.config.get("r")
    if not isinstance(found, int):
        return max((m.rank for m in adapter.modules.values()), default=largest)
    pattern = adapter.config.get("rank_pattern") or {}
    return max(found, *pattern.values()) if pattern else found
