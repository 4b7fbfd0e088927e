"""Merged task vectors to adapters of a rank."""

from __future__ import annotations

from .model import Factors

__all__ = ["exact_factors", "with_signs"]


def with_signs(factors: Factors) -> Factors:
    """The same product with the entry of largest magnitude in every column of b positive, the first among equals."""
    import torch

    if factors.rank == 0:
        return factors
    places = factors.b.abs().argmax(dim=0, keepdim=True)
    signs = torch.where(factors.b.gather(0, places)[0] < 0, -1.0, 1.0).to(factors.b.dtype)
    return Factors(factors.b * signs, factors.a * signs[:, None])
