"""What counts as zero: the relative cut of singular values, and the power-of-two scales that go before it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import ArgumentError

if TYPE_CHECKING:
    import torch

__all__ = ["CAP", "check_tol", "power_of_two", "rank_cut"]

CAP = 1e-5
"""Largest default cut in float32: beyond it, genuine small directions of large square matrices would be lost."""


def rank_cut(p: int, s: int, dtype: torch.dtype | None = None) -> float:
    """The default relative cut: a direction exists if its singular value is above rank_cut * the largest one.

    p, s : shape of the matrix that is decomposed (the core, for factors). dtype : float64 for float64 input on a route
    that does not square it, max(p, s) * 2.2e-16; otherwise max(p, s) * 1.2e-7, at most 1e-5.
    """
    import torch

    if dtype == torch.float64:
        return float(max(p, s, 1) * torch.finfo(torch.float64).eps)
    return float(min(max(p, s, 1) * torch.finfo(torch.float32).eps, CAP))


def check_tol(tol: float | None, default: float) -> float:
    """The cut asked for, or the default. Errors: ArgumentError unless 0 <= tol < 1."""
    if tol is None:
        return default
    if not 0.0 <= tol < 1.0:
        raise ArgumentError("tol is out of range", code="argument", expected="0 <= tol < 1", got=str(tol))
    return float(tol)


def power_of_two(norms: torch.Tensor) -> torch.Tensor:
    """For each number the power of two next below it; 1 for zero."""
    import torch

    _, exponent = torch.frexp(norms)
    scale = torch.ldexp(torch.ones_like(norms), exponent - 1)
    return torch.where(norms > 0, scale, torch.ones_like(norms))
