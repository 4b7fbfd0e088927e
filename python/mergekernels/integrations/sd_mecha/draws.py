"""Random masks for sd-mecha: its probabilities, drawn from this package's generator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...ops import Program, stream
from ...ops.keep import Draw, KeepRule, RankDraw, Rows
from .._hooks import NotServed

if TYPE_CHECKING:
    import torch

__all__ = ["UNSEEDED", "averaged", "masked", "rescaling"]

UNSEEDED = 67280421310721
"""Seed of ties_sum_with_dropout where it is given none: fixed, since a new generator of torch has a fixed seed too."""

_WORDS = 2.0**32


def masked(models: Sequence[torch.Tensor], probability: float, eps: float, seed: int) -> list[torch.Tensor]:
    """Every model with a random part of it set to 0.

    probability : of dropping an entry, on average. eps : how far the probability of keeping rises from the smallest
    magnitude of the tensor to the largest. Masks differ between the models and depend on seed and shape only.
    """
    n = models[0].numel()
    rule = _rule(1.0 - probability, eps, n)
    rows = Rows(n) if isinstance(rule, RankDraw) else None
    return [
        stream([m], Program((1.0,), (rule,), base=False, seed=seed, tensor=t, rows=rows)) for t, m in enumerate(models)
    ]


def averaged(models: Sequence[torch.Tensor], probability: float, divisor: float, seed: int) -> torch.Tensor:
    """The mean of what independent masks keep of each entry, over the masks that do, divided by `divisor`."""
    import torch

    keep = (_rule(1.0 - probability, 0.0, models[0].numel()),) * len(models)
    program = Program((1.0,) * len(models), keep, base=False, seed=seed, scale=1.0 / divisor, divisor="kept_count")
    if all(bool(m.all()) for m in models):
        return stream(models, program)
    # A kept zero counts in sd-mecha: the same draw over ones says how many masks keep an entry.
    summed = Program(program.weights, keep, base=False, seed=seed, scale=program.scale)
    ones = torch.ones(models[0].shape, dtype=torch.float32, device=models[0].device)
    counts = stream([ones] * len(models), Program(program.weights, keep, base=False, seed=seed))
    total = stream(models, summed, out_dtype=torch.promote_types(models[0].dtype, torch.float32))
    return total.div_(counts.clamp_(min=1)).to(models[0].dtype)


def rescaling(probability: float, power: float) -> float:
    """What `dropout` divides by: (1 - probability)^power, 1 where that is no number."""
    if probability == 1.0:
        return 1.0
    try:
        found = (1.0 - probability) ** power
    except (OverflowError, ZeroDivisionError):
        raise NotServed("a rescale that is out of range") from None
    return found if isinstance(found, float) and math.isfinite(found) and found != 0.0 else 1.0


def _rule(keep: float, eps: float, n: int) -> KeepRule | None:
    """Keep with a probability that rises with the rank from keep - eps / 2 to keep + eps / 2, nearly."""
    if not 0.0 <= keep <= 1.0 or eps < 0.0:
        raise NotServed("a probability out of range")
    if eps == 0.0:
        return None if keep == 1.0 else Draw(int(keep * _WORDS))
    if n >= 1 << 31:
        raise NotServed("2^31 elements or more to rank")
    half = eps * (1.0 - 1.0 / n) / 2.0
    low, high = keep - half, keep + half
    if low < 0.0 or high > 1.0:
        raise NotServed("probabilities by rank that leave [0, 1]")
    start = int(low * _WORDS)
    return RankDraw(start, int(high * _WORDS) - start, int(keep * _WORDS))
