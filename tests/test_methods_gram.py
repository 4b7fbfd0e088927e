"""The Gram methods against their published vector forms in extended precision, and their edge cases."""

from __future__ import annotations

import logging
import time
from array import array
from typing import Any

import numpy as np
import pytest
import torch

import mergekernels as mk
import vector_methods as published
from brute import philox_word
from mergekernels._backends.dispatch import load
from mergekernels._methods import get
from mergekernels._methods.gram import Combination
from mergekernels._methods.protocol import Spec
from mergekernels.ops import pcgrad
from mergekernels.ops.selection import Scope
from mergekernels.ops.sums import Gram, Sums
from mergekernels.tensors import F32

SHAPE = (23, 401)  # more than two canonical blocks, the last one uneven
NEEDED = {"gram", "reduce", "table"}
BACKENDS = [name for name in ("reference", "cpu") if load(name).FEATURES >= NEEDED]
wide = published.wide


def tensor(x: np.ndarray) -> torch.Tensor:
    """A torch tensor with the values of an array."""
    return torch.from_numpy(np.array(x, order="C"))


def merged(models: list[np.ndarray], method: str, base: np.ndarray | None = None, **params: Any) -> np.ndarray:
    """mergekernels on arrays, on every backend with the same bits."""
    torch_base = None if base is None else tensor(base)
    outputs = [
        mk.merge([tensor(m) for m in models], method, base=torch_base, backend=name, **params).numpy()
        for name in BACKENDS
    ]
    for other in outputs[1:]:
        assert other.tobytes() == outputs[0].tobytes()
    return outputs[0]


