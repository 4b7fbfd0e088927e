"""`select`: the exact k-th magnitude of three models' deltas, computed on the fly.

Bytes: every stream is read once. The sample and a second sweep for ties come on top and are not counted. Beside it:
torch's `kthvalue` per model, which finds the threshold alone, without the cut among its ties.
"""

from __future__ import annotations

from typing import Any

import torch
from yardsticks import Family

from mergekernels._backends.reference.common import keys, tie_words
from mergekernels._backends.reference.select import select_point
from mergekernels.ops.keep import Keep
from mergekernels.ops.select import select
from mergekernels.tensors import tensor_id

NAME = "model.layers.0.mlp.up_proj.weight"
DENSITY = 0.2


def _eager(family: Family, k: int) -> list[torch.Tensor]:
    base, n = family.base.float(), family.base.numel()
    return [torch.kthvalue((model.float() - base).abs(), n - k + 1).values for model in family.models]


def _kept(delta: torch.Tensor, point: Keep, model: int) -> torch.Tensor:
    """Which elements a point keeps; where nothing needs to be cut "all" is as good as a word and an index."""
    key, g = keys(delta), torch.arange(delta.numel())
    word = tie_words(0, tensor_id(NAME), model, g)
    chosen = (word < point.word) | ((word == point.word) & (g <= point.index))
    return (key > point.tau) | ((key == point.tau) & (chosen if point.ties == "hash" else torch.tensor(True)))


def test_select(family: Family, record: Any, threads: int) -> None:
    n = family.base.numel()
    k = int(DENSITY * n)
    small = family.prefix()
    rank = int(DENSITY * small.base.numel())
    points = select(small.models, rank, base=small.base, name=NAME, threads=threads)
    for m, (model, point) in enumerate(zip(small.models, points, strict=True)):
        delta = model.float() - small.base.float()
        expected = select_point(delta, rank, "hash", 0, tensor_id(NAME), m)
        assert torch.equal(_kept(delta, point, m), _kept(delta, expected, m))
    points = select(family.models, k, base=family.base, name=NAME, threads=threads)
    for threshold, point in zip(_eager(family, k), points, strict=True):
        assert int(keys(threshold.reshape(1))[0]) == point.tau
    record(
        "select",
        family.streams,
        None,
        lambda: select(family.models, k, base=family.base, name=NAME, threads=threads),
        lambda: _eager(family, k),
    )
