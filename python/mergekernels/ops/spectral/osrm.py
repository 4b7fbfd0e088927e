"""Initial factors that annihilate given inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...errors import ArgumentError

if TYPE_CHECKING:
    import torch

__all__ = ["osrm_init"]


def osrm_init(H: torch.Tensor | Sequence[torch.Tensor], rank: int, seed: int = 0, centre: bool = False) -> torch.Tensor:
    """The factor a (rank, n), orthonormal rows, that makes ||a H^T|| least."""
    import torch

    h = (H if isinstance(H, torch.Tensor) else torch.cat(list(H))).to(torch.float64)
    if not 1 <= rank <= h.shape[1]:
        raise ArgumentError("rank out of range", code="argument.rank", expected=f"1 to {h.shape[1]}", got=str(rank))
    if centre:
        h = h - h.mean(0)
    vectors: torch.Tensor = torch.linalg.eigh(h.T @ h)[1]
    return vectors[:, :rank].T.contiguous().float()
