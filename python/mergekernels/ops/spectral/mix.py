"""Weighted sums of products of factors and dense matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ...adapters.model import Factors

if TYPE_CHECKING:
    import torch

__all__ = ["Mix"]


@dataclass(frozen=True)
class Mix:
    """The sum of w * (b @ a) over `factors` and of w * D over `dense`, all of one shape (m, n), on one device.

    factors : pairs (w, Factors). dense : pairs (w, tensor). Weights are numbers; a weight of 0 drops its term.
    """

    factors: Sequence[tuple[float, Factors]] = field(default_factory=tuple)
    dense: Sequence[tuple[float, torch.Tensor]] = field(default_factory=tuple)
