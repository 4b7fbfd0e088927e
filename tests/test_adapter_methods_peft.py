"""PEFT's combination types against their definitions in float64, in both dialects."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import mergekernels as mk
import peft_reference as reference
from adapter_cases import SITES, adapter, adapters, best, dense, error, module, product, site, weighted
from brute_methods import words
from mergekernels.errors import ArgumentError, PlanError

pytestmark = pytest.mark.usefixtures("one_thread")

WEIGHTS = [1.0, -0.75, 2.0, 0.4]
ALPHA = {"alpha": 6.0}


def drawn(seed: int, density: list[float]) -> reference.Prune:
    """The masks that the seed gives: Philox words by tensor, adapter and element."""

    def mask(t: int, name: str, n: int) -> torch.Tensor:
        return torch.from_numpy((words(seed, name, 16 * t, n) < int(density[t] * 2.0**32)).astype(np.float64))

    return reference.masked(mask, density)


def pruning(method: str, density: list[float], seed: int) -> reference.Prune:
    return drawn(seed, density) if method.startswith("dare") else reference.largest(density)


@pytest.mark.parametrize("density", [0.0, 0.01, 0.3, 0.999, 1.0, [0.2, 0.9, 0.0, 1.0]], ids=str)
@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize("method", reference.NAMES)
def test_factorwise_types(method: str, majority: str, density: float | list[float]) -> None:
    if majority == "frequency" and "ties" not in method:
        majority = "total"
    group = adapters(4, SITES, [3], **ALPHA)
    group[1] = adapter([m for n, m in group[1].modules.items() if n != "embed"], label="part")
    each = density if isinstance(density, list) else [density] * 4
    options = {"majority_sign_method": majority} if "ties" in method else {}
    for dialect in ("default", "peft"):
        merged = mk.merge_adapters(group, method, weights=WEIGHTS, density=density, seed=11, dialect=dialect, **options)
        for at in SITES:
            want = reference.on_factors(
                group, at.module, WEIGHTS, pruning(method, each, 11), reference.vote_of(method, majority)
            )
            # 1e-6: sums of four products in float32, of two factors
            assert error(product(merged.modules[at.module][1]), want) < 1e-6


@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 1.0, [0.2, 0.9, 0.0, 1.0]], ids=str)
@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize("method", [f"{n}_svd" for n in reference.NAMES])
def test_dense_types(method: str, majority: str, density: float | list[float]) -> None:
    if majority == "frequency" and "ties" not in method:
        majority = "total"
    group = adapters(4, SITES, [3, 5], **ALPHA)
    group[2] = adapter([m for n, m in group[2].modules.items() if n != "conv"], label="part")
    each = density if isinstance(density, list) else [density] * 4
    options = {"majority_sign_method": majority} if "ties" in method else {}
    merged = mk.merge_adapters(group, method, weights=WEIGHTS, density=density, seed=5, rank=7, **options)
    for at in SITES:
        want = reference.on_deltas(
            group, at.module, WEIGHTS, pruning(method, each, 5), reference.vote_of(method, majority), 7
        )
        # 1e-4: the seventh singular value has a gap of a few percent to the eighth
        assert error(product(merged.modules[at.module][1]), want) < 1e-4
        full = mk.merge_adapters(group, method, weights=WEIGHTS, density=density, seed=5, rank=50, **options)
        want = reference.on_deltas(
            group, at.module, WEIGHTS, pruning(method, each, 5), reference.vote_of(method, majority), 50
        )
        assert error(product(full.modules[at.module][1]), want) < 2e-6


def test_linear_has_cross_terms() -> None:
    group = adapters(3, SITES, [4], **ALPHA)
    merged = mk.merge_adapters(group, "linear", weights=WEIGHTS[:3])
    for at in SITES:
        want = reference.on_factors(group, at.module, WEIGHTS, lambda t, name, x: x, "none")
        got = product(merged.modules[at.module][1])
        assert error(got, want) < 1e-6
        assert error(got, weighted(group, WEIGHTS[:3], at.module)) > 0.3


def test_the_largest_rank_of_all_modules_is_the_default() -> None:
    """As svd_rank: the largest rank, of a rank pattern too."""
    group = [
        adapter([module(SITES[0], 2, 0), module(SITES[2], 6, 1)], label="a"),
        adapter([module(SITES[0], 3, 2), module(SITES[2], 1, 3)], label="b"),
    ]
    report = mk.merge_adapters(group, "svd").report.modules
    assert (report["layers.0.q"].rank, report["embed"].rank) == (5, 6)
    assert report["embed"].kept_energy < 1.0


@pytest.mark.parametrize("method", ["svd", "cat", "linear", "ties", "magnitude_prune", "ties_svd", "dare_linear_svd"])
def test_one_adapter(method: str) -> None:
    """With weight 1 and density 1 an adapter gives itself back, whatever its scaling; default prunes and cuts it."""
    cases = [{"alpha": 9.0}, {"alpha": 3.0, "rslora": True}, {}]
    for options in cases:
        one = adapters(1, SITES, [4], **options)
        arguments = {} if method in ("svd", "cat", "linear") else {"density": 1.0}
        merged = mk.merge_adapters(one, method, **arguments)
        for at in SITES:
            assert error(product(merged.modules[at.module][1]), dense(one[0].modules[at.module], at.shape)) < 1e-6
    if method == "linear":
        return
    arguments = {} if method in ("svd", "cat") else {"density": 0.3}
    cut = mk.merge_adapters(one, method, rank=2, **arguments)
    same = mk.merge_adapters(one, method, rank=2, dialect="peft", **arguments)
    assert cut.report.modules["embed"].rank == 2
    assert same.report.modules["embed"].rank == 4
    assert error(product(same.modules["embed"][1]), dense(one[0].modules["embed"], (12, 50))) < 1e-6
    assert error(product(cut.modules["embed"][1]), dense(one[0].modules["embed"], (12, 50))) > 0.1
    assert any("merged by linear" in w for w in same.report.warnings)


@pytest.mark.parametrize(
    ("method", "rank", "root"),
    [("cat", None, 7), ("svd", None, 5), ("svd", 3, 3), ("linear", None, 5), ("ties", None, 5)],
)
def test_the_rslora_leak_of_the_first_adapter(method: str, rank: int | None, root: int) -> None:
    """Dialect peft multiplies by the root of the result's rank if the first config says rsLoRA; default never does."""
    ranks = [5, 5] if method in ("linear", "ties") else [2, 5]
    group = [
        adapter([module(SITES[0], r, i, alpha=4.0, rslora=i == 0)], config={"r": r, "use_rslora": i == 0})
        for i, r in enumerate(ranks)
    ]
    options = {"density": 0.5} if method == "ties" else {}
    right = mk.merge_adapters(group, method, rank=rank, **options)
    leaky = mk.merge_adapters(group, method, rank=rank, dialect="peft", **options)
    want = math.sqrt(root) * product(right.modules["layers.0.q"][1])
    assert error(product(leaky.modules["layers.0.q"][1]), want) < 1e-6
    assert any("rsLoRA" in w for w in leaky.report.warnings)
    turned = mk.merge_adapters(group[::-1], method, rank=rank, dialect="peft", **options)
    assert error(product(turned.modules["layers.0.q"][1]), product(right.modules["layers.0.q"][1])) < 1e-5
    assert right.config["use_rslora"] is leaky.config["use_rslora"] is False


