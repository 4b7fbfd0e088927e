"""Weighted sums of adapters: in factors while they are smaller than the matrix, else one dense matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ...adapters.model import Delta, Factors

__all__ = ["weighted_sum"]

_CHUNK_RANK = 1024
"""Columns of factors that are held at once while a dense sum grows."""


def weighted_sum(deltas: Sequence[Delta], weights: Sequence[float], shape: tuple[int, int]) -> tuple[Delta, str]:
    """(sum of w_t B_t A_t, "" or a sentence on why it is dense).

    deltas : factors, one per adapter; a lazy sequence is walked once. The sum stays in factors, side by side, while the
    ranks of what has a weight add up to less than min(m, n); from there on it is dense, and memory is the matrix and a
    chunk of adapters.
    """
    import torch

    from ...adapters.deltas import chunks, ranks_of

    ranks = ranks_of(deltas)
    used = [t for t, w in enumerate(weights) if w != 0.0 and ranks[t] > 0]
    total = sum(ranks[t] for t in used)
    if total < min(shape):
        if not used:
            return _empty(deltas, shape), ""
        return _stacked(deltas, weights, used), ""
    result: torch.Tensor | None = None
    for run in chunks([ranks[t] for t in used], _CHUNK_RANK):
        part = _stacked(deltas, weights, [used[i] for i in run])
        if result is None:
            result = part.b @ part.a
        else:
            result.addmm_(part.b, part.a)
    assert isinstance(result, torch.Tensor)
    return result, f"dense sum, as the ranks add up to {total} and min(m, n) is {min(shape)}"


def _stacked(deltas: Sequence[Delta], weights: Sequence[float], used: Sequence[int]) -> Factors:
    import torch

    from ...adapters.model import Factors

    bs, as_ = [], []
    for t in used:
        delta = deltas[t]
        assert isinstance(delta, Factors)
        bs.append(delta.b if weights[t] == 1.0 else delta.b * weights[t])
        as_.append(delta.a)
    return Factors(torch.cat(bs, dim=1), torch.cat(as_, dim=0))


def _empty(deltas: Sequence[Delta], shape: tuple[int, int]) -> Factors:
    from ...adapters.model import Factors

    first = deltas[0]
    assert isinstance(first, Factors)
    return Factors(first.b.new_zeros((shape[0], 0)), first.a.new_zeros((0, shape[1])))
