"""Methods of selection, overlap and masks, bit for bit against brute force, and their edges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

import brute_methods as brute
import mergekernels as mk
from brute_methods import combine, f
from mergekernels.errors import ArgumentError, DataError

BACKENDS = ("reference", "cpu")
SHAPE = (9, 67)
NAME, SEED = "layer.weight", 11


def family(shape: tuple[int, ...] = SHAPE, count: int = 3, seed: int = 0, grid: float = 64) -> list[np.ndarray]:
    """A base and models, flat float32; on a coarse grid, so that magnitudes tie and some deltas are zero."""
    rng = np.random.default_rng(seed)
    n = int(np.prod(shape))
    base = np.round(rng.normal(size=n) * grid) / grid
    models = [base + np.round(rng.normal(size=n) * 0.1 * grid) / grid for _ in range(count)]
    return [x.astype(np.float32) for x in (base, *models)]


def merged(
    flat: Sequence[np.ndarray], method: str, shape: tuple[int, ...] = SHAPE, *, base: bool = True, **params: Any
) -> np.ndarray:
    """The merge on every backend, the same bits; flat[0] is the base."""
    tensors = [torch.from_numpy(x.copy()).reshape(shape) for x in flat]
    params.setdefault("name", NAME)
    params.setdefault("seed", SEED)
    first = tensors.pop(0) if base else None
    outputs = [mk.merge(tensors, method, base=first, backend=name, **params).reshape(-1).numpy() for name in BACKENDS]
    for other in outputs[1:]:
        assert other.tobytes() == outputs[0].tobytes()
    return outputs[0]


def deltas(flat: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [x - flat[0] for x in flat[1:]]


def same(got: np.ndarray, base: np.ndarray, delta: np.ndarray) -> None:
    """Equal to base plus delta, bit for bit (zeros of either sign are equal)."""
    np.testing.assert_array_equal(got, base + delta.astype(np.float32))


# sce


def sce(flat: Sequence[np.ndarray], topk: float, paper: bool, floor: float = 0.0, policy: str = "hash") -> np.ndarray:
    """Select, calculate, erase."""
    d = deltas(flat)
    v = brute.variance(d)
    k = int(topk * np.count_nonzero(v))
    mask = brute.places(v, SEED, NAME, 0, policy) < k if topk < 1 else np.ones(v.size, bool)
    energy = [float(np.sum(np.where(mask, x, f(0)).astype(np.float64) ** 2)) for x in d]
    total = sum(energy)
    even = total == 0 or total / v.size < floor
    c = [f(1 / len(d)) if even else f(e / total) for e in energy]
    if not paper:
        d = [np.where(mask, x, f(0)) for x in d]
    sign = np.where(brute.ordered(d) >= 0, 1, -1)
    agree = [np.sign(x) == sign for x in d]
    num = brute.ordered([np.where(a, w * x, f(0)) for a, w, x in zip(agree, c, d, strict=True)])
    div = brute.ordered([np.where(a, w, f(0)) for a, w in zip(agree, c, strict=True)])
    return num / (np.where(div == 0, f(1), div) if paper else np.maximum(div, f(1e-6)))


@pytest.mark.parametrize("dialect", ["default", "paper"])
@pytest.mark.parametrize("topk", [1.0, 0.999, 0.4, 0.05, 0.001, 0.0])
def test_sce(topk: float, dialect: str) -> None:
    flat = family()
    for policy in ("hash", "index"):
        got = merged(flat, "sce", select_topk=topk, dialect=dialect, tie_policy=policy)
        same(got, flat[0], sce(flat, topk, dialect == "paper", policy=policy))


def test_sce_counts_positions_that_vary() -> None:
    """Where all deltas are equal the variance is zero: not selected, and not counted in what topk is a share of."""
    flat = family((40,), grid=2.0**16)
    for x in flat[1:]:
        x[:20] = flat[0][:20] + f(0.25)
    got = merged(flat, "sce", (40,), select_topk=0.5)
    changed = np.nonzero(got != flat[0])[0]
    assert len(changed) == 10 and changed.min() >= 20
    # Everything is selected at 1, equal deltas too; one model alone never varies.
    assert (merged(flat, "sce", (40,), select_topk=1.0) != flat[0])[:20].all()
    np.testing.assert_array_equal(merged(flat[:2], "sce", (40,), select_topk=0.5), flat[0])


def test_sce_energy_floor() -> None:
    """Deltas of 3e-4 and 6e-4: 0.2 and 0.8 by energy, alike under mergekit's floor of 1e-6."""
    base = np.zeros(64, np.float32)
    flat = [base, np.full(64, 3e-4, np.float32), np.full(64, 6e-4, np.float32)]
    exact = merged(flat, "sce", (64,))
    np.testing.assert_allclose(exact, 0.2 * 3e-4 + 0.8 * 6e-4, rtol=1e-6)
    np.testing.assert_allclose(merged(flat, "sce", (64,), energy_floor=1e-6), 4.5e-4, rtol=1e-6)
    np.testing.assert_array_equal(merged([base, base, base], "sce", (64,), select_topk=0.5), base)