def test_svd_clamp() -> None:
    """Both factors are limited to the quantile of all their entries."""
    group = adapters(3, [SITES[0]], [3])
    plain = mk.merge_adapters(group, "svd", rank=4).modules["layers.0.q"][1]
    clamped = mk.merge_adapters(group, "svd", rank=4, svd_clamp=0.9).modules["layers.0.q"][1]
    limit = float(torch.quantile(torch.cat([plain.b.reshape(-1), plain.a.reshape(-1)]).double(), 0.9))
    assert error(clamped.b, plain.b.clamp(-limit, limit)) < 1e-5
    assert error(clamped.a, plain.a.clamp(-limit, limit)) < 1e-5
    assert bool((plain.b.abs().max(0).values == plain.b.max(0).values).all())
    assert float(clamped.b.abs().max()) < float(plain.b.abs().max())
    whole = mk.merge_adapters(group, "svd", rank=4, svd_clamp=1.0).modules["layers.0.q"][1]
    assert error(product(whole), product(plain)) < 1.0


@pytest.mark.parametrize("method", ["linear", *reference.NAMES])
def test_unequal_ranks_are_refused_before_anything_is_read(method: str) -> None:
    def never() -> tuple[torch.Tensor, torch.Tensor]:
        raise AssertionError("read")

    from dataclasses import replace

    group = [
        adapter([replace(module(at, rank, 0), load=never) for at in SITES[:2]], label=f"r{rank}") for rank in (2, 3)
    ]
    options = {} if method == "linear" else {"density": 0.5}
    with pytest.raises(PlanError) as caught:
        mk.merge_adapters(group, method, **options)
    assert {p.tensor for p in caught.value.problems} == {"layers.0.q", "layers.0.c"}
    assert all(p.code == "adapter.ranks" and "2 in r2, 3 in r3" in str(p) for p in caught.value.problems)
    one = [adapter([replace(module(SITES[0], r, 0), load=never)], label=f"r{r}") for r in (2, 3)]
    with pytest.raises(ArgumentError, match="needs adapters of one rank"):
        mk.merge_adapters(one, method, **options)


