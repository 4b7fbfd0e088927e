"""Polar factors by products alone (Newton-Schulz) or by products and Cholesky factors (QDWH).

Matrices come as row shards, a list of (..., m_i, n) tensors; shards stay where they are and exchange n x n Grams.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .gram import plain_gram
from .minimax import halley, schedule
from .sharded import Sharded

if TYPE_CHECKING:
    import torch

__all__ = ["extremes", "newton_schulz", "qdwh"]

LOWEST = 1e-7
"""Smallest relative singular value that an iteration in float32 is aimed at."""


def newton_schulz(parts: list[torch.Tensor], tol: float) -> list[torch.Tensor]:
    """U V^T over the singular values above about tol * sigma_1: a fixed number of steps, then two flushes.

    parts : row shards (..., m_i, n), float32 or float64, sum m_i >= n; a batch shares its steps.
    Values within a factor 4 below tol * sigma_1 may go either way, and what is not near 0 or 1 at the end shows in the
    residual; null directions are amplified by at most about 1 / tol before they are flushed to zero.
    """
    import torch

    # Squares must not leave the range of the dtype, however small or large the matrix is.
    size = torch.stack([p.abs().amax((-2, -1), keepdim=True).to(parts[0].device) for p in parts if p.numel()]).amax(0)
    size = torch.where(size > 0, size, torch.ones_like(size))
    parts = [p / size.to(p.device) for p in parts]
    g = plain_gram(parts)
    # An upper bound of sigma_1: an estimate that can be low would let the iteration diverge.
    bound = torch.linalg.matrix_norm(g, ord=1, keepdim=True).sqrt()
    scale = torch.where(bound > 0, 1.01 * bound, torch.ones_like(bound))
    parts = [p / scale.to(p.device) for p in parts]
    g = g / scale**2
    # The bound may be up to sqrt(n) above sigma_1; what it really is decides how low the steps must reach.
    slack = float((bound / _largest(g, scale)).max().clamp_min(1.0)) if g.numel() else 1.0
    steps = schedule(min(0.99, max(tol / slack, LOWEST)), 3 if g.dtype == torch.float64 else 2)
    for i, (a, b, c) in enumerate(steps):
        if i:
            g = plain_gram(parts)
        m = b * g + c * (g @ g)
        m.diagonal(dim1=-2, dim2=-1).add_(a)
        parts = [p @ m.to(p.device) for p in parts]
    return parts


def _largest(g: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """About the largest singular value of the unscaled matrix, from below, by power steps on the scaled Gram."""
    import torch

    v = probes(g.shape[-1], g.dtype, g.device).expand(*g.shape[:-2], -1, -1)
    size = torch.ones((), dtype=g.dtype, device=g.device)
    for _ in range(6):
        v = g @ v
        size = torch.linalg.vector_norm(v, dim=-2, keepdim=True).clamp_min(torch.finfo(g.dtype).tiny)
        v = v / size
    top = size.amax(dim=-1, keepdim=True).sqrt() * scale
    return torch.where(top > 0, top, torch.ones_like(top))


def probes(n: int, dtype: torch.dtype, device: torch.device, count: int = 8) -> torch.Tensor:
    """(n, count) signs, the same in every call."""
    import torch

    generator = torch.Generator().manual_seed(20)
    signs = torch.randint(0, 2, (n, count), generator=generator)
    return (2 * signs - 1).to(dtype=dtype, device=device)


def extremes(g: torch.Tensor, lower: torch.Tensor) -> tuple[float, float]:
    """About the largest and the least singular value of X, from its Gram and the Gram's Cholesky factor.

    Power steps on eight vectors: the largest comes out up to some percent low, the least some percent high.
    """
    import torch

    start = probes(g.shape[0], g.dtype, g.device)
    ends = []
    for inverse in (False, True):
        v = start
        size = torch.linalg.vector_norm(v, dim=0)
        for _ in range(8):
            v = torch.cholesky_solve(v / size, lower) if inverse else g @ (v / size)
            size = torch.linalg.vector_norm(v, dim=0)
        ends.append(float(size.max()))
    return ends[0] ** 0.5, ends[1] ** -0.5


def qdwh(x: Sharded, g: torch.Tensor, top: float, least: float) -> Sharded:
    """U V^T of a matrix of full column rank by dynamically weighted Halley steps; cubic, at most five of them.

    x : row shards. g : its Gram, float64. top, least : about its extreme singular values, of ratio at most 1e6. The
    first step, whose weight is large, treats float32 input in float64, since a step through the Gram loses eps times
    the weight; float64 input is treated by QR while the weight is large, which loses nothing. The last steps are
    Newton-Schulz.
    """
    import torch

    out = x.dtype
    top, least = 1.05 * top, 0.9 * least
    low = least / top
    parts = [p.to(torch.float64) / top for p in x.parts]
    g = g / top**2
    first = True
    while 1.0 - low > 0.04:  # from where two Newton-Schulz steps are enough and cheaper
        a, b, c, low = halley(low)
        if c > 100 and out == torch.float64:
            parts = _by_qr(parts, a, b, c)
        else:
            if not first:
                g = plain_gram(parts)
            z = g * c
            z.diagonal().add_(1.0)
            m = torch.cholesky_inverse(torch.linalg.cholesky(z)) * (a - b / c)
            m.diagonal().add_(b / c)
            parts = [p @ m.to(p.device, p.dtype) for p in parts]
        first = False
        parts = [p.to(out) for p in parts]  # from 1e-6 one step leads to 0.02: what is left loses at most 50 eps
    for a, b, c in [(1.875, -1.25, 0.375)] * (2 if out == torch.float64 else 1) + [(1.5, -0.5, 0.0)]:
        g = plain_gram(parts)
        m = b * g + c * (g @ g) if c else b * g
        m.diagonal().add_(a)
        parts = [p.to(out) @ m.to(p.device, out) for p in parts]
    return Sharded(parts, 0)


def _by_qr(parts: list[torch.Tensor], a: float, b: float, c: float) -> list[torch.Tensor]:
    """The Halley step from the QR of [sqrt(c) X; I], on the first part's device."""
    import torch

    home, sizes = parts[0].device, [p.shape[0] for p in parts]
    x = torch.cat([p.to(home) for p in parts])
    n = x.shape[1]
    q, _ = torch.linalg.qr(torch.cat([c**0.5 * x, torch.eye(n, dtype=x.dtype, device=home)]))
    y = (b / c) * x + ((a - b / c) / c**0.5) * (q[:-n] @ q[-n:].mT)
    return [p.to(q.device) for p, q in zip(y.split(sizes), parts, strict=True)]