def error(got: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, relative to the largest magnitude."""
    return float(np.abs(wide(got).ravel() - expected.ravel()).max() / np.abs(expected).max())


@pytest.fixture
def family() -> dict[str, np.ndarray]:
    """A base and four models, float64, of different lengths and with correlated deltas."""
    rng = np.random.default_rng(7)
    base = rng.normal(size=SHAPE)
    common = rng.normal(size=SHAPE)
    found = {"base": base}
    for i, name in enumerate("abcd"):
        found[name] = base * (1 + 0.1 * i) + 0.3 * (i + 1) * (0.5 * common + rng.normal(size=SHAPE))
    return found


CASES = [
    ("slerp", ["b"], "base", {"t": 0.3}),
    ("slerp", ["b"], "base", {"t": -0.4}),
    ("nuslerp", ["a", "d"], None, {"weights": [1.0, 3.0]}),
    ("nuslerp", ["a", "d"], "base", {"weights": [0.2, 0.7]}),
    ("nuslerp", ["a", "d"], "base", {"weights": [1.0, -1.0]}),
    ("nuslerp", ["a", "b"], None, {"weights": [1.0, 3.0], "nuslerp_flatten": False}),
    ("nuslerp", ["a", "b"], "base", {"weights": [1.0, 3.0], "nuslerp_flatten": False, "nuslerp_row_wise": True}),
    ("multislerp", ["a", "b", "c"], None, {"weights": [1.0, 3.0, 2.0]}),
    ("multislerp", ["a", "b", "c"], "base", {"weights": [1.0, 3.0, -2.0], "normalize_weights": False}),
    ("karcher", ["a", "b", "c", "d"], None, {}),
    ("karcher", ["a", "b", "c"], None, {"max_iter": 2, "tol": 1e-12}),
    ("model_stock", ["a", "b"], "base", {}),
    ("model_stock", ["a", "b", "c", "d"], "base", {"filter_wise": True}),
    ("model_stock", ["a", "b", "c"], "base", {"dialect": "fusionbench"}),
    ("from_norm", ["a", "b", "c"], "base", {"k": 3.0}),
    ("from_norm", ["a", "b", "c"], "base", {"k": 0.0}),
]


def by_segment(fn: Any, vectors: list[np.ndarray], params: dict[str, Any]) -> np.ndarray:
    """A rule on flat vectors applied to tensors, rows or columns."""
    if params.get("nuslerp_row_wise"):
        return np.stack([fn(list(v)) for v in zip(*(x.T for x in vectors), strict=True)]).T
    if params.get("filter_wise") or params.get("nuslerp_flatten") is False:
        return np.stack([fn(list(v)) for v in zip(*vectors, strict=True)])
    return fn([x.ravel() for x in vectors]).reshape(vectors[0].shape)


def expected(method: str, models: list[np.ndarray], base: np.ndarray | None, params: dict[str, Any]) -> np.ndarray:
    """The published form."""
    vectors = [wide(m) for m in models]
    zero = np.zeros_like(vectors[0])
    x0 = zero if base is None else wide(base)
    deltas = [v - x0 for v in vectors]
    weights = params.get("weights")
    if method == "slerp":
        return published.slerp(x0.ravel(), vectors[0].ravel(), params["t"])
    if method == "nuslerp":
        return x0 + by_segment(lambda v: published.nuslerp(v[0], v[1], weights), deltas, params)
    if method == "multislerp":
        normalize = params.get("normalize_weights", True)
        return x0 + by_segment(lambda v: published.multislerp(v, weights, normalize, 1e-8), deltas, params)
    if method == "karcher":
        return by_segment(lambda v: published.karcher(v, **params), vectors, {})
    if method == "model_stock":
        angles = params.get("dialect") == "fusionbench"
        floor = params.get("norm_floor", 1e-6)
        return by_segment(lambda v: published.model_stock(v[0], v[1:], floor, angles), [x0, *vectors], params)
    return published.from_norm(x0.ravel(), [v.ravel() for v in vectors], params["k"])


@pytest.mark.parametrize(("method", "names", "base", "params"), CASES, ids=lambda v: v if isinstance(v, str) else "")
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_agrees_with_the_vector_form(
    method: str, names: list[str], base: str | None, params: dict[str, Any], dtype: str, family: dict[str, np.ndarray]
) -> None:
    models = [family[n].astype(dtype) for n in names]
    x0 = None if base is None else family[base].astype(dtype)
    want = expected(method, models, x0, params)
    got = merged(models, method, x0, **params)
    # float64: a few roundings of each term; float32: coefficients and terms are rounded to 24 bits.
    assert error(got, want) < (2e-15 if dtype == "float64" else 4e-7)


def test_pcgrad_in_both_orders(family: dict[str, np.ndarray]) -> None:
    rng = np.random.default_rng(1)
    common = rng.normal(size=SHAPE)
    models = [rng.normal(size=SHAPE) + s * common for s in (1.0, -1.5, 0.5, -0.7)]
    flat = [wide(m).ravel() for m in models]
    fixed = published.pcgrad(flat, [[j for j in range(4) if j != i] for i in range(4)])
    assert error(merged(models, "pcgrad", order="fixed"), fixed) < 2e-15
    assert error(merged(models, "pcgrad", order="fixed", reduction="mean"), fixed / 4) < 2e-15
    results = set()
    for seed in (0, 5):
        for scope, name in (("tensor", "layer.weight"), ("model", 0)):
            orders = []
            for i in range(4):
                words = {j: word(seed, name, 16 * i + 5, j) for j in range(4) if j != i}
                orders.append(sorted(words, key=lambda j, w=words: w[j]))
            want = published.pcgrad(flat, orders)
            got = merged(models, "pcgrad", seed=seed, scope=scope, name="layer.weight")
            assert error(got, want) < 2e-15
            results.add(got.tobytes())
    assert len(results) > 2  # the order matters for these vectors
    with_base = merged([m + family["base"] for m in models], "pcgrad", family["base"], order="fixed")
    assert error(with_base, wide(family["base"]).ravel() + fixed) < 1e-14


def word(seed: int, name: str | int, stream: int, g: int) -> int:
    """The Philox word for a tensor's name, or its number."""
    if isinstance(name, str):
        return philox_word(seed, name, stream, g)
    mask = 0xFFFFFFFF
    c, k = [g // 4, 0, name, stream], [seed & mask, seed >> 32]
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & mask, (p0 >> 32) ^ c[3] ^ k[1], p0 & mask]
        k = [(k[0] + 0x9E3779B9) & mask, (k[1] + 0xBB67AE85) & mask]
    return c[g % 4]


def test_pcgrad_over_a_model_uses_one_gram(family: dict[str, np.ndarray]) -> None:
    models = [family["a"] - family["b"], family["b"] - 2 * family["a"], family["c"] - family["d"]]
    dicts = [{"w": tensor(m[:10]), "v": tensor(m[10:]), "empty": torch.zeros(0, dtype=torch.float64)} for m in models]
    whole = published.pcgrad([wide(m).ravel() for m in models], [[1, 2], [0, 2], [0, 1]])
    together = mk.merge_state_dicts(dicts, "pcgrad", order="fixed", backend=BACKENDS[0])
    got = np.concatenate([together["w"].numpy(), together["v"].numpy()])
    assert error(got, whole) < 2e-15
    apart = mk.merge_state_dicts(dicts, "pcgrad", order="fixed", scope="tensor", backend=BACKENDS[0])
    part = published.pcgrad([wide(m[:10]).ravel() for m in models], [[1, 2], [0, 2], [0, 1]])
    assert error(apart["w"].numpy(), part) < 2e-15


def test_pcgrad_on_gradients(family: dict[str, np.ndarray]) -> None:
    models = [family["a"] - family["b"], family["b"] - 2 * family["a"], family["c"] - family["d"]]
    parts: list[list[torch.Tensor | None]] = [[tensor(m[:10]), None, tensor(m[10:])] for m in models]
    parts[2][2] = None  # zero for this task
    whole = [m.copy() for m in models]
    whole[2][10:] = 0
    for backend in BACKENDS:
        first, none, last = pcgrad(parts, order="fixed", backend=backend)
        assert first is not None and none is None and last is not None
        want = published.pcgrad([wide(m).ravel() for m in whole], [[1, 2], [0, 2], [0, 1]])
        assert error(np.concatenate([first.numpy(), last.numpy()]), want) < 2e-15
        mean = pcgrad(parts, order="fixed", reduction="mean", backend=backend)[0]
        assert mean is not None and torch.allclose(mean * 3, first, rtol=1e-14)
        by_tensor = pcgrad(parts, scope="tensor", seed=3, backend=backend)
        orders = []
        for i in range(2):
            words = {j: word(3, 2, 16 * i + 5, j) for j in range(3) if j != i}
            orders.append([j for j in sorted(words, key=lambda j, w=words: w[j]) if j < 2])
        want = published.pcgrad([wide(m[10:]).ravel() for m in models[:2]], orders)
        assert by_tensor[2] is not None and error(by_tensor[2].numpy(), want) < 2e-15
    same = pcgrad(parts, seed=4)
    dicts = [{"w": tensor(m[:10]), "v": tensor(m[10:])} for m in whole]
    method = mk.merge_state_dicts(dicts, "pcgrad", seed=4)
    assert torch.equal(same[0], method["w"]) and torch.equal(same[2], method["v"])
    parts[0][0] = parts[0][0] * float("nan")
    spoilt = pcgrad(parts, scope="tensor")
    assert spoilt[0].isnan().all() and not spoilt[2].isnan().any()
    assert pcgrad(parts)[2].isnan().all()
    for wrong in ([], [[tensor(models[0])], []]):
        with pytest.raises(mk.MergeError, match="gradients"):
            pcgrad(wrong)


@pytest.mark.parametrize("angle", [1e-2, 1e-3, 1e-5, 3e-8])
def test_small_angles_lose_no_digits(angle: float) -> None:
    rng = np.random.default_rng(3)
    a, other = rng.normal(size=(2, 9000))
    a /= np.sqrt((a * a).sum())
    other -= (a * other).sum() * a
    other /= np.sqrt((other * other).sum())
    b, c = 3 * (np.cos(angle) * a + np.sin(angle) * other), np.cos(angle) * a - np.sin(angle) * other
    base = rng.normal(size=9000)
    want = published.nuslerp(wide(a), wide(b), [0.3, 0.6])
    assert error(merged([a, b], "nuslerp", weights=[0.3, 0.6]), want) < 1e-15
    # The angle of deltas that are far smaller than the base.
    small = [base + 1e-6 * v for v in (a, b, c)]
    deltas = [wide(m) - wide(base) for m in small]
    got = wide(merged(small[:2], "nuslerp", base, weights=[0.3, 0.6])) - wide(base)
    # What is added to the base is rounded at the base's last bit, 2.2e-16 of 1e-8 or more.
    assert np.abs(got - published.nuslerp(deltas[0], deltas[1], [0.3, 0.6])).max() < 1e-15
    want = published.karcher([wide(a), wide(b), wide(c)], tol=1e-14)
    assert error(merged([a, b, c], "karcher", tol=1e-14), want) < 2e-15
    want = published.multislerp([wide(a), wide(b), wide(c)], [1, 2, 3], True, 1e-8)
    assert error(merged([a, b, c], "multislerp", weights=[1, 2, 3]), want) < 2e-15


def test_near_the_linear_limit_of_slerp() -> None:
    rng = np.random.default_rng(4)
    a, other = rng.normal(size=(2, 9000))
    a /= np.sqrt((a * a).sum())
    other -= (a * other).sum() * a
    other /= np.sqrt((other * other).sum())
    for cos in (0.99949999, 0.99950001, -0.99949999, -0.99950001, -1.0):
        b = cos * a + np.sqrt(1 - cos * cos) * other
        # Near pi, sin th has 1e-16 / (1 - cos^2) of relative error, whatever computes it from a cosine in float64.
        bound = 1e-15 if cos > 0 else 5e-13
        assert error(merged([b], "slerp", a, t=0.25), published.slerp(wide(a), wide(b), 0.25)) < bound


def test_opposite_vectors_are_mixed_linearly_not_amplified() -> None:
    rng = np.random.default_rng(5)
    a = rng.normal(size=9000).astype(np.float32)
    for factor in (-1.0, -3.0, -0.7):
        b = (factor * a).astype(np.float32)
        want = 0.7 * a.astype(np.float64) + 0.3 * b.astype(np.float64)
        assert np.abs(merged([a, b], "nuslerp", weights=[0.7, 0.3]) - want).max() < 1e-5
        got = merged([a, b], "multislerp", weights=[0.5, 0.5])
        assert np.abs(got - 0.5 * (a.astype(np.float64) + b)).max() < 1e-5
    with pytest.raises(mk.MergeError, match="cancel") as caught:
        merged([a, -a, 0 * a], "multislerp", weights=[1, 1, 1], name="layer.weight")
    assert caught.value.tensor == "layer.weight"


def test_karcher_leaves_out_what_is_opposite_to_the_mean(caplog: pytest.LogCaptureFixture) -> None:
    rng = np.random.default_rng(6)
    a = rng.normal(size=5000)
    with caplog.at_level(logging.WARNING, "mergekernels"):
        got = merged([a, -2 * a], "karcher", name="layer.weight")
    # The mean of the units vanishes, so the first is taken; the second is opposite to it and left out.
    assert error(got, 1.5 * wide(a)) < 1e-15
    assert "layer.weight" in caplog.text and "opposite" in caplog.text


def test_zero_vectors(family: dict[str, np.ndarray]) -> None:
    a, zero = family["a"], np.zeros(SHAPE)
    sin = np.sin(0.3 * np.pi / 2)
    assert error(merged([a], "slerp", zero, t=0.3), sin * wide(a)) < 1e-15
    assert error(merged([zero], "slerp", a, t=0.3), np.sin(0.7 * np.pi / 2) * wide(a)) < 1e-15
    assert not merged([zero], "slerp", zero, t=0.3).any()
    assert error(merged([zero, a], "nuslerp", weights=[0.7, 0.3]), sin * wide(a)) < 1e-15
    assert not merged([zero, zero], "nuslerp", weights=[0.7, 0.3]).any()
    # A zero vector has no direction, and still counts in the mean length.
    assert error(merged([a, zero], "karcher"), wide(a) / 2) < 1e-15
    assert not merged([zero, zero], "karcher").any()
    # So has one whose norm is at most tol; slerp takes such a norm as 1.
    tiny = 1e-12 * a
    assert error(merged([a, tiny], "karcher"), wide(a) / 2) < 1e-11
    assert not merged([tiny, tiny], "karcher").any()
    assert merged([tiny, tiny], "karcher", tol=0.0).any()
    want = published.slerp(wide(tiny).ravel(), wide(family["b"]).ravel(), 0.3)
    assert error(merged([family["b"]], "slerp", tiny, t=0.3), want) < 1e-15
    assert error(merged([a, zero, 2 * a], "multislerp", weights=[1, 1, 1]), wide(a)) < 1e-8  # eps beside the norm
    assert not merged([zero] * 3, "multislerp", weights=[1, 1, 1]).any()
    assert merged([a, a, a], "multislerp", a, weights=[1, 1, 1]).tobytes() == a.tobytes()
    assert not merged([a, zero, -a], "pcgrad", order="fixed").any()  # all of it conflicts
    assert merged([a, a], "from_norm", a, k=2).tobytes() == a.tobytes()
    for dialect in ("default", "fusionbench"):
        assert merged([a, a], "model_stock", a, dialect=dialect, norm_floor=0).tobytes() == a.tobytes()


def test_model_stock_norm_floor(family: dict[str, np.ndarray]) -> None:
    rng = np.random.default_rng(8)
    x0 = rng.normal(size=3000)
    small = [x0 + 1e-6 * v for v in rng.normal(size=(3, 3000)) + rng.normal(size=3000)]
    for floor in (0.0, 1e-6):
        want = published.model_stock(wide(x0), [wide(m) for m in small], floor)
        got = wide(merged(small, "model_stock", x0, norm_floor=floor)) - wide(x0)
        assert np.abs(got - (want - wide(x0))).max() < 1e-15
    exact, floored = (merged(small, "model_stock", x0, norm_floor=f) - x0 for f in (0.0, 1e-6))
    assert np.abs(exact).max() > 10 * np.abs(floored).max()  # the floor is far above these products of norms
    opposed = [x0 + 1.0, x0 - 1.0]
    assert merged(opposed, "model_stock", x0).tobytes() == x0.tobytes()  # 1 + c = 0


def test_one_model(family: dict[str, np.ndarray]) -> None:
    a = np.array([1.0, -0.0, 3.5e-310, -7.25])
    for method, params in (("multislerp", {"weights": 2.0}), ("karcher", {}), ("pcgrad", {})):
        got = merged([a], method, **params)
        assert np.array_equal(got, a)
    assert merged([a], "multislerp", weights=2.0).tobytes() == a.tobytes()
    assert np.array_equal(merged([a], "multislerp", np.ones(4), weights=2.0), 1.0 + (a - 1.0))


@pytest.mark.parametrize("shape", [(), (0,), (0, 5), (5, 0), (1,), (4, 1), (1, 4), (3, 2, 5)])
def test_odd_shapes(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(9)
    x0, a, b = (np.asarray(x) for x in rng.normal(size=(3, *shape)))
    for flatten, row_wise in ((True, False), (False, False), (False, True)):
        params = {"nuslerp_flatten": flatten, "nuslerp_row_wise": row_wise}
        got = merged([a, b], "nuslerp", weights=[1, 2], **params)
        assert got.shape == shape
        if not got.size or len(shape) < 2:
            continue
        first = 0 if row_wise else -1
        parts = [np.moveaxis(wide(v), first, -1).reshape(-1, shape[first]) for v in (a, b)]
        if flatten:
            parts = [v.reshape(1, -1) for v in (a, b)]
        want = np.stack([published.nuslerp(wide(p), wide(q), [1, 2]) for p, q in zip(*parts, strict=True)])
        mine = np.moveaxis(got, first, -1).reshape(-1, shape[first]) if not flatten else got.reshape(1, -1)
        assert error(mine, want) < 1e-14
    for filter_wise in (False, True):
        assert merged([a, b], "model_stock", x0, filter_wise=filter_wise).shape == shape
    assert merged([a], "slerp", x0, t=0.5).shape == shape
    assert merged([a, b], "karcher").shape == shape
    assert merged([a, b], "from_norm", x0, k=1).shape == shape


def test_nan_spoils_its_segment_alone(family: dict[str, np.ndarray]) -> None:
    a, b = family["a"].astype(np.float32), family["b"].astype(np.float32).copy()
    b[3, 7] = np.nan
    with pytest.raises(mk.MergeError, match="model 1") as caught:
        merged([a, b], "nuslerp", weights=[1, 1], name="w")
    assert caught.value.tensor == "w" and str(3 * SHAPE[1] + 7) in str(caught.value)
    assert np.isnan(merged([a, b], "nuslerp", weights=[1, 1], nan="propagate")).all()
    rows = merged([a, b], "nuslerp", weights=[1, 1], nan="propagate", nuslerp_flatten=False)
    assert np.isnan(rows[3]).all() and not np.isnan(np.delete(rows, 3, 0)).any()
    columns = merged([a, b], "nuslerp", weights=[1, 1], nan="propagate", nuslerp_flatten=False, nuslerp_row_wise=True)
    assert np.isnan(columns[:, 7]).all() and not np.isnan(np.delete(columns, 7, 1)).any()
    for method, params in (("karcher", {}), ("multislerp", {"weights": 1.0}), ("pcgrad", {}), ("slerp", {"t": 0.5})):
        models, base = ([b], a) if method == "slerp" else ([a, b], None)
        assert np.isnan(merged(models, method, base, nan="propagate", **params)).all()
    for method, params in (("model_stock", {}), ("from_norm", {"k": 1.0})):
        assert np.isnan(merged([a, b], method, a, nan="propagate", **params)).all()
    b[3, 7] = np.inf
    a[0, 0] = -np.inf
    with pytest.raises(mk.MergeError, match="model 0"):
        merged([a, b], "karcher")


@pytest.mark.parametrize(
    ("method", "count", "base", "params", "message"),
    [
        ("slerp", 1, True, {}, "needs 't'"),
        ("slerp", 2, True, {"t": 0.5}, "this many models"),
        ("slerp", 1, False, {"t": 0.5}, "needs a base"),
        ("nuslerp", 2, False, {}, "needs 'weights'"),
        ("nuslerp", 3, False, {"weights": 1}, "this many models"),
        ("multislerp", 2, False, {"weights": [1, -1]}, "sum to zero"),
        ("multislerp", 2, False, {"weights": 1, "eps": -1}, "eps"),
        ("karcher", 2, True, {}, "subtracts no base"),
        ("karcher", 2, False, {"max_iter": 0}, "max_iter"),
        ("karcher", 2, False, {"tol": -1.0}, "tol"),
        ("model_stock", 1, True, {}, "this many models"),
        ("model_stock", 2, False, {}, "needs a base"),
        ("model_stock", 2, True, {"norm_floor": -1}, "norm_floor"),
        ("model_stock", 2, True, {"dialect": "paper"}, "no dialect"),
        ("pcgrad", 2, False, {"order": "sorted"}, "order"),
        ("from_norm", 2, True, {}, "needs 'k'"),
        ("from_norm", 2, True, {"k": -1}, "k"),
    ],
)
def test_refusals(method: str, count: int, base: bool, params: dict[str, Any], message: str) -> None:
    x = torch.ones(4)
    with pytest.raises(mk.MergeError, match=message):
        mk.merge([x] * count, method, base=x if base else None, **params)


def test_rows_are_cheap_on_the_host() -> None:
    """128,000 rows take microseconds each: less than reading a matrix of that many rows."""
    count = 128_000
    rng = np.random.default_rng(0)
    dots = [array("d", x) for x in (rng.uniform(1, 2, count), rng.uniform(0, 1, count), rng.uniform(1, 2, count))]
    scope = Scope((0,), (0,), count * 8, "F32")
    for name, params in (
        ("nuslerp", {"weight": (1.0, 2.0), "nuslerp_flatten": False, "nuslerp_row_wise": False}),
        ("model_stock", {"filter_wise": True, "norm_floor": 1e-6}),
    ):
        method = get(name)
        spec = Spec(2, True, params, count * 8, scope, F32, shape=(count, 8))
        state = method.start(spec)
        assert isinstance(state.gram, Gram) and state.gram.segments.count == count
        began = time.process_time()
        coeffs = method.resolve(spec, state, Sums((tuple(dots),)), count * 8)
        assert isinstance(coeffs, Combination) and len(coeffs.values) == 2 * count
        assert time.process_time() - began < 2.0  # 0.3 s on a slow core


HUGE = [torch.full((3,), 1e154, dtype=torch.float64), torch.full((3,), -1e154, dtype=torch.float64)]


@pytest.mark.parametrize(
    ("method", "models", "params"),
    [
        ("multislerp", [torch.eye(2), -torch.eye(2)], dict(weights=[1e200, 1e308], normalize_weights=False)),
        ("slerp", [torch.tensor([-1.0, 0.1]).double()], dict(t=1e308, base=torch.tensor([1.0, 0.0]).double())),
        ("pcgrad", HUGE, dict(reduction="mean")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_coefficients_beyond_doubles_are_refused_or_propagate(method: str, models: list, params: dict) -> None:
    with pytest.raises(mk.MergeError, match="the result overflows its dtype, or is NaN"):
        mk.merge(models, method, **params)
    assert not mk.merge(models, method, nan="propagate", **params).isfinite().any()


def test_sums_of_weights_beyond_doubles() -> None:
    a, b = torch.eye(2), torch.ones(2, 2)
    assert torch.equal(mk.merge([a, b], "nuslerp", weights=1e308), mk.merge([a, b], "nuslerp", weights=1))
    with pytest.raises(mk.MergeError, match="sum of the weights is beyond the range of float64"):
        mk.merge([a, b], "multislerp", weights=1e308)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_from_norm_with_a_huge_power_keeps_the_largest(size: float) -> None:
    deltas = [torch.full((4,), size), torch.full((4,), 2 * size)]
    assert torch.equal(mk.merge(deltas, "from_norm", base=torch.zeros(4), k=1e308), deltas[1])
    assert torch.equal(mk.merge(deltas[:1] * 2, "from_norm", base=torch.zeros(4), k=1e308), deltas[0])


def test_surgery_on_gradients_beyond_doubles_gives_nan() -> None:
    found = pcgrad([[x, x, x, x] for x in HUGE])
    assert all(x is not None and x.isnan().all() for x in found)