def test_density_is_required_and_in_range() -> None:
    group = adapters(2, SITES, [3])
    for method in [*reference.NAMES, *(f"{n}_svd" for n in reference.NAMES)]:
        with pytest.raises(ArgumentError, match="needs 'density'"):
            mk.merge_adapters(group, method)
        with pytest.raises(ArgumentError, match=r"a number in \[0, 1\]"):
            mk.merge_adapters(group, method, density=-0.1)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties_svd"])
def test_masks_depend_on_seed_and_module_and_keep_their_share(method: str) -> None:
    twins = [site(f"m{i}", 60, 50) for i in range(2)]
    ones = (torch.ones(60, 4), torch.ones(4, 50))
    group = [adapter([module(at, 4, 0, factors=ones) for at in twins], label=f"a{t}") for t in range(2)]
    first, same, other = (mk.merge_adapters(group, method, density=0.3, seed=s) for s in (1, 1, 2))
    for at in twins:
        assert torch.equal(first.modules[at.module][1].b, same.modules[at.module][1].b)
        assert not torch.equal(first.modules[at.module][1].b, other.modules[at.module][1].b)
    assert not torch.equal(first.modules["m0"][1].b, first.modules["m1"][1].b)
    one = mk.merge_adapters(group[:1], "dare_linear_svd", density=0.3, rank=50)
    matrix = product(one.modules["m0"][1])
    kept = float((matrix.abs() > 1.0).double().mean())
    # 3,000 draws: four standard deviations
    assert abs(kept - 0.3) < 4 * math.sqrt(0.21 / 3000)
    assert float(matrix.max()) == pytest.approx(4 / 0.3, rel=1e-5)


def test_ties_of_half_adapters_are_elected_in_float32() -> None:
    """Input in bfloat16 is widened, the result rounded once."""
    group = adapters(3, SITES, [3], dtype=torch.bfloat16, **ALPHA)
    for method, rank in (("ties", None), ("ties_svd", 30)):
        half = mk.merge_adapters(group, method, density=0.4, weights=WEIGHTS[:3], rank=rank)
        wide = mk.merge_adapters(group, method, density=0.4, weights=WEIGHTS[:3], rank=rank, out_dtype="float32")
        for at in SITES:
            (_, got), (_, full) = half.modules[at.module], wide.modules[at.module]
            assert torch.equal(got.b, full.b.bfloat16())
            prune = reference.largest([0.4] * 3)
            if rank is None:
                want = reference.on_factors(group, at.module, WEIGHTS, prune, "total")
            else:
                want = reference.on_deltas(group, at.module, WEIGHTS, prune, "total", rank)
            assert error(product(full), want) < 2e-6


