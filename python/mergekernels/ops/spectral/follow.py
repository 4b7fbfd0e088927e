"""The singular triplets above a threshold of a matrix that changed little since they were last found.

The basis of the last call holds them nearly, and with them the directions next below. Residuals of the Ritz vectors
are added to it until they are small (Davidson's method, without a preconditioner): everything found on the way helps,
also in the next call, so that a few products of as many columns as there are triplets do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ._blocks import orthonormal
from .gram import inner

if TYPE_CHECKING:
    import torch

__all__ = ["followed", "helpful"]

ROUNDS = 8
SPARE = 24


def helpful(k: int) -> int:
    """How many leading right vectors help the next call, of which k are above the threshold."""
    return k + k // 2 + SPARE


def followed(
    x: torch.Tensor, basis: torch.Tensor, cut: Callable[[torch.Tensor], float], target: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """(u, s, w, all Ritz vectors) of the k triplets above cut(s); None if basis is too small or slow.

    x : (m, n) float32, m >= n. basis : (n, p), any columns. target : of the residual ||X^T u - w s||_F, beside ||X||_F;
    triplets below the threshold count with what they could be above it. s : float64.
    """
    import torch

    size = inner(x, x) ** 0.5
    v, _, _ = orthonormal(basis.to(x))
    y = (x @ v).to(torch.float64)
    g = y.mT @ y
    for _ in range(ROUNDS):
        values, z = torch.linalg.eigh(g)
        s, z = values.clamp_min(0.0).sqrt().flip(0), z.flip(1)
        tau = cut(s)
        k = int((s > tau).sum())
        if k == 0 or k + 4 > len(s) or float(s[-1]) > 0.85 * tau:
            return None
        few = min(len(s), k + 4 + k // 16)
        u = (y @ (z[:, :few] / s[:few])).to(x.dtype)
        w = v @ z[:, :few].to(x.dtype)
        rest = x.mT @ u - w * s[:few].to(x.dtype)
        off = torch.linalg.vector_norm(rest, dim=0).double()
        off[k:] = (s[k:few] + off[k:] - tau).clamp_min(0.0)
        if float(off.norm()) <= target * size:
            return u[:, :k], s[:k], w[:, :k], v @ z[:, : helpful(k)].to(x.dtype)
        rest = rest[:, off > target * size / (3 * few**0.5)]
        if v.shape[1] + rest.shape[1] > x.shape[1] // 2:
            return None
        for _ in range(2):  # the second pass: what the first leaves of v is of the size of its rounding
            rest = rest - v @ (v.mT @ rest)
            rest, _, _ = orthonormal(rest)
        more = (x @ rest).to(torch.float64)
        v, y = torch.cat([v, rest], 1), torch.cat([y, more], 1)
        corner = more.mT @ y
        g = torch.cat([torch.cat([g, corner[:, : len(g)].mT], 1), corner])
    return None
