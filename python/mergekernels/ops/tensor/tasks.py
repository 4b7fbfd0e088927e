"""Which stacked columns belong to which task: sums over a task, and products within it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["Tasks"]


class Tasks:
    """T tasks side by side. ranks : columns of each. Every method costs time and memory linear in the tasks."""

    def __init__(self, ranks: Sequence[int]) -> None:
        self.ranks = tuple(int(r) for r in ranks)
        self.columns = sum(self.ranks)
        self._equal = self.ranks[0] if self.columns and len(set(self.ranks)) == 1 else 0
        self._tables: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def __len__(self) -> int:
        return len(self.ranks)

    def owner(self, like: torch.Tensor) -> torch.Tensor:
        """The task of every column, (R,), int64."""
        import torch

        counts = torch.tensor(self.ranks, dtype=torch.int64)
        return torch.repeat_interleave(torch.arange(len(counts)), counts).to(like.device)

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """(..., T) -> (..., R): the value of its task for each column."""
        if self._equal:
            return x.unsqueeze(-1).expand(*x.shape, self._equal).flatten(-2)
        return x[..., self.owner(x)]

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """(..., T, c) -> (..., R, c)."""
        if self._equal:
            return x.unsqueeze(-2).expand(*x.shape[:-1], self._equal, x.shape[-1]).flatten(-3, -2)
        return x[..., self.owner(x), :]

    def total(self, x: torch.Tensor) -> torch.Tensor:
        """(..., R, c) -> (..., T, c): sums over each task, in one order whatever the device."""
        if self._equal:
            return x.reshape(*x.shape[:-2], len(self), self._equal, x.shape[-1]).sum(-2)
        if not self.columns:
            return x.new_zeros((*x.shape[:-2], len(self), x.shape[-1]))
        index, there = self._table(x)
        return (x[..., index, :] * there[..., None]).sum(-2)

    def largest(self, x: torch.Tensor) -> torch.Tensor:
        """(R,) of non-negative numbers -> (T,): the largest of each task, 0 for a task without columns."""
        if not self.columns:
            return x.new_zeros(len(self))
        index, there = self._table(x)
        return (x[index] * there).amax(1)

    def within(self, x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """X blkdiag(w_t y_t^T y_t): (..., p, R), (..., q, R), (T,) -> (..., p, R). No R x R matrix is formed."""
        import torch

        if self._equal:
            left, right = (
                z.reshape(*z.shape[:-1], len(self), self._equal).movedim(-2, -3) for z in (x, y)
            )  # (..., T, p or q, r)
            grams = right.mT @ right
            if weights is not None:
                grams = grams * weights[:, None, None]
            return (left @ grams).movedim(-3, -2).flatten(-2)
        pieces = []
        for t, (left, right) in enumerate(zip(*(torch.split(z, list(self.ranks), -1) for z in (x, y)), strict=True)):
            piece = left @ (right.mT @ right)
            pieces.append(piece if weights is None else piece * weights[t])
        return torch.cat(pieces, -1)

    def images(self, x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """sqrt(w_t) x_t y_t^T of every task side by side: (p, R), (k, R), (T,) -> (p, T k)."""
        import torch

        roots = weights.sqrt()
        if self._equal:
            left, right = (z.reshape(len(z), len(self), self._equal).movedim(1, 0) for z in (x, y))
            return (left @ (right * roots[:, None, None]).mT).movedim(0, 1).flatten(1)
        pairs = zip(*(torch.split(z, list(self.ranks), -1) for z in (x, y)), strict=True)
        return torch.cat([left @ (right * roots[t]).mT for t, (left, right) in enumerate(pairs)], 1)

    def _table(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(T, largest rank): the columns of each task, and 1 where there is one, 0 beyond its rank."""
        import torch

        key = f"{like.device} {like.dtype}"
        if key not in self._tables:
            counts = torch.tensor(self.ranks, dtype=torch.int64)
            steps = torch.arange(max(self.ranks))
            there = steps < counts[:, None]
            first = counts.cumsum(0) - counts
            index = torch.where(there, first[:, None] + steps, torch.zeros_like(steps))
            self._tables[key] = (index.to(like.device), there.to(like))
        return self._tables[key]
