"""Gradient surgery (PCGrad): projections in the Gram matrix, and the op on gradients."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

from .. import _cpu
from .._backends.dispatch import pick, requested, require
from .._native import torch_dtype
from ..errors import ArgumentError
from ..tensors import Piece, promote
from .arguments import check_choice, check_integer
from .inputs import Inputs, gather, num_threads
from .program import Program
from .stream import run_program
from .sums import Gram, Segments, pair_slot

if TYPE_CHECKING:
    import torch

__all__ = ["ORDER_PURPOSE", "pcgrad", "projected", "random_order"]

ORDER_PURPOSE = 5
"""Purpose of the Philox words that order the projections."""


def random_order(count: int, seed: int, tensor: int) -> list[list[int]]:
    """For each of `count` vectors the others, by ascending Philox word (stream 16 i + 5, element j)."""
    orders = []
    for i in range(count):
        words = _cpu.philox(seed, tensor, 16 * i + ORDER_PURPOSE, 0, count)
        orders.append([j for _, j in sorted((word, j) for j, word in enumerate(words) if j != i)])
    return orders


def projected(gram: Sequence[Sequence[float]], order: Sequence[Iterable[int]] | None) -> list[float]:
    """The coefficients of the sum of all projected vectors over the vectors; order None = by number.

    For each i: h = vi, and for the others in order: h = h - <h, vj> / |vj|^2 vj if <h, vj> < 0. All products follow
    from the Gram matrix, so that h is a list of coefficients.
    """
    count = len(gram)
    total = [0.0] * count
    for i in range(count):
        c = [0.0] * count
        c[i] = 1.0
        for j in range(count) if order is None else order[i]:
            if j == i or gram[j][j] <= 0.0:
                continue
            q = math.fsum(a * row[j] for a, row in zip(c, gram, strict=True))
            if q < 0.0:
                c[j] -= q / gram[j][j]
        total = [a + b for a, b in zip(total, c, strict=True)]
    return total


def pcgrad(
    gradients: Sequence[Sequence[torch.Tensor | None]],
    *,
    order: Literal["random", "fixed"] = "random",
    reduction: Literal["sum", "mean"] = "sum",
    scope: Literal["model", "tensor"] = "model",
    seed: int = 0,
    backend: str | None = None,
    threads: int | None = None,
) -> list[torch.Tensor | None]:
    """One gradient for several tasks: from each what conflicts with the others is projected out, then they are added.

    Parameters
    ----------
    gradients : for each task (1 to 64) the gradients of the parameters, in one order; None where a task has none, which
        counts as zero. Those of one parameter have one shape and device, bfloat16 to float64.
    order : in which a task meets the others: "random" by Philox words of the seed (give another seed at each step), or
        "fixed" by number. reduction : "sum" or "mean" of the projected gradients.
    scope : dot products over all parameters ("model") or over each by itself ("tensor").
    backend, threads : see `mergekernels.merge`.

    Returns
    -------
    A new tensor per parameter, in the promoted dtype of its gradients; None where every task has None. Dot products are
    exact sums in float64, the same bits on every backend; a NaN or Inf, also one that a dot product overflows to,
    makes its whole scope NaN.

    Raises
    ------
    ArgumentError, BackendError

    Source: Yu et al. 2020, Gradient Surgery for Multi-Task Learning, arXiv 2001.06782.
    """
    check_choice(order, ("random", "fixed"), "order")
    check_choice(reduction, ("sum", "mean"), "reduction")
    check_choice(scope, ("model", "tensor"), "scope")
    check_integer(seed, 0, 1 << 64, "seed")
    tasks = [list(task) for task in gradients]
    if not 1 <= len(tasks) <= 64 or len({len(task) for task in tasks}) > 1:
        raise ArgumentError(
            "gradients are not usable",
            code="gradients",
            expected="1 to 64 tasks with a gradient or None for each parameter",
            got=f"{len(tasks)} tasks with {sorted({len(task) for task in tasks})} gradients",
        )
    request, team = requested(backend), num_threads(threads)
    present = [[t for t, task in enumerate(tasks) if task[p] is not None] for p in range(len(tasks[0]))]
    inputs = [
        gather([tasks[t][p] for t in there], None, f"parameter {p}", 0) if there else None
        for p, there in enumerate(present)
    ]
    grams = [
        _gram(x, there, len(tasks), request, team) for x, there in zip(inputs, present, strict=True) if x is not None
    ]
    if scope == "model" and grams:
        grams = [_total(grams)] * len(grams)
    result: list[torch.Tensor | None] = []
    rest = iter(grams)
    for p, (x, there) in enumerate(zip(inputs, present, strict=True)):
        if x is None:
            result.append(None)
            continue
        orders = None if order == "fixed" else random_order(len(tasks), seed, p if scope == "tensor" else 0)
        coefficients = _coefficients(next(rest), orders, len(tasks) if reduction == "mean" else 1)
        result.append(_combined(x, [coefficients[t] for t in there], request, team))
    return result


def _gram(inputs: Inputs, there: Sequence[int], count: int, request: str | None, threads: int) -> list[list[float]]:
    """The dot products of all tasks over one parameter, those without a gradient zero."""
    _, backend = pick("stream", inputs.all_views, request)
    require(backend, frozenset({"gram"}))
    sums = _cpu.BlockSums(len(there) * (len(there) + 1) // 2, 1, inputs.n)
    if inputs.n:
        wanted = Gram(Segments("tensor", 1, inputs.n), False)
        piece = Piece.flat(0, inputs.n)
        backend.gram(wanted, sums, piece, None, inputs.views(0)[1], compute=inputs.compute, threads=threads)
    gram = [[0.0] * count for _ in range(count)]
    for i, a in enumerate(there):
        for j, b in enumerate(there):
            gram[a][b] = array("d", sums.fold(pair_slot(i, j, len(there))))[0]
    return gram


def _total(grams: Sequence[Sequence[Sequence[float]]]) -> list[list[float]]:
    count = range(len(grams[0]))
    return [[_sum([gram[i][j] for gram in grams]) for j in count] for i in count]


def _sum(terms: Sequence[float]) -> float:
    try:
        return math.fsum(terms) if all(map(math.isfinite, terms)) else math.nan
    except OverflowError:
        return math.nan


def _coefficients(gram: Sequence[Sequence[float]], order: Sequence[Iterable[int]] | None, divisor: int) -> list[float]:
    if not all(math.isfinite(x) for row in gram for x in row):
        return [math.nan] * len(gram)
    try:
        return [c / divisor for c in projected(gram, order)]
    except (ArithmeticError, ValueError):  # beyond the range of doubles on the way
        return [math.nan] * len(gram)


def _combined(inputs: Inputs, coefficients: Sequence[float], request: str | None, threads: int) -> torch.Tensor:
    import torch

    first = inputs.tensors[0][0]
    dtype = torch_dtype(promote([v.dtype for v in inputs.all_views]))
    if not all(map(math.isfinite, coefficients)):
        return torch.full(first.shape, math.nan, dtype=dtype, device=first.device)
    out = torch.empty(first.shape, dtype=dtype, device=first.device)
    program = Program(tuple(coefficients), (None,) * len(coefficients), base=False)
    _, backend = pick("stream", inputs.all_views, request)
    run_program(program, inputs, [out], backend, threads, "propagate")
    return out
