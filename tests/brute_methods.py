"""Element-wise methods once more, written from their formulas in numpy, sharing no code with the package.

Everything is float32 and flat; each numpy operation rounds once. Sums of a statistic are exact (math.fsum).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np

f = np.float32
Array = np.ndarray


def words(seed: int, name: str, stream: int, n: int) -> Array:
    """Philox4x32-10 words of elements 0 .. n - 1 as uint64."""
    mask = np.uint64(0xFFFFFFFF)
    tid = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    block = np.arange((n + 3) // 4, dtype=np.uint64)
    c = [block & mask, block >> np.uint64(32), np.full_like(block, tid), np.full_like(block, stream)]
    k = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [
            (p1 >> np.uint64(32)) ^ c[1] ^ np.uint64(k[0]),
            p1 & mask,
            (p0 >> np.uint64(32)) ^ c[3] ^ np.uint64(k[1]),
            p0 & mask,
        ]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return np.stack(c, 1).reshape(-1)[:n]


def places(key: Array, seed: int, name: str, model: int, policy: str = "hash") -> Array:
    """0 for the largest: key descending, then word of purpose 2, then index."""
    n = len(key)
    word = words(seed, name, 16 * model + 2, n) if policy == "hash" else np.zeros(n)
    order = np.lexsort((np.arange(n), word, -key.astype(np.float64)))
    place = np.empty(n, dtype=np.int64)
    place[order] = np.arange(n)
    return place


def row_ranks(d: Array, shape: tuple[int, ...], dim: int, seed: int, name: str, model: int) -> tuple[Array, int]:
    """(rank of |d| along a dimension, 1 for the smallest, in the shape of d; length of a row)."""
    word = words(seed, name, 16 * model + 2, d.size).reshape(shape)
    index = np.arange(d.size).reshape(shape)
    key = np.abs(d).reshape(shape).astype(np.float64)
    rows = [np.moveaxis(x, dim, -1).reshape(-1, shape[dim]) for x in (key, word, index)]
    rank = np.empty(d.size, dtype=np.int64)
    for k, w, i in zip(*rows, strict=True):
        for place, at in enumerate(np.lexsort((i, w, -k))):
            rank[i[at]] = len(k) - place
    return rank, shape[dim]


def l1_factor(d: Array, kept: Array) -> np.float32:
    """The ratio of the sums of magnitudes."""
    before, after = (math.fsum(np.abs(x).astype(np.float64)) for x in (d, kept))
    return f(1.0) if before < 1e-7 or after < 1e-7 else f(before / after)


def ordered(parts: Sequence[Array]) -> Array:
    """The sum of +0 and the parts in order."""
    total = np.zeros_like(parts[0])
    for part in parts:
        total = total + part
    return total


def combine(
    kept: Sequence[Array],
    weights: Sequence[float],
    *,
    vote: str,
    divide: str = "none",
    zero: int = 1,
    merge: str = "sum",
    scale: float = 1.0,
) -> Array:
    """The merged delta. vote: none, weighted, plain or count; divide: none, weights or count."""
    w = [f(x) for x in weights]
    v = [a * e for a, e in zip(w, kept, strict=True)]
    if vote == "none":
        q = ordered(v)
        if divide == "weights":
            total = f(0)
            for a in w:
                total = f(total + a)
            q = q / (total if abs(total) >= 1e-8 else f(1))
        return q * f(scale)
    stand = v if vote == "weighted" else list(kept)
    votes = ordered([np.sign(x) for x in kept] if vote == "count" else stand)
    sign = np.where(votes > 0, 1, np.where(votes < 0, -1, zero))
    agree = [(np.sign(x) == sign) & (sign != 0) for x in stand]
    if merge == "max":
        return sign * np.max([np.where(a, np.abs(x), f(0)) for a, x in zip(agree, v, strict=True)], 0) * f(scale)
    q = ordered([np.where(a, x, f(0)) for a, x in zip(agree, v, strict=True)])
    if divide == "weights":
        u = ordered([np.where(a, x, f(0)) for a, x in zip(agree, w, strict=True)])
        q = q / np.where(u == 0, f(1), u)
    elif divide == "count":
        q = q / np.maximum(f(1), np.sum(agree, 0).astype(np.float32))
    return q * f(scale)


def majority(kept: Sequence[Array]) -> int:
    """The sign that most of the elected signs have."""
    return int(np.sign(np.sum(np.sign(ordered(kept)))))


def softmax_divergence(x1: Array, x0: Array) -> np.float32:
    """The divergence of one row, each operation rounded, the sum exact."""

    def probabilities(x: Array) -> Array:
        e = np.exp((x - x.max()).astype(np.float64)).astype(np.float32)
        z = f(math.fsum(e.astype(np.float64)))
        return (e / z + f(1e-8)).astype(np.float32)

    p, q = probabilities(x1), probabilities(x0)
    terms = p * np.log((p / q).astype(np.float64)).astype(np.float32)
    return f(max(0.0, math.fsum(terms.astype(np.float64))))


def pcb(deltas: Sequence[Array], ratio: float, clip: float, lam: float) -> Array:
    """The merged delta of parameter competition balancing."""
    n, count = len(deltas[0]), len(deltas)
    total = ordered(deltas)
    tops, clipped = [], []
    for d in deltas:
        ascending = np.sort(np.abs(d))
        lo = ascending[int(n * clip)]
        hi = max(lo, ascending[max(0, int(n * (1 - clip) - 1))])
        a = np.clip(np.abs(d), lo, hi)
        m = (a - lo) / (hi - lo) if hi > lo else np.zeros_like(a)
        z = np.exp((f(count) * (m * m)).astype(np.float64)).astype(np.float32)
        z = np.maximum(f(0), z * np.tanh((d * total).astype(np.float64)).astype(np.float32))
        ascending = np.sort(z)
        cut, top = ascending[min(n - 1, int(n * (1 - ratio)))], ascending[-1]
        tops.append((np.maximum(z, cut) - cut) / (top - cut) if top > cut else np.zeros_like(z))
        clipped.append(np.sign(d) * a)
    num = ordered([c * b for c, b in zip(tops, clipped, strict=True)])
    return num / np.maximum(ordered(tops), f(1e-12)) * f(lam)


def variance(deltas: Sequence[Array]) -> Array:
    """The population variance over the models."""
    count = f(len(deltas))
    mean = ordered(deltas) / count
    return ordered([(d - mean) * (d - mean) for d in deltas]) / count
