"""The Gram methods as they were published, on whole vectors in extended precision; nothing here sees a Gram matrix."""

from __future__ import annotations

import numpy as np

Real = np.longdouble


def wide(x: np.ndarray) -> np.ndarray:
    """The values in extended precision."""
    return np.asarray(x).astype(Real)


def norm(v: np.ndarray) -> np.longdouble:
    """The Euclidean norm."""
    return np.sqrt((v * v).sum())


def slerp(a: np.ndarray, b: np.ndarray, t: float) -> np.ndarray:
    """mergekit's slerp of two flat vectors."""
    na, nb = norm(a), norm(b)
    cos = ((a / (na if na > 1e-8 else 1)) * (b / (nb if nb > 1e-8 else 1))).sum()
    t = Real(t)
    if abs(cos) > 0.9995:
        return (1 - t) * a + t * b
    theta = np.arccos(cos)
    return (np.sin((1 - t) * theta) * a + np.sin(t * theta) * b) / np.sin(theta)


def nuslerp(a: np.ndarray, b: np.ndarray, weights: list[float]) -> np.ndarray:
    """mergekit's nuslerp of two flat vectors, the angle from the sum and the difference of the unit vectors."""
    w1, w2 = map(Real, weights)
    t = Real(0.5) if abs(w1 + w2) < 1e-6 else w2 / (w1 + w2)
    ua, ub = a / max(norm(a), Real(1e-7)), b / max(norm(b), Real(1e-7))
    zero = not a.any() or not b.any()
    theta = np.arccos(Real(0)) if zero else 2 * np.arctan2(norm(ua - ub), norm(ua + ub))
    if np.sin(theta) <= 1e-8:
        return (1 - t) * a + t * b
    return (np.sin((1 - t) * theta) * a + np.sin(t * theta) * b) / np.sin(theta)


def multislerp(vectors: list[np.ndarray], weights: list[float], normalize: bool, eps: float) -> np.ndarray:
    """mergekit's multislerp with its step in the tangent space."""
    w = np.array(weights, dtype=Real)
    if normalize:
        w = w / w.sum()
    norms = np.array([norm(v) for v in vectors])
    units = [v / (n + Real(eps)) for v, n in zip(vectors, norms, strict=True)]
    mean = sum(x * u for x, u in zip(w, units, strict=True))
    if norm(mean) < eps:
        assert len(vectors) == 2
        return w[0] * vectors[0] + w[1] * vectors[1]
    mean = mean / norm(mean)
    tangent = sum(x * (u - (u * mean).sum() * mean) for x, u in zip(w, units, strict=True))
    size = norm(tangent) + Real(eps)
    return (mean * np.cos(size) + tangent * np.sin(size) / size) * (norms * w).sum()


def karcher(vectors: list[np.ndarray], max_iter: int = 10, tol: float = 1e-5) -> np.ndarray:
    """mergekit's Karcher mean."""
    if len(vectors) == 1:
        return vectors[0]
    norms = [norm(v) for v in vectors]
    units = [v / n for v, n in zip(vectors, norms, strict=True) if n > tol]
    if not units:
        return np.zeros_like(vectors[0])
    alpha = 1 / Real(len(units))
    u = sum(alpha * x for x in units)
    u = units[0] if norm(u) < tol else u / norm(u)
    for _ in range(max_iter):
        tangent = np.zeros_like(u)
        for x in units:
            cos = min(Real(1), max(Real(-1), (u * x).sum()))
            theta = np.arccos(cos)
            if theta >= tol:
                tangent = tangent + alpha * theta / np.sin(theta) * (x - cos * u)
        size = norm(tangent)
        if size < tol:
            break
        u = np.cos(size) * u + np.sin(size) * tangent / size
        u = u / norm(u)
    return sum(norms) / Real(len(norms)) * u


def model_stock(base: np.ndarray, models: list[np.ndarray], floor: float, angles: bool = False) -> np.ndarray:
    """mergekit's Model Stock of flat vectors, or with `angles` fusion_bench's."""
    deltas = [m - base for m in models]
    count = len(models)
    found = []
    for i in range(count):
        for j in range(i + 1, count):
            product = norm(deltas[i]) * norm(deltas[j])
            dot = (deltas[i] * deltas[j]).sum()
            if angles:
                found.append(np.arccos(np.clip(dot / (product + Real(1e-8)), -1, 1)))
            else:
                product = max(product, Real(floor))
                found.append(np.clip(dot / product, -1, 1) if product > 0 else Real(0))
    c = sum(found) / len(found)
    if angles:
        c = np.cos(c)
        t = count * c / ((count - 1) * c + 1 + Real(1e-8))
    else:
        below = 1 + (count - 1) * c
        t = count * c / below if abs(below) >= 1e-6 else Real(0)
    return t * sum(models) / count + (1 - t) * base


def pcgrad(vectors: list[np.ndarray], orders: list[list[int]]) -> np.ndarray:
    """The sum of the projected gradients, `orders` giving for each the others that it meets."""
    total = np.zeros_like(vectors[0])
    for i, order in enumerate(orders):
        h = vectors[i]
        for j in order:
            q = (h * vectors[j]).sum()
            if q < 0:
                h = h - q / (vectors[j] * vectors[j]).sum() * vectors[j]
        total = total + h
    return total


def from_norm(base: np.ndarray, models: list[np.ndarray], k: float) -> np.ndarray:
    """FroM's closed form."""
    deltas = [m - base for m in models]
    powers = [norm(d) ** Real(k) for d in deltas]
    if not any(d.any() for d in deltas):
        return base
    return base + sum(p * d for p, d in zip(powers, deltas, strict=True)) / sum(powers)
