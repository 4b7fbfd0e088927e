"""Tasks in an order that depends on their updates alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..spectral.sharded import Matrix, Sharded
from ._terms import CP
from .stack import Stack
from .tasks import Tasks

if TYPE_CHECKING:
    import torch

__all__ = ["in_given_order", "in_own_order"]


def in_own_order(stack: Stack) -> tuple[list[int], Stack]:
    """(order, the stack with its tasks in it): by a fixed bilinear form of each update, whatever the order given.

    Only updates of equal form, which are copies of each other, keep the order in which they were given.
    """
    import torch

    tasks = Tasks(stack.ranks)
    forms = tasks.total((_projected(stack.b, 1.0) * _projected(stack.at, 2.0))[:, None])[:, 0].tolist()
    order = sorted(range(len(forms)), key=forms.__getitem__)
    if order == list(range(len(order))):
        return order, stack
    pieces = torch.split(torch.arange(tasks.columns), list(stack.ranks))
    columns = torch.cat([pieces[t] for t in order])

    def chosen(x: Matrix) -> Matrix:
        if isinstance(x, Sharded):
            return Sharded([p[:, columns.to(p.device)] for p in x.parts], x.dim)
        return x[:, columns.to(x.device)]

    ranks = tuple(stack.ranks[t] for t in order)
    return order, Stack(chosen(stack.b), chosen(stack.at), ranks, stack.dtype)


def _projected(x: Matrix, phase: float) -> torch.Tensor:
    """Inner products of all columns with one fixed vector of irregular signs, (R,), float64, in the host's memory."""
    import torch

    fixed = torch.arange(1, x.shape[0] + 1, dtype=torch.float64).square().mul_(0.7548776662466927).add_(phase).cos()
    parts = x.parts if isinstance(x, Sharded) else [x]
    pieces = torch.split(fixed, [p.shape[0] for p in parts])
    total = torch.zeros(x.shape[1], dtype=torch.float64)
    for part, piece in zip(parts, pieces, strict=True):
        total += (piece.to(part.device, part.dtype) @ part).double().cpu()
    return total


def in_given_order(found: CP, order: Sequence[int]) -> CP:
    """The outcome of a stack whose task i was the caller's task order[i], for the caller."""
    if list(order) == sorted(order):
        return found
    back = sorted(range(len(order)), key=order.__getitem__)
    errors = found.diagnostics["task_errors"]
    diagnostics = {**found.diagnostics, "task_errors": tuple(errors[i] for i in back)}
    return replace(found, factors=[found.factors[0][back], *found.factors[1:]], diagnostics=diagnostics)
