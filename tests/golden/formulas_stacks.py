"""Methods over stacks of adapters that no package offers, in dense float64: shared frames and clustered units."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["STACK_RULES"]

Array = Any
Pairs = dict[str, list[tuple[Array, Array]]]


def _leading(gram: Array, size: int) -> Array:
    return np.linalg.eigh(gram)[1][:, ::-1][:, :size]


def _positive(u: Array) -> Array:
    return u * np.where(np.take_along_axis(u, np.abs(u).argmax(0)[None], 0) < 0, -1.0, 1.0)


def _frame(deltas: list[Array], weights: list[float], p: int, q: int, sweeps: int) -> tuple[Array, Array]:
    """Orthogonal iteration from the dominant subspaces, in the basis that diagonalises the sums of the cores."""
    u = _leading(sum(w * d @ d.T for w, d in zip(weights, deltas)), p)  # noqa: B905
    v = _leading(sum(w * d.T @ d for w, d in zip(weights, deltas)), q)  # noqa: B905
    for _ in range(sweeps):
        u = _leading(sum(w * d @ v @ v.T @ d.T for w, d in zip(weights, deltas)), p)  # noqa: B905
        v = _leading(sum(w * d.T @ u @ u.T @ d for w, d in zip(weights, deltas)), q)  # noqa: B905
    cores = [u.T @ d @ v for d in deltas]
    u = u @ _leading(sum(c @ c.T for c in cores), p)
    v = v @ _leading(sum(c.T @ c for c in cores), q)
    return _positive(u), _positive(v)


def compress_then_merge(
    pairs: Pairs, frame_rank: int, norm_share: float, max_iter: int, tol: float, weight: list[float]
) -> dict[str, Array]:
    """Compress then merge, arXiv 2606.03723, with a weighted sum of the cores: targets of adjusted norm, one frame."""
    found = {}
    for m, given in pairs.items():
        deltas = [b @ a for b, a in given]
        norms = [np.linalg.norm(d) for d in deltas]
        mean = sum(norms) / len(norms)
        targets = [(norm_share * n + (1 - norm_share) * mean) / n for n in norms]
        u, v = _frame(deltas, [t * t for t in targets], frame_rank, frame_rank, max_iter)
        found[m] = u @ sum(w * u.T @ d @ v for w, d in zip(weight, deltas)) @ v.T  # noqa: B905
    return found


def tucker_merge(pairs: Pairs, energy_share: float, max_iter: int, tol: float) -> dict[str, Array]:
    """The sum of the cores in the least frame of which each side keeps the share of the energy."""
    found = {}
    for m, given in pairs.items():
        deltas = [b @ a for b, a in given]
        sizes = []
        for gram in (sum(d @ d.T for d in deltas), sum(d.T @ d for d in deltas)):
            values = np.linalg.eigvalsh(gram)[::-1]
            sizes.append(int(np.argmax(np.cumsum(values) >= energy_share * values.sum())) + 1)
        u, v = _frame(deltas, [1.0] * len(deltas), *sizes, max_iter)
        found[m] = u @ u.T @ sum(deltas) @ v @ v.T
    return found


def _clusters(z: Array, k: int) -> Array:
    """The partition into k clusters of least inertia, by dynamic programming over all subsets (12 points: 4096)."""
    size = 1 << len(z)
    cost = [0.0] * size
    for subset in range(1, size):
        own = z[[i for i in range(len(z)) if subset >> i & 1]]
        cost[subset] = float(((own - own.mean(0)) ** 2).sum())
    least: list[dict[int, tuple[float, int]]] = [{0: (0.0, 0)}]
    for _ in range(k):
        found = {}
        for subset in range(1, size):
            first, rest = subset & -subset, subset & (subset - 1)
            part, best = rest, (np.inf, 0)  # a cluster holds the first point and some part of the others
            while True:
                before = least[-1].get(subset ^ first ^ part)
                if before is not None and before[0] + cost[first | part] < best[0]:
                    best = before[0] + cost[first | part], first | part
                if part == 0:
                    break
                part = (part - 1) & rest
            if best[1]:
                found[subset] = best
        least.append(found)
    labels, left = np.zeros(len(z), dtype=int), size - 1
    for c in range(k):
        own = least[k - c][left][1]
        labels[[i for i in range(len(z)) if own >> i & 1]] = c
        left ^= own
    return labels


def lora_lego(
    pairs: Pairs,
    k: int,
    n_starts: int,
    features: str = "balanced",
    sign: str = "canonical",
    reweight: bool = True,
    output: str = "sqrt_r_k",
) -> dict[str, Array]:
    """Zhao et al. 2024, arXiv 2409.16167: units [a; b], clustered; centroids of their units' mean largest entry."""
    found = {}
    for m, given in pairs.items():
        b, a = np.hstack([b for b, _ in given]), np.vstack([a for _, a in given])
        if features == "balanced":
            ratio = np.sqrt(np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=0))
            b, a = b * ratio, a / ratio[:, None]
        if sign == "canonical":
            turn = np.where(np.take_along_axis(a, np.abs(a).argmax(1)[:, None], 1) < 0, -1.0, 1.0)
            b, a = b * turn.T, a * turn
        z = np.hstack([a, b.T])
        labels = _clusters(z, k)
        total = 0.0
        for c in range(k):
            own = z[labels == c]
            mu = own.mean(0)
            if reweight:
                mu = mu * np.abs(own).max(1).mean() / np.abs(mu).max()
            total = total + np.outer(mu[a.shape[1] :], mu[: a.shape[1]])
        found[m] = total * np.sqrt(len(z) / len(given) / k if output == "sqrt_r_k" else 1.0)
    return found


STACK_RULES: dict[str, Callable[..., dict[str, Array]]] = {
    "compress_then_merge": compress_then_merge,
    "tucker_merge": tucker_merge,
    "lora_lego": lora_lego,
}
