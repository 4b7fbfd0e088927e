"""Polynomials and rational functions that push singular values to one: their coefficients, computed on the host."""

from __future__ import annotations

import math
from functools import lru_cache

__all__ = ["FLUSH", "halley", "schedule"]

Quintic = tuple[float, float, float]

FLUSH: Quintic = (0.0, 2.5, -1.5)
"""x^3 (5 - 3 x^2) / 2: values under 0.816 fall to 0, those above go to 1, 1 - e to 1 - 7.5 e^2."""

MARGIN = 1.01
"""How much larger than computed the largest value may be, through rounding in the products."""


@lru_cache(maxsize=64)
def schedule(low: float, flushes: int = 2) -> tuple[Quintic, ...]:
    """Coefficients (a, b, c) of steps x -> a x + b x^3 + c x^5 that bring values in [low, 1] to 1 within rounding.

    Every step but the last ones is the best of its degree (Amsel et al., "The Polar Express", 2025) for the part above
    a tenth of the interval that the one before leaves: the best one for a longer interval would grow small values by
    4.2 instead of 3.8, but throw some large ones down to a hundredth, where they lose that much accuracy. The last ones
    are `FLUSH`; two leave 1e-8, three 1e-15. low : in (0, 1).
    """
    steps: list[Quintic] = []
    high = 1.0
    # Two flushes square the error twice, with a factor 7.5 each; one must start closer.
    enough = 1e-3 if flushes >= 2 else 1e-4
    while high - low > 2 * enough:
        a, b, c, error = _best(max(low, 0.1 * high), high)
        low, high = min(a * low + b * low**3 + c * low**5, 1.0 - error), 1.0 + error
        scale = 1.0 if error <= enough else 1.0 / (high * MARGIN)
        steps.append((a * scale, b * scale, c * scale))
        low, high = low * scale, max(high * scale, 1.0 - error)
    return (*steps, *[FLUSH] * flushes)


def _best(low: float, high: float) -> tuple[float, float, float, float]:
    """The odd polynomial of degree 5 nearest to 1 on [low, high], and its largest error (Remez exchange)."""
    import torch

    q, r = (3 * low + high) / 4, (low + 3 * high) / 4
    a = b = c = error = 0.0
    for _ in range(40):
        points = torch.tensor([low, q, r, high], dtype=torch.float64)
        signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
        system = torch.stack([points, points**3, points**5, signs], 1)
        a, b, c, error = torch.linalg.solve(system, torch.ones(4, dtype=torch.float64)).tolist()
        # Extrema: a + 3 b t + 5 c t^2 = 0, t = x^2.
        root = math.sqrt(max(9 * b * b - 20 * a * c, 0.0))
        q, r = sorted(math.sqrt((-3 * b + s * root) / (10 * c)) for s in (-1.0, 1.0))
    return a, b, c, error


def halley(low: float) -> tuple[float, float, float, float]:
    """(a, b, c) of x (a + b x^2) / (1 + c x^2), best for values in [low, 1], and the new lower end.

    Source: Nakatsukasa, Bai and Gygi (2010).
    """
    d = (4 * (1 - low * low) / low**4) ** (1 / 3)
    a = math.sqrt(1 + d) + 0.5 * math.sqrt(8 - 4 * d + 8 * (2 - low * low) / (low * low * math.sqrt(1 + d)))
    b = (a - 1) ** 2 / 4
    c = a + b - 1
    return a, b, c, min(1.0, low * (a + b * low * low) / (1 + c * low * low))
