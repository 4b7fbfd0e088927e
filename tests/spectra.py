"""Matrices with prescribed singular values, and plain float64 references of what the spectral ops compute.

`SPECTRA` names the kinds: "gap" (two groups), "flat" (no gap: a Gaussian's), "head" (a few far above the rest),
"decay" (power law), "ill" (log-spaced over 1e4), "deficient" (a quarter of the values zero),
"degenerate" (equal pairs) and "zero".
"""

from __future__ import annotations

import torch

F64 = torch.float64
SPECTRA = ("gap", "flat", "head", "decay", "ill", "deficient", "degenerate", "zero")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(m: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, n, generator=generator(seed), dtype=F64)


def orthonormal(m: int, k: int, seed: int = 0) -> torch.Tensor:
    """(m, k) with orthonormal columns, float64."""
    return torch.linalg.qr(gaussian(m, k, seed))[0]


def values(kind: str, q: int, seed: int = 0) -> torch.Tensor:
    """q falling singular values of a kind, float64."""
    i = torch.arange(q, dtype=F64)
    if kind == "gap":
        return torch.where(i < q // 3, 3.0, 1.0) * (1 - 0.2 * i / q)
    if kind == "flat":
        return torch.linalg.svdvals(gaussian(2 * q, q, seed)) / q**0.5
    if kind == "head":
        return torch.where(i < 3, 100.0 - 20 * i, 1.0 - 0.5 * i / q)
    if kind == "decay":
        return (i + 1) ** -0.7
    if kind == "ill":
        return torch.logspace(0, -4, q, dtype=F64)
    if kind == "deficient":
        return torch.where(i < q - q // 4, 1.0 - 0.5 * i / q, 0.0)
    if kind == "degenerate":
        return 2.0 - (i // 2) * 2 / q
    if kind == "zero":
        return torch.zeros(q, dtype=F64)
    raise ValueError(kind)


def with_values(s: torch.Tensor, m: int, n: int, seed: int = 0) -> torch.Tensor:
    """An (m, n) float64 matrix with these singular values and random vectors."""
    q = s.numel()
    return orthonormal(m, q, seed + 1) @ (s[:, None] * orthonormal(n, q, seed + 2).mT)


def matrix(kind: str, m: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """An (m, n) matrix of a kind, rounded to `dtype`."""
    return with_values(values(kind, min(m, n), seed), m, n, seed).to(dtype)


def factors(kind: str, m: int, n: int, r: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """b (m, r) and a (r, n), float32, not orthogonal, whose product has r singular values of a kind ."""
    s = values(kind, r, seed)
    mix = torch.linalg.qr(gaussian(r, r, seed + 3))[0] * torch.linspace(0.5, 2.0, r, dtype=F64)
    b = orthonormal(m, r, seed + 1) * s @ mix
    a = torch.linalg.solve(mix, orthonormal(n, r, seed + 2).mT)
    return b.float(), a.float()


def svd(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """u, s, vh in float64."""
    return torch.linalg.svd(x.to(F64), full_matrices=False)


def polar_of(x: torch.Tensor, rank: int | None = None, tol: float = 1e-6) -> torch.Tensor:
    """U V^T in float64 over the first `rank` values, or those above tol times the first."""
    u, s, vh = svd(x)
    k = rank if rank is not None else int((s > tol * s[0]).sum()) if s.numel() else 0
    return u[:, :k] @ vh[:k]


def low_rank_of(x: torch.Tensor, rank: int) -> torch.Tensor:
    """The best approximation of a rank, float64."""
    u, s, vh = svd(x)
    return u[:, :rank] * s[:rank] @ vh[:rank]


def shrunk(x: torch.Tensor, tau: float) -> torch.Tensor:
    """Every singular value less tau, at least 0, float64."""
    u, s, vh = svd(x)
    return u * (s - tau).clamp_min(0) @ vh


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """||got - want||_F / ||want||_F in float64; ||got||_F where want is zero."""
    size = float(want.to(F64).norm())
    return float((got.to(F64) - want.to(F64)).norm()) / (size if size > 0 else 1.0)


def angle(p: torch.Tensor, q: torch.Tensor) -> float:
    """Sine of the largest angle between two subspaces given by orthonormal bases (m, k)."""
    p, q = p.to(F64), q.to(F64)
    return float(torch.linalg.matrix_norm(p - q @ (q.mT @ p), ord=2)) if p.numel() else 0.0
