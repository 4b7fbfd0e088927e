"""ties, dare, della and breadcrumbs in every dialect, bit for bit against brute force, and their edges."""

from __future__ import annotations

import itertools
import logging
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
W = [1.0, 0.5, -0.25]


def family(shape: tuple[int, ...] = SHAPE, count: int = 3, seed: int = 0, grid: float = 64) -> list[np.ndarray]:
    """A base and models, flat float32; on a coarse grid, so that magnitudes tie and some deltas are zero."""
    rng = np.random.default_rng(seed)
    n = int(np.prod(shape))
    base = np.round(rng.normal(size=n) * grid) / grid
    models = [base + np.round(rng.normal(size=n) * 0.2 * grid) / grid for _ in range(count)]
    return [x.astype(np.float32) for x in (base, *models)]


def merged(flat: Sequence[np.ndarray], method: str, shape: tuple[int, ...] = SHAPE, **params: Any) -> np.ndarray:
    """The merge on every backend, the same bits; flat[0] is the base."""
    base, *models = (torch.from_numpy(x.copy()).reshape(shape) for x in flat)
    params.setdefault("name", NAME)
    params.setdefault("seed", SEED)
    outputs = [mk.merge(models, method, base=base, backend=name, **params).reshape(-1).numpy() for name in BACKENDS]
    for other in outputs[1:]:
        assert other.tobytes() == outputs[0].tobytes()
    return outputs[0]


