"""The arithmetic that explains every element on which the two tools differ, in plain torch."""

from __future__ import annotations

from itertools import product

import torch


def threshold(magnitude: torch.Tensor, density: float) -> tuple[torch.Tensor, bool]:
    """The k-th largest magnitude, k = max(1, floor(density * n)), and whether only some of its equals can be kept."""
    n = magnitude.numel()
    k = max(1, int(density * n))
    value = magnitude.flatten().kthvalue(n - k + 1).values
    return value, int((magnitude >= value).sum()) > k


def linear(sources: list[tuple[float, torch.Tensor]], normalize: bool, fused: bool) -> torch.Tensor:
    """The weighted mean in float32, each term rounded with its sum (fused) or before. float64 products are exact."""
    total = torch.zeros(sources[0][1].shape)
    divisor = torch.zeros(())
    for weight, tensor in sources:
        w = torch.tensor(weight)
        together = (total.double() + w.double() * tensor.double()).float()
        total = together if fused else total + w * tensor.float()
        divisor = divisor + w
    return total / divisor if normalize else total


def ties_outcomes(
    base: torch.Tensor,
    models: list[tuple[float, float, torch.Tensor]],
    where: torch.Tensor,
    normalize: bool,
    scale: float,
) -> torch.Tensor:
    """What TIES may give at the elements `where`: one row per way to keep or drop the deltas at the threshold.

    models : (weight, density, tensor) of each.
    """
    x0 = base.float()
    deltas, kept = [], []
    for _, density, tensor in models:
        delta = tensor.float() - x0
        value, _ = threshold(delta.abs(), density)
        deltas.append(delta[where])
        kept.append(((delta.abs() > value)[where], (delta.abs() == value)[where]))
    rows = []
    for choice in product((False, True), repeat=len(models)):
        terms, divisor = [], torch.zeros(int(where.sum()))
        for (weight, _, _), delta, (above, equal), keep in zip(models, deltas, kept, choice, strict=True):
            terms.append(torch.tensor(weight) * torch.where(above | (equal & keep), delta, 0.0))
        total = torch.zeros_like(divisor)
        for term in terms:
            total = total + term
        sign = torch.where(total >= 0, 1.0, -1.0)
        merged = torch.zeros_like(divisor)
        for (weight, _, _), term in zip(models, terms, strict=True):
            agrees = term.sign() == sign
            merged = merged + torch.where(agrees, term, 0.0)
            divisor = divisor + torch.where(agrees, torch.tensor(weight), 0.0)
        if normalize:
            merged = merged / torch.where(divisor == 0, 1.0, divisor)
        if scale != 1.0:
            merged = merged * torch.tensor(scale)
        rows.append(x0[where] + merged)
    return torch.stack(rows)
