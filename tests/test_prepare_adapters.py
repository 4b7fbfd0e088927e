"""`prepare_adapters`: merging again with other weights gives what merging anew gives."""

from __future__ import annotations

import pytest
import torch

import mergekernels as mk
from adapter_cases import SITES, adapter, adapters, best, error, module, product, weighted
from mergekernels.errors import ArgumentError

pytestmark = pytest.mark.usefixtures("one_thread")

VECTORS = [[1.0, 1.0, 1.0], [0.5, -2.0, 0.0], [0.0, 0.0, 3.0], [-1.0, 1e-3, 7.0]]


def same(one: mk.MergedAdapter, two: mk.MergedAdapter, bound: float) -> None:
    assert list(one.modules) == list(two.modules)
    for name in one.modules:
        assert error(product(one.modules[name][1]), product(two.modules[name][1])) < bound
        assert one.report.modules[name].rank == two.report.modules[name].rank
        assert one.report.modules[name].kept_energy == pytest.approx(two.report.modules[name].kept_energy, abs=1e-6)
    assert one.config == two.config
    assert one.report.params == two.report.params


@pytest.mark.parametrize(
    "options", [{"rank": 3}, {"energy": 0.7}, {}, {"rank": 5, "spread": "sqrt", "scale": -0.5}], ids=str
)
def test_svd(options: dict[str, object]) -> None:
    # embed has more ranks than its smaller side and keeps its factors
    group = adapters(3, SITES, [3, 5], alpha=4.0, rslora=True)
    prepared = mk.prepare_adapters(group, "svd", **options)  # type: ignore[arg-type]
    for weights in VECTORS:
        same(prepared.merge(weights), mk.merge_adapters(group, "svd", weights=weights, **options), 1e-5)  # type: ignore[arg-type]
    assert "prepared core" in prepared.merge().report.modules["conv"].route
    changed = prepared.merge(VECTORS[0], rank=1)
    for at in SITES:
        want = best(weighted(group, VECTORS[0], at.module), 1) * float(options.get("scale", 1.0))  # type: ignore[arg-type]
        assert error(product(changed.modules[at.module][1]), want) < 1e-5


def test_svd_of_duplicates_missing_modules_and_unequal_scales() -> None:
    """Dependent columns are dropped from the bases; a tiny B beside a large A counts; a module may be absent."""
    one = adapters(1, SITES, [3])[0]
    pair = (torch.randn(40, 2) * 1e-6, torch.randn(2, 28) * 1e6)
    odd = adapter([module(SITES[0], 2, 0, factors=pair)], label="odd")
    group = [one, one, odd]
    prepared = mk.prepare_adapters(group, rank=5)
    for weights in ([1.0, -1.0, 1.0], [1.0, 2.0, 0.5]):
        got = prepared.merge(weights)
        for at in SITES:
            want = weighted(group, weights, at.module)
            scale = float(torch.linalg.norm(want)) or 1.0
            assert float(torch.linalg.norm(product(got.modules[at.module][1]) - want)) < 2e-5 * scale + 1e-4


@pytest.mark.parametrize("method", ["linear", "magnitude_prune", "dare_linear", "ties", "dare_ties"])
@pytest.mark.parametrize("dialect", ["default", "peft"])
def test_factorwise_types(method: str, dialect: str) -> None:
    group = adapters(3, SITES, [3], alpha=4.0)
    group[1] = adapter([m for n, m in group[1].modules.items() if n != "conv"], label="part", config={"r": 3})
    options = {} if method == "linear" else {"density": 0.4}
    prepared = mk.prepare_adapters(group, method, seed=3, dialect=dialect, **options)
    for weights in VECTORS:
        same(
            prepared.merge(weights),
            mk.merge_adapters(group, method, weights=weights, seed=3, dialect=dialect, **options),
            1e-6,
        )
    cut = prepared.merge(VECTORS[0], rank=2)
    same(cut, mk.merge_adapters(group, method, weights=VECTORS[0], seed=3, dialect=dialect, rank=2, **options), 1e-5)


def test_svd_clamp_and_the_rslora_leak() -> None:
    group = [
        adapter(
            [module(at, 3, 10 * i + j, rslora=i == 0) for j, at in enumerate(SITES)],
            config={"r": 3, "use_rslora": i == 0},
        )
        for i in range(3)
    ]
    for options in ({"svd_clamp": 0.9}, {"dialect": "peft"}):
        prepared = mk.prepare_adapters(group, rank=4, **options)  # type: ignore[arg-type]
        same(prepared.merge(VECTORS[1]), mk.merge_adapters(group, "svd", weights=VECTORS[1], rank=4, **options), 1e-5)  # type: ignore[arg-type]


def test_the_rslora_leak_follows_the_rank() -> None:
    group = [adapter([module(SITES[0], 3, i, rslora=True)], config={"r": 3, "use_rslora": True}) for i in range(2)]
    got = mk.prepare_adapters(group, rank=4, dialect="peft").merge([1.0, 2.0], rank=2)
    same(got, mk.merge_adapters(group, "svd", weights=[1.0, 2.0], rank=2, dialect="peft"), 1e-5)


def test_half_adapters_round_once() -> None:
    group = adapters(3, SITES, [3], dtype=torch.bfloat16)
    merged = mk.prepare_adapters(group, rank=4).merge()
    assert merged.dtype == "BF16"
    wide = mk.prepare_adapters(group, rank=4, out_dtype="float32").merge()
    for name, (_, factors) in merged.modules.items():
        assert torch.equal(factors.b, wide.modules[name][1].b.bfloat16())


def test_refusals() -> None:
    group = adapters(3, SITES, [3])
    with pytest.raises(ArgumentError, match="ties_svd cannot be prepared"):
        mk.prepare_adapters(group, "ties_svd", density=0.5)
    with pytest.raises(ArgumentError, match="has no parameter 'weight'"):
        mk.prepare_adapters(group, "svd", weight=1.0)
    prepared = mk.prepare_adapters(group)
    with pytest.raises(ArgumentError, match="wrong number of values"):
        prepared.merge([1.0])
    with pytest.raises(ArgumentError, match="rank is not usable"):
        prepared.merge(rank=0)
    with pytest.raises(ArgumentError, match="'weights' is not usable"):
        prepared.merge(float("nan"))