def test_sce_divisor_floor() -> None:
    """A model of tiny energy that agrees alone is held down by the floor; the paper's dialect has none."""
    base = np.zeros(8, np.float32)
    small, large = np.zeros(8, np.float32), np.zeros(8, np.float32)
    small[0], large[1:] = 1e-5, 1.0
    got = merged([base, small, large], "sce", (8,))
    assert got[0] == pytest.approx(1e-5 * (1e-10 / 7) / 1e-6, rel=1e-5)
    assert merged([base, small, large], "sce", (8,), dialect="paper")[0] == pytest.approx(1e-5)


def test_sce_large_and_sampled() -> None:
    """More than 2^17 elements."""
    flat = family((400, 500), grid=2.0**12)
    same(merged(flat, "sce", (400, 500), select_topk=0.3), flat[0], sce(flat, 0.3, False))


# ram


def ram(flat: Sequence[np.ndarray], epsilon: float, factors: Sequence[float] = ()) -> np.ndarray:
    d = deltas(flat)
    kept = [np.where(np.abs(x) > f(epsilon), x, f(0)) for x in d]
    count = np.sum([np.abs(x) > f(epsilon) for x in d], 0)
    q = brute.ordered(kept) / np.maximum(f(1), count.astype(np.float32))
    for t, factor in enumerate(factors):
        q = np.where((count == 1) & (kept[t] != 0), f(factor) * kept[t], q)
    return q


def counts(flat: Sequence[np.ndarray], epsilon: float) -> tuple[list[int], list[int]]:
    masks = [np.abs(x) > f(epsilon) for x in deltas(flat)]
    alone = np.sum(masks, 0) == 1
    return [int(m.sum()) for m in masks], [int((m & alone).sum()) for m in masks]


