"""Adapters in memory for tests, and their deltas in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from mergekernels.adapters.model import Adapter, Factors, Module, Site

NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}


def site(module: str, m: int = 24, n: int = 16, kind: str = "linear") -> Site:
    """A site whose matrix is m x n."""
    shape = {"linear": (m, n), "fan_in_fan_out": (n, m), "embedding": (n, m), "conv": (m, n // 4, 2, 2)}[kind]
    return Site(module, kind, shape)  # type: ignore[arg-type]


SITES = [
    site("layers.0.q", 40, 28),
    site("layers.0.c", 28, 36, "fan_in_fan_out"),
    site("embed", 12, 50, "embedding"),
    site("conv", 16, 24, "conv"),
]
"""One of each kind."""


def module(
    at: Site,
    rank: int,
    seed: int,
    *,
    alpha: float | None = None,
    rslora: bool = False,
    dtype: torch.dtype = torch.float32,
    factors: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Module:
    """A module with Gaussian factors, or the given (b, a)."""
    g = torch.Generator().manual_seed(seed)
    m, n = at.shape
    alpha = float(rank) if alpha is None else alpha
    scale = alpha / (rank**0.5 if rslora else rank)
    b = torch.randn(m, rank, generator=g).to(dtype) if factors is None else factors[0]
    a = torch.randn(rank, n, generator=g).to(dtype) if factors is None else factors[1]
    return Module(at, rank, alpha, scale, NAMES[b.dtype], lambda: (b, a))


def adapter(modules: Sequence[Module], label: str = "", **fields: object) -> Adapter:
    """An adapter of these modules."""
    by_name = {m.site.module: m for m in sorted(modules, key=lambda m: m.site.module)}
    return Adapter(label or "adapter", by_name, **fields)  # type: ignore[arg-type]


def adapters(
    count: int, at: Mapping[str, Site] | Sequence[Site], ranks: Sequence[int], *, seed: int = 0, **options: object
) -> list[Adapter]:
    """`count` adapters with all sites; adapter t has rank ranks[t % len(ranks)]."""
    sites = list(at.values()) if isinstance(at, Mapping) else list(at)
    return [
        adapter(
            [
                module(s, ranks[t % len(ranks)], seed + 1000 * t + i, **options)  # type: ignore[arg-type]
                for i, s in enumerate(sites)
            ],
            label=f"a{t}",
        )
        for t in range(count)
    ]


def dense(entry: Module | None, shape: tuple[int, int]) -> torch.Tensor:
    """The delta of a module as a matrix in float64, zero if there is none."""
    if entry is None:
        return torch.zeros(shape, dtype=torch.float64)
    b, a = entry.load()
    return entry.scale * (b.double() @ a.double())


def weighted(group: Sequence[Adapter], weights: Sequence[float], name: str) -> torch.Tensor:
    """sum of w_t delta_t of one module as a matrix in float64."""
    at = next(a.modules[name].site for a in group if name in a.modules)
    return sum(  # type: ignore[return-value]
        w * dense(a.modules.get(name), at.shape) for w, a in zip(weights, group, strict=True)
    )


def best(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """The best approximation of a rank, by a full SVD in float64."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def product(factors: Factors) -> torch.Tensor:
    """b a in float64."""
    return factors.b.double() @ factors.a.double()


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative Frobenius error."""
    scale = float(torch.linalg.norm(want.double()))
    return float(torch.linalg.norm(got.double() - want.double())) / (scale or 1.0)
