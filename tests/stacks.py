"""Stacks of low-rank updates, and the same tensors in dense form, for tests of tensor ops."""

from __future__ import annotations

from collections.abc import Sequence

import torch

Stack = list[tuple[torch.Tensor, torch.Tensor]]


def random_stack(ranks: Sequence[int], m: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Stack:
    """Gaussian factors."""
    g = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(m, r, generator=g, dtype=torch.float64).to(dtype),
            torch.randn(r, n, generator=g, dtype=torch.float64).to(dtype),
        )
        for r in ranks
    ]


def planted_stack(tasks: int, m: int, n: int, rank: int, seed: int = 0) -> tuple[Stack, list[torch.Tensor]]:
    """A stack that `rank` shared terms describe exactly, and these terms [C, U, V]."""
    g = torch.Generator().manual_seed(seed)
    c, u, v = (torch.randn(size, rank, generator=g, dtype=torch.float64) for size in (tasks, m, n))
    return [(u * c[t], v.T.contiguous()) for t in range(tasks)], [c, u, v]


def dense(stack: Stack) -> torch.Tensor:
    """(T, m, n), float64."""
    return torch.stack([b.double() @ a.double() for b, a in stack])


def model(factors: Sequence[torch.Tensor]) -> torch.Tensor:
    """What [C, U, V] say, (T, m, n), float64."""
    c, u, v = (x.double() for x in factors)
    return torch.einsum("tk,ik,jk->tij", c, u, v)


def relative(x: torch.Tensor, y: torch.Tensor) -> float:
    """||x - y|| / ||y||."""
    return float((x - y).norm() / y.norm())
