"""`select`, the specification: what a sweep counts, and the point of a selection by plain sorting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ...ops.keep import Keep
from ...ops.sweeps import Sweep
from ...tensors import DType, Piece, TensorView
from .common import delta, flat_index, keys, load, ordered_sum, philox, tie_words
from .rules import balance, importance, variance

if TYPE_CHECKING:
    from ..._cpu import SweepStats

__all__ = ["select_point", "sweep"]


def select_point(d: torch.Tensor, k: int, policy: str, seed: int, tensor: int, model: int) -> Keep:
    """The point that keeps the k largest |d| of a flat tensor, 1 <= k <= n, by sorting (no sweeps).

    Order: key descending, then Philox word ascending (policy "hash"), then index ascending.
    """
    g = torch.arange(d.numel(), dtype=torch.int64)
    key = keys(d)
    words = tie_words(seed, tensor, model, g) if policy == "hash" else torch.zeros_like(g)
    by_word = torch.argsort(words, stable=True)
    order = by_word[torch.argsort(key[by_word], descending=True, stable=True)]
    cut = order[k - 1]
    tau = int(key[cut])
    if policy == "all":
        return Keep(tau, "all")
    return Keep(tau, "hash" if policy == "hash" else "index", int(words[cut]), int(cut))


def sweep(
    request: Sweep,
    stats: SweepStats,
    piece: Piece,
    base: TensorView | None,
    models: Sequence[TensorView | None],
    *,
    compute: DType,
    tensor: int,
    offset: int,
    threads: int,
) -> None:
    """See ops.sweeps.Sweep. `threads` has no effect."""
    x0 = None if base is None else load(base, compute)
    xs = [None if view is None else load(view, compute) for view in models]
    deltas = [None if x is None else delta(x, x0) for x in xs]
    for m, interval in enumerate(request.intervals):
        if interval is None:
            continue
        x = xs[interval.model]
        if x is None:
            continue
        g = flat_index(piece, x.device)
        sources = [v for v in xs if v is not None] if request.joint else [x]
        _report_nonfinite(stats, m, torch.stack([~v.isfinite() for v in sources]).any(0), g + offset)
        key = keys(_number(request, deltas, interval.model, g, tensor))
        if interval.stage == "key":
            ordinal, member = key, torch.ones_like(key, dtype=torch.bool)
            before = key > interval.hi
        else:
            member = key == interval.tau
            ordinal = g + offset if request.order == "index" else tie_words(request.seed, tensor, interval.model, g)
            before = member & (ordinal < interval.lo)
        inside = member & (ordinal >= interval.lo) & (ordinal <= interval.hi)
        stats.add(m, int(before.sum()), _buffer(ordinal[inside]), _buffer(g[inside] + offset))
    if x0 is not None:
        _report_nonfinite(stats, len(request.intervals), ~x0.isfinite(), flat_index(piece, x0.device) + offset)


def _number(
    request: Sweep, deltas: Sequence[torch.Tensor | None], model: int, g: torch.Tensor, tensor: int
) -> torch.Tensor:
    """The number whose bits are the key of a model."""
    d = deltas[model]
    assert d is not None
    if request.joint:
        together = [v for v in deltas if v is not None]
        if request.key == "variance":
            return variance(together)
        return balance(request.balance[model], d, ordered_sum(together))[1]
    if request.key == "importance":
        assert request.rows is not None
        return importance(d, request.rows, g)
    if request.key == "drawn":
        drawn = philox(request.seed, tensor, 16 * model, g) < request.draws[model]
        return torch.where(drawn, d, torch.zeros_like(d))
    return d


def _report_nonfinite(stats: SweepStats, source: int, bad: torch.Tensor, index: torch.Tensor) -> None:
    count = int(bad.sum())
    if count:
        stats.add_nonfinite(source, int(index[bad].min()), count)


def _buffer(x: torch.Tensor) -> memoryview:
    return x.cpu().contiguous().numpy().data.cast("B").cast("Q")