def deltas(flat: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [x - flat[0] for x in flat[1:]]


def same(got: np.ndarray, base: np.ndarray, delta: np.ndarray) -> None:
    """Equal to base plus delta, bit for bit (zeros of either sign are equal)."""
    np.testing.assert_array_equal(got, base + delta.astype(np.float32))


def top(d: np.ndarray, k: int, model: int, policy: str = "hash") -> np.ndarray:
    """The k largest entries, the others zero."""
    if policy == "all":
        return np.where(np.abs(d) >= np.sort(np.abs(d))[::-1][k - 1], d, f(0)) if k else np.zeros_like(d)
    return np.where(brute.places(np.abs(d), SEED, NAME, model, policy) < k, d, f(0))


@pytest.mark.parametrize("method", ["total", "frequency"])
@pytest.mark.parametrize("normalize", [True, False])
def test_ties_peft(method: str, normalize: bool) -> None:
    """floor(density n), an unweighted vote by sum or count, weights afterwards, the number that agree divides."""
    flat = family()
    n = flat[0].size
    kept = [top(d, int(0.3 * n), t) for t, d in enumerate(deltas(flat))]
    vote = "count" if method == "frequency" else "plain"
    want = combine(kept, W, vote=vote, divide="count" if normalize else "none", scale=0.5)
    got = merged(
        flat,
        "ties",
        weights=W,
        density=0.3,
        dialect="peft",
        majority_sign_method=method,
        normalize=normalize,
        scale=0.5,
    )
    same(got, flat[0], want)


def test_ties_peft_may_keep_nothing() -> None:
    """At floor(density n) = 0 mergekit's rule keeps one entry, PEFT's none; a negative weight votes unweighted."""
    flat = family((3, 3))
    assert int((merged(flat, "ties", (3, 3), weights=1, density=0.1, normalize=False) != flat[0]).sum()) >= 1
    np.testing.assert_array_equal(merged(flat, "ties", (3, 3), weights=1, density=0.1, dialect="peft"), flat[0])
    one = [np.zeros(1, np.float32), np.ones(1, np.float32), np.full(1, 3.0, np.float32)]
    assert merged(one, "ties", (1,), weights=[1, -1], density=1.0, dialect="peft").tolist() == [-1.0]


@pytest.mark.parametrize("function", ["mean", "sum", "max"])
def test_ties_paper_merge_functions(function: str) -> None:
    """All at or above the floor(density n)+1-th magnitude; zero votes take the majority."""
    flat = family()
    n = flat[0].size
    kept = [top(d, int(0.2 * n) + 1, t, "all") for t, d in enumerate(deltas(flat))]
    want = combine(
        kept,
        [1, 1, 1],
        vote="weighted",
        zero=brute.majority(kept),
        divide="count" if function == "mean" else "none",
        merge="max" if function == "max" else "sum",
        scale=0.7,
    )
    same(merged(flat, "ties", density=0.2, dialect="paper", merge_function=function, scale=0.7), flat[0], want)


def test_ties_paper_without_normalize_is_the_sum() -> None:
    flat = family()
    one = merged(flat, "ties", density=0.2, dialect="paper", normalize=False)
    np.testing.assert_array_equal(one, merged(flat, "ties", density=0.2, dialect="paper", merge_function="sum"))


@pytest.mark.parametrize("policy", ["hash", "index", "all"])
def test_ties_rescale(policy: str) -> None:
    """The L1 factor goes onto the trimmed delta before the weight; density 1 has none."""
    flat = family()
    n = flat[0].size
    kept = [top(d, int(0.25 * n), t, policy) for t, d in enumerate(deltas(flat)[:2])]
    kept = [brute.l1_factor(d, e) * e for d, e in zip(deltas(flat), kept, strict=False)] + deltas(flat)[2:]
    want = combine(kept, W, vote="weighted", divide="weights")
    got = merged(flat, "ties", weights=W, density=[0.25, 0.25, 1.0], rescale=True, tie_policy=policy)
    same(got, flat[0], want)


def test_rescale_of_tiny_deltas_is_skipped() -> None:
    """Below a norm of 1e-7 the factor is 1."""
    base = np.zeros(1000, np.float32)
    for size, factor in ((1e-11, 1.0), (1e-9, None)):
        d = np.full(1000, size, np.float32)
        got = merged([base, d], "dare_linear", (1000,), weights=1, density=0.3)
        kept = int((got != 0).sum())
        expected = f(1.0) if factor else f(1000 / kept)
        assert set(got.tolist()) == {0.0, float(d[0] * expected)}


def draws(n: int, model: int, density: float) -> np.ndarray:
    return brute.words(SEED, NAME, 16 * model, n) < int(density * 2**32)


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_default(method: str, normalize: bool, rescale: bool) -> None:
    """Masks from Philox, L1 factors, weights, mergekit's vote; densities 1 and 0 draw nothing."""
    flat = family(count=4)
    density, weights = [0.3, 0.53, 1.0, 0.0], [*W, 2.0]
    kept = []
    for t, d in enumerate(deltas(flat)):
        e = np.where(draws(d.size, t, density[t]), d, f(0)) if density[t] < 1 else d
        kept.append(e * brute.l1_factor(d, e) if rescale and 0 < density[t] < 1 else e)
    vote = "weighted" if method == "dare_ties" else "none"
    want = combine(kept, weights, vote=vote, divide="weights" if normalize else "none", scale=1.1)
    got = merged(flat, method, weights=weights, density=density, normalize=normalize, rescale=rescale, scale=1.1)
    same(got, flat[0], want)


@pytest.mark.parametrize("dialect", ["paper", "peft"])
@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_inverse_probability(method: str, dialect: str) -> None:
    """Kept entries times 1 / density; the vote of the dialect."""
    flat = family()
    weights = [1.0, 1.0, 1.0] if (method, dialect) == ("dare_ties", "paper") else W
    kept = [np.where(draws(d.size, t, 0.4), d, f(0)) * f(1 / 0.4) for t, d in enumerate(deltas(flat))]
    if method == "dare_linear":
        want = combine(kept, weights, vote="none")
    elif dialect == "paper":
        want = combine(kept, weights, vote="weighted", zero=brute.majority(kept), divide="count")
    else:
        want = combine(kept, weights, vote="plain", divide="count")
    free = {"trim": 1.0} if (method, dialect) == ("dare_ties", "paper") else {}
    same(merged(flat, method, weights=weights, density=0.4, dialect=dialect, **free), flat[0], want)
    plain = [np.where(draws(d.size, t, 0.4), d, f(0)) for t, d in enumerate(deltas(flat))]
    if method == "dare_linear":
        got = merged(flat, method, weights=weights, density=0.4, dialect=dialect, rescale=False)
        same(got, flat[0], combine(plain, weights, vote="none"))


@pytest.mark.parametrize(("trim", "share"), [(None, 0.2), (0.05, 0.05), (0.6, 0.6), (0.0, 0.0)])
@pytest.mark.parametrize("rescale", [True, False])
def test_dare_ties_paper_trims_what_was_drawn(trim: float | None, share: float, rescale: bool) -> None:
    """All drawn |d| from the floor(trim n)+1-th largest of the masked task vector on; its zeros count as entries."""
    flat, density = family(), [0.4, 1.0, 0.9]
    kept = []
    for t, d in enumerate(deltas(flat)):
        drawn = np.where(draws(d.size, t, density[t]), d, f(0)) if density[t] < 1 else d
        cut = np.sort(np.abs(drawn))[::-1][int(share * d.size)]
        factor = f(1 / density[t]) if rescale and density[t] < 1 else f(1)
        kept.append(np.where((np.abs(drawn) >= cut) & (share > 0), drawn, f(0)) * factor)
    want = combine(kept, [1.0] * 3, vote="weighted", zero=brute.majority(kept), divide="count")
    got = merged(flat, "dare_ties", density=density, dialect="paper", trim=trim, rescale=rescale)
    same(got, flat[0], want)


def della(flat: Sequence[np.ndarray], shape: tuple[int, ...], dim: int, rho: float, e: float, paper: bool) -> list:
    """The sparsified deltas, integers throughout."""
    kept = []
    for t, d in enumerate(deltas(flat)):
        rank, m = brute.row_ranks(d, shape, dim, SEED, NAME, t)
        low, span = int((rho - e) * 2**32), int(2 * e * 2**32)
        bound = low + (rank - 1) * span // (m - 1) if m > 1 else np.full(d.size, int(rho * 2**32))
        x = np.where(brute.words(SEED, NAME, 16 * t, d.size) < bound.astype(np.uint64), d, f(0))
        kept.append(x / (bound.astype(np.float32) * f(2.0**-32)) if paper else x * brute.l1_factor(d, x))
    return kept


SHAPES = [((9, 67), {}, 1), ((603,), {}, 0), ((4, 7, 3, 5), {}, 1), ((4, 7, 3, 5), {"rank_dim": -1}, 3)]
SHAPES += [
    ((9, 67), {"rank_dim": 0}, 0),
    ((9, 67), {"rank_dim": 5}, 1),
    ((40, 1), {}, 1),
    ((1, 40), {"rank_dim": 0}, 0),
]


@pytest.mark.parametrize(("shape", "option", "dim"), SHAPES, ids=str)
@pytest.mark.parametrize("dialect", ["default", "paper"])
@pytest.mark.parametrize("method", ["della", "della_linear"])
def test_della(method: str, dialect: str, shape: tuple[int, ...], option: dict, dim: int) -> None:
    """Ranks along dim 1 (a vector is one row), rank_dim, rows of length one, equal magnitudes."""
    flat = family(shape)
    kept = della(flat, shape, dim, 0.5, 0.2, dialect == "paper")
    vote, divide = ("weighted", "weights") if method == "della" else ("none", "none")
    want = combine(kept, W, vote=vote, divide=divide)
    got = merged(flat, method, shape, weights=W, density=0.5, epsilon=0.2, dialect=dialect, **option)
    same(got, flat[0], want)


def test_della_density_ends() -> None:
    """Density 1 and 0 draw nothing whatever epsilon is; a number is a row of one."""
    flat = family()
    got = merged(flat, "della_linear", weights=1, density=[1.0, 0.0, 1.0], epsilon=0.4)
    same(got, flat[0], combine([deltas(flat)[0], deltas(flat)[2]], [1, 1], vote="none"))
    number = [np.zeros(1, np.float32), np.ones(1, np.float32)]
    assert merged(number, "della", (), weights=1, density=0.5).tolist() in ([0.0], [1.0])


def band(d: np.ndarray, density: float, gamma: float, model: int, policy: str) -> np.ndarray:
    """Ascending positions bottom to bottom + target - 1."""
    n = d.size
    if density >= 1:
        return d
    target, cut = int(density * n), int(gamma * n)
    bottom = max(0, n - target - cut)
    ascending = n - 1 - brute.places(np.abs(d), SEED, NAME, model, policy)
    return np.where((ascending >= bottom) & (ascending < bottom + target), d, f(0))


DENSITIES = [(0.5, 0.1), (0.9, 0.3), (0.2, 0.0), (0.05, 0.5), (0.0009, 0.1), (0.999, 0.01), (1.0, 0.3), (0.0, 0.1)]


@pytest.mark.parametrize(("density", "gamma"), DENSITIES)
@pytest.mark.parametrize("policy", ["hash", "index"])
@pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs_ties"])
def test_breadcrumbs(method: str, policy: str, density: float, gamma: float) -> None:
    """Exactly floor(density n) kept; the cut of the largest gives way to the target."""
    flat = family()
    kept = [band(d, density, gamma, t, policy) for t, d in enumerate(deltas(flat))]
    for rescale in (False, True):
        if rescale and 0 < density < 1:
            kept = [e * brute.l1_factor(d, e) for d, e in zip(deltas(flat), kept, strict=True)]
        vote = "weighted" if method == "breadcrumbs_ties" else "none"
        want = combine(kept, W, vote=vote)
        got = merged(flat, method, weights=W, density=density, gamma=gamma, tie_policy=policy, rescale=rescale)
        same(got, flat[0], want)


def test_breadcrumbs_loses_nothing_where_no_entry_is_cut() -> None:
    """Fewer than 100 entries at gamma 0.01: no outlier is cut, the target stays."""
    flat = family((50,), count=1, grid=2.0**20)
    got = merged(flat, "breadcrumbs", (50,), weights=1, density=0.4)
    assert set(np.nonzero(got != flat[0])[0]) == set(np.argsort(np.abs(deltas(flat)[0]))[-20:])


@pytest.mark.parametrize("remove_first", [True, False])
@pytest.mark.parametrize("shape", [(9, 67), (603,), (3, 4, 50)])
def test_breadcrumbs_paper(shape: tuple[int, ...], remove_first: bool) -> None:
    """Per row of the last dimension: the largest go, the largest of the rest stay; or the other way round."""
    flat = family(shape)
    m = shape[-1]
    gone, stay = int(m * 0.06), int(m * 0.3)
    kept = []
    for t, d in enumerate(deltas(flat)):
        rank, _ = brute.row_ranks(d, shape, len(shape) - 1, SEED, NAME, t)
        place = m - rank
        last = gone + stay if remove_first else stay
        kept.append(np.where((place >= gone) & (place < last), d, f(0)))
    want = combine(kept, W, vote="none", scale=0.5)
    got = merged(
        flat,
        "breadcrumbs",
        shape,
        weights=W,
        density=0.3,
        gamma=0.06,
        dialect="paper",
        remove_first=remove_first,
        scale=0.5,
    )
    same(got, flat[0], want)


def test_breadcrumbs_paper_edges(caplog: pytest.LogCaptureFixture) -> None:
    """Short rows vanish with a warning; a number is left alone; density 1 keeps the outlier cut; gamma can win."""
    flat = family((20, 3), count=1)
    with caplog.at_level(logging.WARNING, "mergekernels"):
        got = merged(flat, "breadcrumbs", (20, 3), density=0.2, dialect="paper")
    np.testing.assert_array_equal(got, flat[0])
    assert "layer.weight: density 0.2 keeps no entry of rows of length 3" in caplog.text
    number = [np.zeros(1, np.float32), np.ones(1, np.float32)]
    assert merged(number, "breadcrumbs", (), density=0.2, dialect="paper").tolist() == [1.0]
    flat = family((4, 10), count=1, grid=2.0**20)
    got = merged(flat, "breadcrumbs", (4, 10), density=1.0, gamma=0.2, dialect="paper")
    assert ((got != flat[0]).reshape(4, 10).sum(1) == 8).all()
    got = merged(flat, "breadcrumbs", (4, 10), density=0.2, gamma=0.5, dialect="paper", remove_first=False)
    np.testing.assert_array_equal(got, flat[0])


@pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs_ties", "ties", "dare_ties"])
def test_model_scope(method: str) -> None:
    """Over two tensors: counts over both, L1 factors of each tensor by itself."""
    shapes = {"a": (7, 11), "b": (13,), "empty": (0,)}
    flats = {k: family(s, seed=i) for i, (k, s) in enumerate(shapes.items())}
    rho, gamma = 0.4, 0.1
    kept: dict[str, list[np.ndarray]] = {k: [] for k in shapes}
    for t in range(3):
        d = {k: deltas(flats[k])[t] for k in shapes}
        flat = np.concatenate([d[k] for k in sorted(shapes)])
        word = np.concatenate([brute.words(SEED, k, 16 * t + 2, d[k].size) for k in sorted(shapes)])
        order = np.lexsort((np.arange(flat.size), word, -np.abs(flat).astype(np.float64)))
        place = np.empty(flat.size, np.int64)
        place[order] = np.arange(flat.size)
        target, cut = int(rho * flat.size), int(gamma * flat.size) if method.startswith("bread") else 0
        mask = (place >= cut) & (place < cut + target)
        at = 0
        for k in sorted(shapes):
            own = mask[at : at + d[k].size]
            at += d[k].size
            if method == "dare_ties":
                own = brute.words(SEED, k, 16 * t, d[k].size) < int(rho * 2**32)
            e = np.where(own, d[k], f(0))
            kept[k].append(e * brute.l1_factor(d[k], e))
    dicts = [{k: torch.from_numpy(flats[k][i].copy()).reshape(shapes[k]) for k in shapes} for i in range(4)]
    params: dict[str, Any] = {"density": rho, "rescale": True, "scope": "model", "weights": W}
    if method.startswith("bread"):
        params["gamma"] = gamma
    vote = "none" if method == "breadcrumbs" else "weighted"
    for name in BACKENDS:
        got = mk.merge_state_dicts(dicts[1:], method, base=dicts[0], seed=SEED, backend=name, **params)
        for k in shapes:
            divide = "weights" if method == "ties" else "none"
            want = combine(kept[k], W, vote=vote, divide=divide)
            np.testing.assert_array_equal(got[k].reshape(-1).numpy(), flats[k][0] + want)


@pytest.mark.parametrize("dialect", ["default", "paper"])
def test_large_tensors_are_sampled(dialect: str) -> None:
    """More than 2^17 elements: brackets from samples, two points per model, 16-bit inputs that tie."""
    shape = (300, 700)
    rng = np.random.default_rng(5)
    base = torch.from_numpy(rng.normal(size=shape) * 0.02).bfloat16()
    model = (base.float() + torch.from_numpy(rng.normal(size=shape) * 1e-3)).bfloat16()
    flat = [base.float().reshape(-1).numpy(), model.float().reshape(-1).numpy()]
    d = deltas(flat)[0]
    if dialect == "default":
        kept = band(d, 0.3, 0.02, 0, "hash")
    else:
        rank, m = brute.row_ranks(d, shape, 1, SEED, NAME, 0)
        kept = np.where((m - rank >= 14) & (m - rank < 14 + 210), d, f(0))
    for name in BACKENDS:
        got = mk.merge(
            [model],
            "breadcrumbs",
            base=base,
            weights=1,
            density=0.3,
            gamma=0.02,
            dialect=dialect,
            name=NAME,
            seed=SEED,
            backend=name,
            out_dtype=torch.float32,
        )
        same(got.reshape(-1).numpy(), flat[0], kept)


NAN_CASES = [("dare_linear", {}), ("della", {"density": 0.5}), ("ties", {"rescale": True}), ("breadcrumbs", {})]


@pytest.mark.parametrize(("method", "params"), NAN_CASES, ids=[m for m, _ in NAN_CASES])
def test_nonfinite_inputs(method: str, params: dict) -> None:
    """Refused with tensor, model and index; let through, a NaN in a sum spoils the tensor, in a selection its place."""
    flat = family()
    flat[2][77] = np.nan
    params = {"weights": 1, "density": 0.3, **params}
    with pytest.raises(DataError, match="model 1") as caught:
        merged(flat, method, **params)
    assert "77" in str(caught.value) and NAME in str(caught.value)
    got = merged(flat, method, nan="propagate", **params)
    assert np.isnan(got).all() if method != "breadcrumbs" else np.isnan(got).sum() <= 1


def test_float64_inputs_stay_float64() -> None:
    """Deltas below the resolution of float32 survive."""
    base = torch.ones(64, dtype=torch.float64)
    model = base + torch.arange(64, dtype=torch.float64) * 1e-12
    for method, name in itertools.product(("dare_linear", "della_linear", "breadcrumbs"), BACKENDS):
        got = mk.merge([model], method, base=base, weights=1, density=0.5, rescale=False, backend=name)
        kept = got != base
        assert torch.equal(got[kept], model[kept]) and 10 < int(kept.sum()) < 54


REFUSALS = [
    ("della", {"density": 0.1}, "epsilon of model 0 is too large for its density"),
    ("della", {"density": [0.5, 0.9], "epsilon": [0.1, 0.1]}, "epsilon of model 1 .* got density 0.9 and epsilon 0.1"),
    ("della", {"density": 0.5, "epsilon": 0.5}, "density - epsilon > 0 and density \\+ epsilon < 1"),
    ("della", {"density": 0.5, "epsilon": -0.1}, r"'epsilon' is not usable; expected a number in \[0, 0.5\]"),
    ("della_linear", {"rank_dim": 0.5}, "'rank_dim' is not usable; expected an integer"),
    ("breadcrumbs", {"gamma": 1.5}, r"'gamma' is not usable; expected a number in \[0, 1\]; got 1.5"),
    ("breadcrumbs", {"density": 20}, r"expected a number in \[0, 1\]; got 20"),
    ("breadcrumbs", {"dialect": "paper", "scope": "model"}, "ranks each row by itself; expected no scope"),
    ("breadcrumbs", {"remove_first": False}, "remove_first: false is the paper's; expected dialect paper"),
    ("breadcrumbs_ties", {"dialect": "paper"}, "breadcrumbs_ties has no dialect 'paper'"),
    ("dare_ties", {"dialect": "paper", "weights": [1, 2]}, "the paper's dialect has no weights"),
    ("dare_ties", {"trim": 0.2}, "trim is the paper's; expected dialect paper; got dialect default"),
    ("dare_ties", {"majority_sign_method": "frequency"}, "is a vote of PEFT; expected dialect peft"),
    ("dare_linear", {"weights": 1e39}, "weight is beyond the range of float32"),
    ("dare_linear", {"weights": [1, 2, 3]}, "wrong number of values; expected one value, or 2"),
    (
        "ties",
        {"dialect": "paper", "merge_function": "mean", "normalize": False},
        "expected merge_function sum; got mean",
    ),
]


@pytest.mark.parametrize(
    ("method", "params", "message"), REFUSALS, ids=[f"{m}-{i}" for i, (m, _, _) in enumerate(REFUSALS)]
)
def test_refusals(method: str, params: dict, message: str) -> None:
    call: dict[str, Any] = {"base": torch.zeros(4), "weights": 1, **params}
    with pytest.raises(ArgumentError, match=message):
        mk.merge([torch.ones(4), torch.ones(4)], method, **call)
