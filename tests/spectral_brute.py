"""The methods over matrices by their formulas: float64, dense singular value decompositions, support only."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

TOL = 1e-7
"""Relative cut on singular values, between the noise of float32 products and the least genuine value in the tests."""


def svd(x: torch.Tensor, tol: float = TOL) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    rank = int((s > tol * s[0]).sum()) if float(s[0]) > 0 else 0
    return u[:, :rank], s[:rank], vh[:rank].T


def polar(x: torch.Tensor) -> torch.Tensor:
    u, _, v = svd(x)
    return u @ v.T


def tsv_m(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    k = min(deltas[0].shape) // len(deltas)
    parts = [svd(d) for d in deltas if float(d.abs().max()) > 0]
    if not parts:
        return torch.zeros_like(deltas[0], dtype=torch.float64)
    u = torch.cat([u[:, :k] for u, _, _ in parts], 1)
    s = torch.cat([s[:k] for _, s, _ in parts])
    v = torch.cat([v[:, :k] for _, _, v in parts], 1)
    return polar(u) @ torch.diag(s) @ polar(v).T


def iso_c(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    total = sum(d.double() for d in deltas)
    u, s, v = svd(total)
    return float(s.sum()) / min(total.shape) * (u @ v.T)


def iso_cts(deltas: Sequence[torch.Tensor], fraction: float) -> torch.Tensor:
    q, count = min(deltas[0].shape), len(deltas)
    n = count * round((q - int(q * fraction)) / count)
    c, k = q - n, n // count
    u, s, v = svd(sum(d.double() for d in deltas))
    uc, sc, vc = u[:, :c], s[:c], v[:, :c]
    lefts, rights, values = [], [], [sc]
    for d in deltas:
        rest = d.double() - uc @ (uc.T @ d.double())
        if float(rest.norm()) <= 1e-6 * float(d.double().norm()):
            continue
        ut, st, vt = svd(rest, 1e-6)
        lefts.append(ut[:, :k])
        rights.append(vt[:, :k])
        values.append(st[:k])
    left = polar(torch.cat([*lefts, uc], 1))
    right = polar(torch.cat([*rights, vc], 1))
    return float(torch.cat(values).sum()) / q * (left @ right.T)


def star(deltas: Sequence[torch.Tensor], eta: float) -> torch.Tensor:
    total = torch.zeros_like(deltas[0], dtype=torch.float64)
    for d in deltas:
        if float(d.abs().max()) == 0:
            continue
        u, s, v = svd(d)
        k = 1
        while k < len(s) and float(s[:k].sum()) < eta / 100 * float(s.sum()) * (1 - 1e-12):
            k += 1
        total += u[:, :k] @ torch.diag(s[:k] * (s.sum() / s[:k].sum())) @ v[:, :k].T
    return total / len(deltas)


def low_rank(deltas: Sequence[torch.Tensor], weights: Sequence[float], rank: int) -> torch.Tensor:
    total = torch.zeros_like(deltas[0], dtype=torch.float64)
    for d, w in zip(deltas, weights, strict=True):
        u, s, v = svd(d)
        total += w * (u[:, :rank] @ torch.diag(s[:rank]) @ v[:, :rank].T)
    return total


def opcm(models: Sequence[dict[str, torch.Tensor]], matrices: Sequence[str], alpha: float) -> dict[str, torch.Tensor]:
    """The stream as the authors write it: scaled after every model. models : task vectors by name."""

    def norm(x: dict[str, torch.Tensor]) -> float:
        return math.sqrt(sum(float(t.double().square().sum()) for t in x.values()))

    merged = {k: t.double() for k, t in models[0].items()}
    norms, scale = [norm(models[0])], 1.0
    for model in models[1:]:
        norms.append(norm(model))
        new = {}
        for name, task in model.items():
            y = task.double()
            if name in matrices:
                u, s, v = svd(merged[name])
                p = u.T @ y @ v
                share = torch.cumsum(s, 0) / torch.cumsum(s, 0)[-1]  # never above 1
                above = [i for i, x in enumerate(share.tolist()) if x > alpha]
                k = above[0] if above else 0
                kept = torch.zeros_like(p)
                kept[:k, :k] = p[:k, :k]
                kept.diagonal().copy_(p.diagonal())
                y = y - u @ kept @ v.T
            new[name] = scale * merged[name] + y
        average = sum(norms) / len(norms)
        nu = norm(new)
        merged = {k: t * (average / nu) for k, t in new.items()}
        scale = nu / average
    return merged


def regmean(
    weights: Sequence[torch.Tensor], grams: Sequence[torch.Tensor], factors: Sequence[float], alpha: float
) -> torch.Tensor:
    total = right = 0
    for w, g, c in zip(weights, grams, factors, strict=True):
        shrunk = alpha * g.double() + (1 - alpha) * torch.diag(g.double().diagonal())
        total = total + c * shrunk
        right = right + c * shrunk @ w.double().T
    return torch.linalg.solve(total, right).T


def with_spectrum(
    m: int, n: int, values: Sequence[float] | torch.Tensor, seed: int, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """A random matrix (m, n) with these singular values."""
    g = torch.Generator().manual_seed(seed)
    s = torch.as_tensor(values, dtype=torch.float64)
    u = torch.linalg.qr(torch.randn(m, len(s), generator=g, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(n, len(s), generator=g, dtype=torch.float64)).Q
    return (u * s @ v.T).to(dtype)


def spectra(q: int) -> dict[str, torch.Tensor]:
    """Spectra of a matrix whose smaller side is q."""
    i = torch.arange(q, dtype=torch.float64)
    gapped = torch.where(i < q // 4, 1.0, 0.05) * (1.0 - 0.3 * i / q)
    return {
        "gap": gapped,
        "flat": 1.0 - 0.5 * i / q,
        "head": torch.where(i < 3, 100.0, 1.0) * (1.0 - 0.5 * i / q),
        "power": (i + 1.0) ** -0.7,
        "ill": 10.0 ** (-4.0 * i / q),
    }


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative Frobenius error."""
    expected = expected.double()
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-300))
