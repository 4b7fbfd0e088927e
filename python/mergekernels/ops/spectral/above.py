"""The singular triplets above a threshold, where they are few: filtered subspace iteration in blocks.

X + E has the triplets found exactly, with E = U (W S - X^T U)^T, and a proximal map does not expand: so the residual
||E||_F bounds the error of the shrunk matrix, however close together values lie.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from .follow import followed, helpful
from .gram import inner
from .iterations import probes
from .qr import tall_qr
from .sharded import moderate

if TYPE_CHECKING:
    import torch

__all__ = ["remainder", "triplets_above"]

ROUNDS = 14
TARGET = 4e-7
"""Residual at which to stop, beside ||X||_F: a little above what products in float32 leave."""

GROWTH = 1e6
"""Largest ratio by which one filter may spread values: beyond it float32 loses the weaker ones."""

Triplets = tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]


def triplets_above(
    x: torch.Tensor, cut: Callable[[torch.Tensor], float], warm: torch.Tensor | None
) -> tuple[Triplets, torch.Tensor] | None:
    """((u, s, w), the block that held them) with all values above the cut, or None if that would be no gain.

    x : (m, n) float32, m >= n. cut : falling values -> threshold; called with the leading values of x. warm : (n, k)
    start, of any columns. w : (n, k), s float64. The values asked for are all of those above cut(values of the block).
    """
    import torch

    n = x.shape[1]
    most = n // 6  # from about there an eigendecomposition is as fast
    if warm is not None and warm.shape[1] <= n // 3 and moderate(x):
        near = followed(x, warm, cut, TARGET)
        if near is not None:
            u, s, w, basis = near
            if remainder(x, w, cut(s), steps=3) is None:
                return (u, s, w), basis
        warm = warm[:, : warm.shape[1] // 2]
    size = inner(x, x) ** 0.5
    extra = _signs(n, 24, x)
    block = extra if warm is None else torch.cat([warm.to(x), extra[:, :8]], 1)
    if block.shape[1] > most or size == 0.0 or not moderate(x):
        return None
    block = tall_qr(block).q
    for _ in range(ROUNDS):
        u, s, w, back = _ritz(x, block)
        tau = cut(s)
        k = int((s > tau).sum())
        full = s.numel() == block.shape[1]
        if full and float(s[-1]) > 0.85 * tau:  # it ends above the threshold, or too near for a filter
            growth = 1.5 if k < s.numel() else 4 if s.numel() < 64 else 2
            wider = min(int(growth * s.numel()), most)
            if wider <= s.numel():
                return None
            block = _widened(w, wider, x)
            continue
        off = torch.linalg.vector_norm(back - w * s.to(x.dtype), dim=0).double()
        # A value found below the threshold may still rise by its residual.
        off[k:] = (s[k:] + off[k:] - tau).clamp_min(0)
        excess = float(off.norm()) / (TARGET * size)
        if excess <= 1:
            missed = remainder(x, w, tau)
            if missed is None:
                return (u[:, :k], s[:k], w[:, :k]), w[:, : helpful(k)]
            block = tall_qr(torch.cat([w, missed], 1)).q
            continue
        filtered = tall_qr(_filtered(x, w, back, s, tau, excess, _settled(off, s, size))).q
        # A filter aimed at early estimates can map columns onto each other.
        width = block.shape[1]
        block = _widened(filtered, width, x) if filtered.shape[1] < width else filtered
    return None


def _widened(w: torch.Tensor, width: int, x: torch.Tensor) -> torch.Tensor:
    """The orthonormal columns of w and random ones."""
    import torch

    q: torch.Tensor = tall_qr(torch.cat([w, _signs(w.shape[0], width, x)[:, w.shape[1] :]], 1)).q
    return q


def _signs(n: int, count: int, x: torch.Tensor) -> torch.Tensor:
    return probes(n, x.dtype, x.device, count) / math.sqrt(n)


def _ritz(x: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """u, falling s (float64), w with X w = u diag(s), w spanning q; and X^T u. Only of non-zero s."""
    import torch

    z = x @ q
    wide = z.to(torch.float64)
    values, vectors = torch.linalg.eigh(wide.mT @ wide)
    s = values.clamp_min(0).sqrt().flip(0)
    keep = s > 1e-6 * s[0]
    s, v = s[keep], vectors.flip(1)[:, keep]
    u = (wide @ (v / s)).to(x.dtype)
    w = (q.to(torch.float64) @ v).to(x.dtype)
    return u, s, w, x.mT @ u


def _settled(off: torch.Tensor, s: torch.Tensor, size: float) -> int:
    """How many leading pairs have converged: to their share of what is allowed, or to rounding."""
    import torch

    share = TARGET * size / (3 * math.sqrt(off.numel()))
    unsettled = (off > torch.clamp_min(4e-7 * s, share)).nonzero()
    return int(unsettled[0]) if unsettled.numel() else int(off.numel())


def _filtered(
    x: torch.Tensor, w: torch.Tensor, back: torch.Tensor, s: torch.Tensor, tau: float, excess: float, done: int
) -> torch.Tensor:
    """A Chebyshev polynomial of X^T X in w, its columns at equal size.

    It damps what is below 0.7 tau, or below all of w, and has the degree that should divide residuals by `excess`.
    The first `done` columns have converged: they stay, and are projected out of the others, so that a strong head does
    not force the degree down.
    """
    import torch

    head, s = w[:, :done], s[done:]
    low = max(min(float(s[-1]), 0.85 * tau), 0.7 * min(tau, float(s[0]))) ** 2
    wanted = math.acosh(10 * max(excess, 1.0)) / math.acosh(max(2 * tau**2 / low - 1, 1.1))
    most = math.acosh(GROWTH) / math.acosh(max(2 * float(s[0]) ** 2 / low - 1, 1.1))
    degree = max(2, min(8, math.ceil(wanted), int(most)))
    scale = s.to(x.dtype)
    before = w[:, done:]
    now = back[:, done:] * scale * (2 / low) - before  # known: X^T X w = X^T u diag(s)
    ratio = (2 * s**2 / low - 1).to(x.dtype)
    sizes = [ratio.new_ones(ratio.shape), ratio]
    for _ in range(degree - 1):
        now = now - head @ (head.mT @ now)
        before, now = now, (x.mT @ (x @ now)) * (4 / low) - 2 * now - before
        sizes.append(2 * ratio * sizes[-1] - sizes[-2])
    return torch.cat([head, now / sizes[-1].abs().clamp_min(1.0)], 1)


def remainder(x: torch.Tensor, w: torch.Tensor, tau: float, steps: int = 6) -> torch.Tensor | None:
    """Directions outside w in which X is larger than the threshold, by power steps; None if there seem to be none."""
    import torch

    # As rows: products with few columns are several times slower.
    v = _signs(x.shape[1], 8, x).mT.contiguous()
    size = v.new_ones(8)
    for _ in range(steps):
        for _ in range(2):  # the second pass matters where next to nothing is left by the first
            v = v - (v @ w) @ w.mT
            v = v / torch.linalg.vector_norm(v, dim=1, keepdim=True).clamp_min(1e-30)
        y = v @ x.mT
        size = torch.linalg.vector_norm(y, dim=1)
        v = y @ x
    return v.mT if float(size.max()) > tau * (1 + 1e-4) else None
