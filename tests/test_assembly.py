"""Parts that keep blocks and rows whole, out of shards that are cut anywhere."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from mergekernels._native import to_torch
from mergekernels.ops import assembly
from mergekernels.ops.assembly import alignment, parts, scatter
from mergekernels.ops.inputs import gather


def cut(x: torch.Tensor, dim: int, rng: random.Random) -> list[torch.Tensor]:
    """Shards of uneven sizes, one of them empty."""
    size = x.shape[dim]
    places = sorted([0, *(rng.randrange(size + 1) for _ in range(2)), size])
    places.insert(1, places[1])
    return [x.narrow(dim, a, b - a).contiguous() for a, b in itertools.pairwise(places)]


@pytest.mark.parametrize("seed", range(40))
def test_parts_are_the_unsharded_tensor_and_results_return_to_their_shards(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    monkeypatch.setattr(assembly, "_TILE", rng.choice((1, 100, 5000)))
    shape = tuple(rng.choice((1, 3, 8, 17, 130)) for _ in range(rng.choice((1, 2, 2, 3))))
    dim = rng.randrange(len(shape))
    whole = [torch.randn(shape) for _ in range(3)]
    shards = [cut(x, dim, random.Random(seed)) for x in whole]
    inputs = gather(shards[:2], shards[2], "w", dim)
    assert inputs.shape == shape
    align = rng.choice((1, 7, 64, shape[-1], 4096))
    outs = [torch.full_like(s, torch.nan) for s in shards[0]]
    if rng.random() < 0.3 and all(s.dim() == 2 for s in outs):
        outs = [torch.full((s.shape[1], s.shape[0]), torch.nan).t() for s in outs]
    expected = whole[0].flatten() + whole[1].flatten() - whole[2].flatten()
    at = 0
    for part in parts(inputs, align):
        assert part.start == at and (part.count % align == 0 or at + part.count == inputs.n)
        at += part.count
        models = [to_torch(v).flatten() for v in part.models]
        assert part.base is not None
        result = models[0] + models[1] - to_torch(part.base).flatten()
        assert torch.equal(result, expected[part.start : at])
        scatter(inputs, part, result, outs)
    assert at == inputs.n
    assert torch.equal(torch.cat(outs, dim).flatten(), expected)


def test_shards_that_keep_rows_whole_are_used_in_place() -> None:
    x = torch.randn(12, 50)
    found = list(parts(gather([[x[:4], x[4:]]], None, "w", 0), 50))
    assert [(p.start, p.count, p.shard) for p in found] == [(0, 200, 0), (200, 400, 1)]
    assert found[1].models[0].ptr == x[4:].data_ptr()


def test_alignment_keeps_blocks_and_rows() -> None:
    assert alignment() == 4096 and alignment(14336) == 28672 and alignment(1) == 4096
