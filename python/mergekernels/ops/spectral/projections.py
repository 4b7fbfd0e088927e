"""Projections of matrices onto and away from subspaces."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from ...errors import ArgumentError

if TYPE_CHECKING:
    import torch

__all__ = ["project"]


def project(
    G: torch.Tensor,
    u: torch.Tensor | None,
    v: torch.Tensor | None = None,
    kind: Literal["block", "left", "right", "keep", "outer"] = "block",
) -> torch.Tensor:
    """G without, or with only, its part in the subspaces of u and v."""
    if kind == "left" and u is not None:
        return G - u @ (u.T @ G)
    if kind == "right" and v is not None:
        return G - (G @ v) @ v.T
    if u is None or v is None:
        raise ArgumentError(f"project: '{kind}' needs u and v", code="argument.basis")
    block = u @ (u.T @ G @ v) @ v.T
    if kind == "keep":
        return block
    if kind == "block":
        return G - block
    return G - u @ (u.T @ G) - (G @ v) @ v.T + block