def test_equal_magnitudes_are_cut_to_the_count() -> None:
    """Where magnitudes tie, exactly floor(density n) survive; policy all keeps every one."""
    pair = (torch.ones(40, 2), torch.ones(2, 28))
    group = [adapter([module(SITES[0], 2, 0, factors=pair)])]
    for policy in ("hash", "index", "all"):
        factors = mk.merge_adapters(group, "magnitude_prune", density=0.25, tie_policy=policy).modules["layers.0.q"][1]
        whole = mk.merge_adapters(group, "magnitude_prune_svd", density=0.25, tie_policy=policy, rank=28)
        for values, n in ((factors.b, 80), (product(whole.modules["layers.0.q"][1]), 40 * 28)):
            assert int((values.abs() > 1e-4).sum()) == (n if policy == "all" else n // 4)


def test_large_products_are_pruned_tile_by_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles in both directions, a sample before the sweep: the threshold is that of the whole matrix."""
    from mergekernels.ops import products

    monkeypatch.setattr(products, "_TILE_BYTES", 1 << 20)
    at = site("big", 700, 1100)
    group = adapters(2, [at], [3])
    prune = reference.largest([0.1, 0.1])
    whole = reference.on_deltas(group, "big", [1.0, -1.0], prune, "total", 700)
    merged = mk.merge_adapters(group, "ties_svd", density=0.1, weights=[1.0, -1.0], rank=700)
    assert error(product(merged.modules["big"][1]), whole) < 1e-5
    # Of a large matrix the quality is promised, not the vectors.
    cut = mk.merge_adapters(group, "ties_svd", density=0.1, weights=[1.0, -1.0], rank=4)
    rest = torch.linalg.norm(whole - product(cut.modules["big"][1]))
    assert float(rest) <= (1 + 1e-4) * float(torch.linalg.norm(whole - best(whole, 4)))


def test_svd_of_a_sum_without_a_gap_is_still_best() -> None:
    """Equal singular values: the approximation is ambiguous, its error is not."""
    q, _ = torch.linalg.qr(torch.randn(40, 8, generator=torch.Generator().manual_seed(3)))
    p, _ = torch.linalg.qr(torch.randn(28, 8, generator=torch.Generator().manual_seed(4)))
    pair = (q[:, :4].contiguous(), p[:, :4].T.contiguous()), (q[:, 4:].contiguous(), p[:, 4:].T.contiguous())
    group = [adapter([module(SITES[0], 4, 0, factors=f)], label=f"a{i}") for i, f in enumerate(pair)]
    merged = mk.merge_adapters(group, "svd", rank=3)
    full = weighted(group, [1.0, 1.0], "layers.0.q")
    rest = torch.linalg.norm(full - product(merged.modules["layers.0.q"][1]))
    assert float(rest) == pytest.approx(float(torch.linalg.norm(full - best(full, 3))), rel=1e-4)
    assert merged.report.modules["layers.0.q"].kept_energy == pytest.approx(3 / 8, rel=1e-5)


@pytest.mark.parametrize("method", ["cat", "svd", "linear", *reference.NAMES, *(f"{n}_svd" for n in reference.NAMES)])
def test_zero_factors_give_zeros(method: str) -> None:
    """Untrained adapters: B is zero."""
    pair = (torch.zeros(40, 2), torch.randn(2, 28))
    group = [adapter([module(SITES[0], 2, 0, factors=pair)], label=f"a{i}") for i in range(2)]
    options = {} if method in ("cat", "svd", "linear") else {"density": 0.5}
    merged = mk.merge_adapters(group, method, **options)
    factors = merged.modules["layers.0.q"][1]
    assert factors.rank >= 1
    assert not product(factors).any()
    assert merged.report.modules["layers.0.q"].kept_energy == 1.0


@pytest.mark.parametrize("method", ["cat", "svd", "linear", *reference.NAMES, *(f"{n}_svd" for n in reference.NAMES)])
def test_float64_adapters_stay_float64(method: str) -> None:
    group = adapters(3, SITES, [3], dtype=torch.float64, **ALPHA)
    options = {} if method in ("cat", "svd", "linear") else {"density": 0.4}
    merged = mk.merge_adapters(group, method, weights=WEIGHTS[:3], seed=2, rank=50, **options)
    assert merged.dtype == "F64"
    for at in SITES:
        prune = pruning(method, [0.4] * 3, 2) if options else lambda t, name, x: x
        if method in ("cat", "svd"):
            want = weighted(group, WEIGHTS[:3], at.module)
        elif method.endswith("_svd"):
            want = reference.on_deltas(group, at.module, WEIGHTS, prune, reference.vote_of(method), 50, rounded=False)
        else:
            want = reference.on_factors(group, at.module, WEIGHTS, prune, reference.vote_of(method))
        assert error(product(merged.modules[at.module][1]), want) < 1e-9