def sparse(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> list[np.ndarray]:
    """Models that change an eighth of the entries."""
    flat = family(shape, seed=seed)
    rng = np.random.default_rng(99 + seed)
    return [flat[0]] + [np.where(rng.random(x.size) < 0.3, x, flat[0]) for x in flat[1:]]


@pytest.mark.parametrize("epsilon", [1e-5, 3 / 64, 0.0])
def test_ram(epsilon: float) -> None:
    """Strictly above epsilon; a delta of exactly epsilon does not count."""
    flat = sparse()
    same(merged(flat, "ram", epsilon=epsilon), flat[0], ram(flat, epsilon))
    kept, unique = counts(flat, epsilon)
    factors = [1 + 0.1 * min((k - u) / u, 0.2) for k, u in zip(kept, unique, strict=True)]
    same(merged(flat, "ramplus_tl", epsilon=epsilon), flat[0], ram(flat, epsilon, factors))
    factors = [1 + 0.7 * min((k - u) / u, 3.0) for k, u in zip(kept, unique, strict=True)]
    got = merged(flat, "ramplus_tl", epsilon=epsilon, r=0.7, alpha=3.0)
    same(got, flat[0], ram(flat, epsilon, factors))


def test_ramplus_paper_counts_over_the_model() -> None:
    """The factor of a model comes from all tensors together."""
    flats = {"a": sparse(0, (30,)), "b": sparse(1, (7, 9))}
    totals = [counts(x, 1e-5) for x in flats.values()]
    factors = []
    for t in range(3):
        kept, unique = sum(k[t] for k, _ in totals), sum(u[t] for _, u in totals)
        factors.append(1 + 0.2 * min(1.0, (kept - unique) / unique))
    assert len(set(factors)) > 1 and max(factors) > 1
    dicts = [{k: torch.from_numpy(x[i].copy()) for k, x in flats.items()} for i in range(4)]
    for name in BACKENDS:
        got = mk.merge_state_dicts(
            dicts[1:], "ramplus_tl", base=dicts[0], dialect="paper", rescale_factor=1.2, backend=name
        )
        for k, flat in flats.items():
            same(got[k].numpy(), flat[0], ram(flat, 1e-5, factors))


def test_ramplus_where_nothing_is_alone() -> None:
    """Two equal models share everything: no factor is needed, and none divides by zero."""
    flat = sparse()
    flat = [flat[0], flat[1], flat[1]]
    for dialect in ("default", "paper"):
        same(merged(flat, "ramplus_tl", dialect=dialect), flat[0], ram(flat, 1e-5))


# nearswap, magmax, emr, expo, deme, passthrough


@pytest.mark.parametrize("t", [0.05, 1.0, 1e-6, 4e-7, 0.0, -1.0])
def test_nearswap(t: float) -> None:
    """Mergekit's two-product form up to rounding, in float64; the base for t <= 0."""
    flat = family(count=1, grid=2.0**30)
    flat[1][:200] = flat[0][:200] + np.float32(3e-7) * np.sign(flat[0][:200])
    got = merged(flat, "nearswap", t=t)
    a, b = (x.astype(np.float64) for x in flat)
    w = np.clip(max(t, 0.0) / np.maximum(np.abs(a - b), 1e-6), 0, 1)
    np.testing.assert_allclose(got, w * b + (1 - w) * a, rtol=0, atol=4e-7)
    d = deltas(flat)[0]
    clipped = np.clip(d, f(-max(t, 0)), f(max(t, 0)))
    if 0 < t < 1e-6:
        clipped = np.where(np.abs(d) < f(1e-6), d * f(t * 1e6), clipped)
    same(got, flat[0], clipped)
    if t <= 0:
        np.testing.assert_array_equal(got, flat[0])


def test_magmax() -> None:
    """The later model among equal magnitudes."""
    flat = [np.zeros(5, np.float32), *(np.array(x, np.float32) for x in ([1, -2, 3, 0, 1], [-1, 1, 0, 0, -1]))]
    flat.append(np.array([0.5, 2, -3, 0, 0], np.float32))
    assert merged(flat, "magmax", (5,)).tolist() == [-0.5, 1.0, -1.5, 0.0, -0.5]
    flat = family()
    d = np.stack(deltas(flat))
    last = 2 - np.argmax(np.abs(d[::-1]), 0)
    same(merged(flat, "magmax", scale=0.3), flat[0], np.take_along_axis(d, last[None], 0)[0] * f(0.3))


def test_emr() -> None:
    """The elected sign with the largest magnitude; a vote of zero elects minus."""
    flat = family()
    want = combine(deltas(flat), [1, 1, 1], vote="weighted", zero=-1, merge="max")
    same(merged(flat, "emr"), flat[0], want)
    flat = [np.zeros(3, np.float32), np.array([1, 2, 0], np.float32), np.array([-1, 3, 0], np.float32)]
    assert merged(flat, "emr", (3,), scale=2.0).tolist() == [-2.0, 6.0, 0.0]


def test_expo_deme_passthrough() -> None:
    flat = family()
    d = deltas(flat)
    same(merged(flat[:2], "expo", extrapolation_factor=0.3), flat[1], d[0] * f(0.3))
    np.testing.assert_array_equal(merged(flat[:2], "expo", extrapolation_factor=0), flat[1])
    weights = [0.1, 0.7, -0.3]
    same(merged(flat, "deme", weights=weights), flat[0], combine(d, weights, vote="none"))
    negative = [np.array([-0.0, 1.5], np.float32)]
    got = merged(negative, "passthrough", (2,), base=False)
    assert got.tobytes() == negative[0].tobytes()
    np.testing.assert_array_equal(merged(flat[:1], "passthrough", base=False, scale=0.3), flat[0] * f(0.3))


# arcee_fusion


def arcee(flat: Sequence[np.ndarray], row: int) -> np.ndarray:
    x0, x1 = (x.reshape(-1, row) for x in flat)
    rows = np.array([brute.softmax_divergence(a, b) for a, b in zip(x1, x0, strict=True)], np.float32)
    d = (x1 - x0).reshape(-1)
    importance = np.abs(d) * np.repeat(rows, row)
    ascending = np.sort(importance)
    q1, q2, q3 = (ascending[int(q * (d.size - 1))] for q in (0.25, 0.5, 0.75))
    return np.where(importance >= f(q2 + f(f(1.5) * f(q3 - q1))), d, f(0))


@pytest.mark.parametrize("shape", [(9, 67), (603,), (6, 4, 5), (2,), (1, 3), (30, 1), (330, 400)])
def test_arcee_fusion(shape: tuple[int, ...]) -> None:
    flat = family(shape, count=1, grid=2.0**20 if shape[0] > 100 else 64)
    delta = arcee(flat, shape[-1])
    got = merged(flat, "arcee_fusion", shape)
    same(got, flat[0], delta)
    if flat[0].size > 100 and shape[-1] > 1:
        assert 0.01 < (delta != 0).mean() < 0.5


def test_arcee_fusion_edges() -> None:
    """Identical tensors; a number and rows of one entry are taken over; 16-bit models give 16-bit results."""
    flat = family()
    np.testing.assert_array_equal(merged([flat[0], flat[0]], "arcee_fusion"), flat[0])
    assert merged([np.ones(1, np.float32), np.full(1, 2.5, np.float32)], "arcee_fusion", ()).tolist() == [2.5]
    half = mk.merge([torch.ones(8).half()], "arcee_fusion", base=torch.zeros(8).half(), backend="reference")
    assert half.dtype == torch.float16
    spoiled = flat[1].copy()
    spoiled[5] = np.inf
    with pytest.raises(DataError, match="model 0"):
        merged([flat[0], spoiled], "arcee_fusion")
    assert np.isnan(merged([flat[0], spoiled], "arcee_fusion", nan="propagate")).all()


# consensus, tall_mask


def consensus(flat: Sequence[np.ndarray], s: np.ndarray, thresholds: Sequence[float], at_least: int) -> np.ndarray:
    used = [np.abs(d) > f(x) * np.abs(s - d) for d, x in zip(deltas(flat), thresholds, strict=True)]
    return np.where(np.sum(used, 0) >= at_least, s, f(0))


@pytest.mark.parametrize("at_least", [0, 1, 2, 3, 4, 9])
def test_consensus(at_least: int) -> None:
    flat = family()
    s = brute.ordered(deltas(flat))
    thresholds = [0.2, 0.5, 1.5]
    want = consensus(flat, s, thresholds, at_least) * f(0.4)
    got = merged(flat, "consensus", threshold=thresholds, at_least=at_least, scale=0.4)
    same(got, flat[0], want)
    if at_least == 0:
        same(merged(flat, "tall_mask", threshold=thresholds, scale=0.4), flat[0], s * f(0.4))
    if at_least > 3:
        np.testing.assert_array_equal(got, flat[0])


@pytest.mark.parametrize("density", [None, 0.5])
def test_consensus_of_ties(density: float | None) -> None:
    """TIES of the paper with a sum makes S; the masks look at untrimmed deltas."""
    flat = family()
    params = {} if density is None else {"density": density}
    ties = merged(flat, "ties", dialect="paper", density=density or 0.2, normalize=False, base=True)
    kept = []
    k = int((density or 0.2) * flat[0].size) + 1
    for d in deltas(flat):
        kept.append(np.where(np.abs(d) >= np.sort(np.abs(d))[::-1][k - 1], d, f(0)))
    s = combine(kept, [1, 1, 1], vote="weighted", zero=brute.majority(kept))
    same(ties, flat[0], s)
    got = merged(flat, "consensus", inner="ties", threshold=0.4, at_least=2, **params)
    same(got, flat[0], consensus(flat, s, [0.4] * 3, 2))
    same(merged(flat, "tall_mask", inner="ties", **params), flat[0], s)


def test_consensus_comparison_is_strict() -> None:
    """A delta of 0 is used by nobody; where S equals the delta its task uses it."""
    base = np.zeros(3, np.float32)
    flat = [base, np.array([0, 1, 1], np.float32), np.array([0, 0, 2], np.float32)]
    assert merged(flat, "consensus", (3,), threshold=0.5, at_least=1).tolist() == [0.0, 1.0, 3.0]
    assert merged(flat, "consensus", (3,), threshold=0.5, at_least=2).tolist() == [0.0, 0.0, 0.0]


# pcb


@pytest.mark.parametrize(("ratio", "clip"), [(0.1, 1e-4), (0.05, 1e-2), (1.0, 0.1), (0.0, 0.0), (0.3, 0.5)])
def test_pcb(ratio: float, clip: float) -> None:
    """Against numpy's exp and tanh: up to their last bit."""
    flat = family(grid=2.0**20)
    want = flat[0] + brute.pcb(deltas(flat), ratio, clip, 1.2)
    np.testing.assert_allclose(merged(flat, "pcb", ratio=ratio, clip=clip), want, rtol=0, atol=1e-6)
    if ratio == 0.0:
        np.testing.assert_array_equal(merged(flat, "pcb", ratio=ratio, clip=clip), flat[0])


def test_pcb_over_the_model() -> None:
    """Positions count over all tensors, or over each by itself."""
    flats = {"a": family((30,), grid=2.0**20), "b": family((70,), seed=1, grid=2.0**20)}
    dicts = [{k: torch.from_numpy(x[i].copy()) for k, x in flats.items()} for i in range(4)]
    both = [np.concatenate([flats["a"][i], flats["b"][i]]) for i in range(4)]
    want = both[0] + brute.pcb(deltas(both), 0.2, 0.01, 0.9)
    for name in BACKENDS:
        got = mk.merge_state_dicts(dicts[1:], "pcb", base=dicts[0], ratio=0.2, clip=0.01, scale=0.9, backend=name)
        np.testing.assert_allclose(np.concatenate([got["a"], got["b"]]), want, rtol=0, atol=1e-6)
        got = mk.merge_state_dicts(dicts[1:], "pcb", base=dicts[0], ratio=0.2, clip=0.01, scope="tensor", backend=name)
        alone = flats["b"][0] + brute.pcb(deltas(flats["b"]), 0.2, 0.01, 1.2)
        np.testing.assert_allclose(got["b"].numpy(), alone, rtol=0, atol=1e-6)


def test_pcb_edges() -> None:
    """Constant deltas have no spread: 0 instead of 0/0. One element, no element, NaN."""
    base = np.zeros(50, np.float32)
    np.testing.assert_array_equal(merged([base, base + 1, base + 1], "pcb", (50,)), base)
    assert merged([np.zeros(1, np.float32), np.ones(1, np.float32)], "pcb", (1,)).tolist() == [0.0]
    flat = family()
    flat[3][8] = np.nan
    with pytest.raises(DataError, match="model 2"):
        merged(flat, "pcb")
    assert np.isnan(merged(flat, "pcb", nan="propagate")).all()


def test_pcb_large_and_sampled() -> None:
    """More than 2^17 elements."""
    flat = family((400, 500), grid=2.0**20)
    want = flat[0] + brute.pcb(deltas(flat), 0.1, 1e-4, 1.2)
    np.testing.assert_allclose(merged(flat, "pcb", (400, 500)), want, rtol=0, atol=2e-6)


# fisher


def importances(flat: Sequence[np.ndarray]) -> list[np.ndarray]:
    rng = np.random.default_rng(4)
    return [(rng.normal(size=flat[0].size) ** 2).astype(np.float32) * f(10.0**t) for t in range(len(flat))]


def fisher(models: Sequence[np.ndarray], importance: Sequence[np.ndarray], c: Sequence[float], e: float) -> np.ndarray:
    a = [f(w) * (x + f(e)) for w, x in zip(c, importance, strict=True)]
    return brute.ordered([u * x for u, x in zip(a, models, strict=True)]) / brute.ordered(a)


def test_fisher() -> None:
    models = family()[1:]
    given = importances(models)
    tensors = [torch.from_numpy(x.copy()).reshape(SHAPE) for x in given]
    weights = [1.0, 0.5, 2.0]
    got = merged(models, "fisher", base=False, weights=weights, importance=tensors)
    np.testing.assert_array_equal(got, fisher(models, given, weights, 1e-6))
    r = [1 / (float(np.sqrt(np.sum(x.astype(np.float64) ** 2))) + 1e-6) for x in given]
    scaled = [w * x / sum(r) for w, x in zip(weights, r, strict=True)]
    got = merged(models, "fisher", base=False, weights=weights, importance=tensors, normalize_fisher=True)
    np.testing.assert_array_equal(got, fisher(models, given, scaled, 1e-6))
    # Equal importances give the plain weighted mean; without weights the mean.
    ones = [torch.ones(SHAPE)] * 3
    got = merged(models, "fisher", base=False, importance=ones)
    np.testing.assert_allclose(got, np.mean(models, 0), rtol=0, atol=1e-6)


def test_fisher_norms_over_the_model() -> None:
    flats = {"a": family((30,))[1:], "b": family((70,), seed=1)[1:]}
    given = {k: importances(x) for k, x in flats.items()}
    dicts = [{k: torch.from_numpy(x[i].copy()) for k, x in flats.items()} for i in range(3)]
    weights = [{k: torch.from_numpy(x[i].copy()) for k, x in given.items()} for i in range(3)]
    norms = [np.sqrt(sum(np.sum(given[k][t].astype(np.float64) ** 2) for k in given)) + 1e-6 for t in range(3)]
    scaled = [float(1 / x / sum(1 / y for y in norms)) for x in norms]
    for name in BACKENDS:
        got = mk.merge_state_dicts(dicts, "fisher", importance=weights, normalize_fisher=True, backend=name)
        for k, models in flats.items():
            np.testing.assert_array_equal(got[k].numpy(), fisher(models, given[k], scaled, 1e-6))


def test_fisher_refusals() -> None:
    """Negative, missing, misshapen or non-finite importances; no weight above zero."""
    models = [torch.ones(4), torch.zeros(4)]
    good = torch.ones(4)
    bad = torch.tensor([1.0, -1e-9, 0.0, -0.0])
    for extra in ({}, {"normalize_fisher": True}):
        with pytest.raises(DataError, match="tensor 'w': the importance of model 1 has 1 negative entries"):
            mk.merge(models, "fisher", importance=[good, bad], name="w", backend="reference", **extra)
        with pytest.raises(DataError, match="importance 0"):
            mk.merge(models, "fisher", importance=[good * float("nan"), good], backend="reference", **extra)
    with pytest.raises(ArgumentError, match="fisher needs 'importance'; expected a list with one tensor"):
        mk.merge(models, "fisher")
    with pytest.raises(ArgumentError, match="'importance' has the wrong number of values; expected 2, one per model"):
        mk.merge(models, "fisher", importance=[good])
    with pytest.raises(ArgumentError, match="shape"):
        mk.merge(models, "fisher", importance=[good, torch.ones(5)])
    with pytest.raises(ArgumentError, match="no weight is above 0"):
        mk.merge(models, "fisher", importance=[good, good], weights=0)
    got = mk.merge(
        models,
        "fisher",
        importance=[good * float("inf"), good],
        normalize_fisher=True,
        nan="propagate",
        backend="reference",
    )
    assert bool(got.isnan().all())


REFUSALS = [
    ("sce", {"select_topk": 1.5}, r"'select_topk' is not usable; expected a number in \[0, 1\]; got 1.5"),
    ("sce", {"energy_floor": -1}, "'energy_floor' is not usable; expected a number of at least 0"),
    ("ram", {"epsilon": -1e-5}, "'epsilon' is not usable; expected a number of at least 0"),
    ("ramplus_tl", {"rescale_factor": 1.2}, "rescale_factor has no effect in dialect default; expected dialect paper"),
    ("ramplus_tl", {"dialect": "paper", "r": 0.3}, "r has no effect in dialect paper; expected dialect default"),
    ("ramplus_tl", {"dialect": "paper", "rescale_factor": 0.9}, "'rescale_factor' is not usable; expected a number in"),
    ("nearswap", {"t": 0.1}, "nearswap cannot merge this many models; expected 1; got 2"),
    ("nearswap", {}, "nearswap cannot merge this many models"),
    ("arcee_fusion", {}, "arcee_fusion cannot merge this many models; expected 1; got 2"),
    ("expo", {"extrapolation_factor": 1}, "expo cannot merge this many models"),
    ("consensus", {"density": 0.2}, "density is for inner: ties; expected no density"),
    ("consensus", {"scope": "model"}, "scope is for inner: ties"),
    ("consensus", {"at_least": -1}, "'at_least' is not usable; expected a number of at least 0"),
    ("consensus", {"at_least": 1.5}, "'at_least' is not usable; expected an integer"),
    ("consensus", {"threshold": [0.1]}, "'threshold' has the wrong number of values; expected one value, or 2"),
    ("consensus", {"inner": "dare"}, "expected one of task_arithmetic, ties"),
    ("pcb", {"ratio": 20}, r"'ratio' is not usable; expected a number in \[0, 1\]; got 20"),
    ("pcb", {"clip": 0.6}, r"expected a number in \[0, 0.5\]"),
    ("magmax", {"scale": 1e39}, "lambda is beyond the range of float32"),
    ("deme", {}, "deme needs 'weights'"),
    ("passthrough", {"base": None}, "passthrough cannot merge this many models; expected 1; got 2"),
]


@pytest.mark.parametrize(
    ("method", "params", "message"), REFUSALS, ids=[f"{m}-{i}" for i, (m, _, _) in enumerate(REFUSALS)]
)
def test_refusals(method: str, params: dict, message: str) -> None:
    call: dict[str, Any] = {"base": torch.zeros(4), **params}
    with pytest.raises(ArgumentError, match=message):
        mk.merge([torch.ones(4), torch.ones(4)], method, **call)


EMPTY = {
    "sce": {"select_topk": 0.5},
    "ram": {},
    "ramplus_tl": {},
    "consensus": {"inner": "ties"},
    "pcb": {},
    "magmax": {},
    "dare_ties": {"weights": 1, "density": 0.5},
    "della": {"weights": 1, "density": 0.5},
    "breadcrumbs": {"weights": 1, "density": 0.5},
}


@pytest.mark.parametrize("method", EMPTY)
def test_empty_tensors(method: str) -> None:
    for shape in ((0,), (0, 4), (4, 0)):
        got = merged([np.zeros(0, np.float32)] * 3, method, shape, **EMPTY[method])
        assert got.size == 0
    one = [np.zeros(0, np.float32)] * 2
    assert merged(one, "arcee_fusion", (3, 0)).size == 0
    assert merged(one, "fisher", (0,), base=False, importance=[torch.zeros(0)] * 2, normalize_fisher=True).size == 0
