"""Alternating least squares in native code: all sweeps of a start in one call, on the CPU or on the chip of a GPU.

The sweeps are those of `_sweeps` and the decisions those of `_als`, start by start; sums differ in their order. Only
the choice of the two best starts lies between calls, and modules with a start whose out factor has to be kept
orthonormal, which the tensor operations of `_als` do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..._backends import _tensor
from . import _als
from ._als import PRUNE_AFTER, Options, Outcome, alarm

if TYPE_CHECKING:
    import torch

    from ._sweeps import Batch

__all__ = ["run"]

_AT_ONCE = 1024
"""Most sweeps of one call, so that none keeps a device for long."""

_DONE, _SWEEPS, _LONGER, _RIDGE = 1, 2, 3, 5
_UNFINISHED = 2.0
"""`done` of a start that native code leaves to tensor operations."""


def run(batch: Batch, c: torch.Tensor, u: torch.Tensor, v: torch.Tensor, options: Options) -> list[Outcome]:
    """As `_als.run`, in native code where it can serve the batch."""
    launch = _tensor.least_squares(batch.b, batch.a, batch.tasks.ranks, int(u.shape[-1]), u.shape[0] * u.shape[1])
    if launch is None:
        return _als.run(batch, c, u, v, options)
    return _run(batch, c, u, v, options, launch)


def _run(
    batch: Batch, c: torch.Tensor, u: torch.Tensor, v: torch.Tensor, options: Options, launch: Callable[..., Any]
) -> list[Outcome]:
    import torch

    count, starts, width = u.shape[0], u.shape[1], u.shape[-1]
    products = u.new_zeros((count, starts, 2 * len(batch.tasks.owner(u)), width))
    state = torch.cat([c, u, v, products], 2).flatten(0, 1).contiguous()
    report = u.new_zeros((count * starts, _tensor.NUMBERS))
    report[:, 0], report[:, _RIDGE] = float("inf"), options.ridge
    pieces: dict[int, list[torch.Tensor]] = {i: [] for i in range(count * starts)}
    active = list(range(count * starts))
    sweeps = 0
    prunes = options.search and starts > 2
    while active and sweeps < options.max_iter:
        until = PRUNE_AFTER if prunes and sweeps < PRUNE_AFTER else sweeps + _AT_ONCE
        steps = min(until, options.max_iter) - sweeps
        history = u.new_zeros((len(active), steps))
        launch(active, starts, batch.norm2, state, history, report, options, steps)
        for row, item in zip(history.to("cpu"), active, strict=True):
            pieces[item].append(row)
        sweeps += steps
        found = report.to("cpu")
        going = [i for i in active if found[i, _DONE] == 0]
        if prunes and sweeps == PRUNE_AFTER:
            going = _best_two(found, going, count, starts)
        active = going
    found = report.to("cpu")
    left = _left(found, count, starts) if prunes and options.max_iter > PRUNE_AFTER else [range(starts)] * count
    return _outcomes(batch, (c, u, v), state, found, pieces, left, options)


def _best_two(found: torch.Tensor, going: list[int], count: int, starts: int) -> list[int]:
    """Of the starts that go on, those that are among the two best of their module."""
    best: set[int] = set()
    for i, order in enumerate(found[:, 0].reshape(count, starts).argsort(dim=1, stable=True)[:, :2].tolist()):
        best.update(i * starts + j for j in order)
    return [i for i in going if i in best]


def _left(found: torch.Tensor, count: int, starts: int) -> list[Any]:
    """The starts of each module that were not given up."""
    rows = found.reshape(count, starts, -1)
    return [
        [j for j in range(starts) if rows[i, j, _DONE] != 0 or rows[i, j, _SWEEPS] > PRUNE_AFTER] or range(starts)
        for i in range(count)
    ]


def _outcomes(
    batch: Batch,
    given: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    state: torch.Tensor,
    found: torch.Tensor,
    pieces: dict[int, list[torch.Tensor]],
    left: list[Any],
    options: Options,
) -> list[Outcome]:
    import torch

    c, u, v = given
    count, starts, p, q = u.shape[0], u.shape[1], u.shape[2], v.shape[2]
    tasks = len(batch.tasks)
    rows = found.reshape(count, starts, -1)
    best = [min(left[i], key=lambda j: (float(rows[i, j, 0]), j)) for i in range(count)]
    chosen = state[[i * starts + j for i, j in enumerate(best)]]
    factors = chosen.split([tasks, p, q, chosen.shape[1] - tasks - p - q], 1)  # type: ignore[no-untyped-call]
    size = batch.norm2.sqrt()
    thetas, growths = alarm(factors[0], factors[1], factors[2], torch.where(size > 0, size, torch.ones_like(size)))
    outcomes = []
    for i, j in enumerate(best):
        if bool((rows[i, :, _DONE] == _UNFINISHED).any()):
            only = torch.tensor([i], device=u.device)
            outcomes += _als.run(batch.of(only), c[only], u[only], v[only], options)
            continue
        sweeps = int(rows[i, j, _SWEEPS])
        history = torch.cat(pieces[i * starts + j])[:sweeps].tolist()
        outcomes.append(
            Outcome(
                c=factors[0][i],
                u=factors[1][i],
                v=factors[2][i],
                history=history,
                sweeps=sweeps,
                converged=bool(rows[i, j, _DONE] == 1),
                start=j,
                finals=tuple(rows[i, :, 0].tolist()),
                theta=float(thetas[i]),
                growth=float(growths[i]),
                ridge=float(rows[i, j, _RIDGE]),
                orthogonal=False,
                longer_steps=int(rows[i, j, _LONGER]),
            )
        )
    return outcomes
