"""The merging formulas once more, element by element in numpy scalars, sharing no code with the package."""

from __future__ import annotations

import hashlib

import numpy as np


def philox_word(seed: int, tensor: str, stream: int, g: int) -> int:
    """Word g mod 4 of Philox4x32-10 for a tensor by its name, in Python integers."""
    return philox(seed, int.from_bytes(hashlib.sha256(tensor.encode()).digest()[:4], "little"), stream, g)


def philox(seed: int, tid: int, stream: int, g: int) -> int:
    """The same for a tensor by its number."""
    mask = 0xFFFFFFFF
    c = [(g // 4) & mask, (g // 4) >> 32, tid, stream]
    k = [seed & mask, seed >> 32]
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & mask, (p0 >> 32) ^ c[3] ^ k[1], p0 & mask]
        k = [(k[0] + 0x9E3779B9) & mask, (k[1] + 0xBB67AE85) & mask]
    return c[g % 4]


def top_k(values: np.ndarray, k: int, policy: str, words) -> set[int]:
    """Positions of the k largest magnitudes; words(position) orders equals under "hash"."""
    magnitude = np.abs(values.astype(np.float64))
    if policy == "all":
        threshold = np.sort(magnitude)[::-1][k - 1]
        return {int(i) for i in np.nonzero(magnitude >= threshold)[0]}
    tie = (lambda i: (words(i), i)) if policy == "hash" else (lambda i: (0, i))
    order = sorted(range(len(values)), key=lambda i: (-magnitude[i], *tie(i)))
    return set(order[:k])


def ties(
    base: dict[str, np.ndarray],
    models: list[dict[str, np.ndarray]],
    *,
    weights: list[float],
    density: list[float],
    scale: float = 1.0,
    normalize: bool = True,
    dialect: str = "default",
    scope: str = "tensor",
    policy: str = "hash",
    zero_vote: str = "positive",
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """TIES over a model given as flat float32 arrays by name."""
    f = np.float32
    names = sorted(base)
    deltas = [{n: m[n] - base[n] for n in names} for m in models]
    groups = [names] if scope == "model" else [[n] for n in names]
    trimmed: list[dict[str, np.ndarray]] = []
    for t, d in enumerate(deltas):
        result = {}
        for group in groups:
            flat = np.concatenate([d[n] for n in group])
            place = [(n, i) for n in group for i in range(len(d[n]))]
            size, rho = len(flat), density[t]
            if rho >= 1:
                kept = set(range(size))
            elif rho <= 0 or size == 0:
                kept = set()
            else:
                k = int(rho * size) + 1 if dialect == "paper" else max(1, int(rho * size))
                kept = top_k(
                    flat,
                    min(k, size),
                    policy,
                    lambda p, t=t, place=place: philox_word(seed, place[p][0], 16 * t + 2, place[p][1]),
                )
            for p, (n, i) in enumerate(place):
                result.setdefault(n, np.zeros_like(d[n]))[i] = flat[p] if p in kept else f(0)
        for n in names:
            result.setdefault(n, np.zeros_like(d[n]))
        trimmed.append(result)
    w = [f(x) for x in weights]
    sums = {n: np.zeros_like(base[n]) for n in names}
    for n in names:
        for t in range(len(models)):
            sums[n] = sums[n] + w[t] * trimmed[t][n]
    out = {}
    for group in groups:
        votes = sum(int(np.sign(x)) for n in group for x in sums[n])
        zero = {"positive": 1, "zero": 0, "majority": int(np.sign(votes))}[zero_vote]
        for n in group:
            y = np.empty_like(base[n])
            for i in range(len(y)):
                sign = int(np.sign(sums[n][i])) or zero
                num, div, count = f(0), f(0), 0
                for t in range(len(models)):
                    v = w[t] * trimmed[t][n][i]
                    if sign != 0 and np.sign(v) == sign:
                        num, div, count = f(num + v), f(div + w[t]), count + 1
                if normalize:
                    divisor = f(max(count, 1)) if dialect == "paper" else (div if div != 0 else f(1))
                    num = f(num / divisor)
                y[i] = f(base[n][i] + f(num * f(scale)))
            out[n] = y
    return out
