"""A whole selection, driven with tiny capacities, against plain sorting."""

from __future__ import annotations

import random
from typing import Literal

import pytest
import torch

from cpu_cases import DTYPES, ISAS, new_sweep_stats, values
from mergekernels._backends import cpu
from mergekernels._backends.reference.common import keys, tie_words
from mergekernels._backends.reference.select import select_point
from mergekernels._native import torch_dtype, view_of
from mergekernels.ops.keep import Keep
from mergekernels.ops.selection import SAMPLE_BLOCK, Scope, Selection, localise
from mergekernels.tensors import F32, F64, DType, Piece


def select(
    models: list[torch.Tensor],
    base: torch.Tensor | None,
    ks: tuple[int | None, ...],
    policy: Literal["hash", "index", "all"],
    compute: DType,
    scope: Scope,
    seed: int,
    capacity: int,
    sampled: float | None = None,
) -> tuple[tuple[Keep | None, ...], int]:
    """The points of tensors that lie one after another in a scope, and the number of sweeps."""
    state = Selection.start(ks, scope, policy=policy, seed=seed, base=base is not None)
    if sampled is not None:
        from dataclasses import replace

        state = replace(state, sample=sampled)
    sweeps = 0
    bounds = [*scope.offsets, scope.n]
    while not state.done:
        request = state.sweep
        stats = new_sweep_stats(request, capacity if state.sample == 1.0 else 10**6)
        visited = 0
        for t, tensor in enumerate(scope.tensor_ids):
            first, last = bounds[t], bounds[t + 1]
            step = last - first or 1
            if state.sample < 1.0:
                step = SAMPLE_BLOCK
            for g in range(first, last, step if state.sample == 1.0 else round(step / state.sample)):
                end = min(g + step, last)
                visited += end - g
                cpu.sweep(
                    request,
                    stats,
                    Piece.flat(g - first, end - g),
                    None if base is None else view_of(base[g:end]),
                    [None if i is None else view_of(x[g:end]) for x, i in zip(models, request.intervals, strict=True)],
                    compute=compute,
                    tensor=tensor,
                    offset=first,
                    threads=2,
                )
        state = state.advance(stats, visited)
        sweeps += 1
        assert sweeps < 40
    return state.points, sweeps


def kept(d: torch.Tensor, point: Keep, model: int, seed: int, scope: Scope) -> torch.Tensor:
    """The kept nonzero elements, by the definition of Keep, tensor by tensor."""
    masks = []
    bounds = [*scope.offsets, scope.n]
    for t, tensor in enumerate(scope.tensor_ids):
        part = d[bounds[t] : bounds[t + 1]]
        local = localise(point, bounds[t], part.numel())
        assert local is not None
        g = torch.arange(part.numel())
        key, tau = keys(part), min(local.tau, 2**63 - 1)
        if local.ties == "hash":
            word = tie_words(seed, tensor, model, g)
            tied = (word < local.word) | ((word == local.word) & (g <= local.index))
        else:
            tied = {"all": g >= 0, "none": g < 0, "index": g <= local.index}[local.ties]
        masks.append(((key > tau) | ((key == tau) & tied)) & (key > 0))
    return torch.cat(masks) if masks else torch.zeros(0, dtype=torch.bool)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("policy", ["hash", "index", "all"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_tensor_against_sorting(
    dtype: str, policy: Literal["hash", "index", "all"], isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGEKERNELS_CPU_ISA", isa)
    d = DTYPES[dtype]
    compute = F64 if dtype == "fp64" else F32
    rng = random.Random(f"{dtype}{policy}")
    for case, kind in enumerate(("normal", "ties", "constant", "zeros", "subnormal", "bits", "nonfinite")):
        n = rng.choice((2, 300, 3001))
        models = [values(kind, n, d, 5 * case + m) for m in range(2)]
        base = values("zeros", n, d, 77) if rng.random() < 0.5 else None
        ks = (rng.randrange(1, n), rng.choice((1, n - 1)))
        scope = Scope((0,), (9,), n, "F64" if compute is F64 else "F32")
        seed = rng.randrange(2**63)
        for capacity in (16, 10**6):
            points, _ = select(models, base, ks, policy, compute, scope, seed, capacity)
            c = torch_dtype(compute)
            for m, point in enumerate(points):
                assert point is not None
                delta = models[m].to(c) - (0 if base is None else base.to(c))
                best = select_point(delta, ks[m], policy, seed, 9, m)
                expected = kept(delta, best, m, seed, scope)
                assert torch.equal(kept(delta, point, m, seed, scope), expected), (kind, ks[m], capacity)
                if best.tau > 0:
                    assert point.tau == best.tau


@pytest.mark.parametrize("sampled", [None, 0.1])
@pytest.mark.parametrize("policy", ["hash", "index"])
def test_several_tensors_rank_as_one(policy: Literal["hash", "index"], sampled: float | None) -> None:
    sizes, ids = (4000, 0, 1, 9000, 2500), (3, 1, 4, 1, 5)
    offsets = tuple(sum(sizes[:t]) for t in range(5))
    n = sum(sizes)
    scope = Scope(offsets, ids, n, "F32")
    for seed, kind in enumerate(("ties", "normal", "constant")):
        x = values(kind, n, F32, seed)
        for capacity in (16, 10**6):
            k = 7000
            points, _ = select([x], None, (k,), policy, F32, scope, seed, capacity, sampled)
            point = points[0]
            assert point is not None
            words = torch.cat([tie_words(seed, i, 0, torch.arange(size)) for i, size in zip(ids, sizes, strict=True)])
            by_word = torch.argsort(words, stable=True) if policy == "hash" else torch.arange(n)
            order = by_word[torch.argsort(keys(x)[by_word], descending=True, stable=True)]
            expected = torch.zeros(n, dtype=torch.bool)
            expected[order[:k]] = True
            assert torch.equal(kept(x, point, 0, seed, scope), expected & (keys(x) > 0))


def test_models_left_alone_stay_so() -> None:
    x = values("normal", 3000, F32, 1)
    scope = Scope((0,), (0,), 3000, "F32")
    points, sweeps = select([x, x], None, (None, 100), "hash", F32, scope, 0, 10**6)
    assert points[0] is None
    assert points[1] is not None
    assert sweeps == 1


def test_a_sample_saves_the_second_sweep() -> None:
    x = values("normal", 400_000, F32, 1)
    scope = Scope((0,), (0,), 400_000, "F32")
    points, sweeps = select([x], None, (80_000,), "hash", F32, scope, 0, 20_000)
    assert sweeps == 2, "one sample, one sweep"
    assert points[0] is not None
    assert int(kept(x, points[0], 0, 0, scope).sum()) == 80_000
