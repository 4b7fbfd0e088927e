"""Methods in factor space through `merge_adapters`: all kinds of sites, ranks and scales, missing modules, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from adapter_cases import adapter, module, site
from matrix_cases import dense, merge_all, relative
from mergekernels.adapters.merge import merge_adapters
from mergekernels.adapters.model import Adapter, Delta, Factors
from mergekernels.errors import ArgumentError, MergeError

pytestmark = pytest.mark.usefixtures("one_thread")

SITES = [
    site("layers.0.q_proj", 24, 16),
    site("layers.0.c_attn", 20, 28, "fan_in_fan_out"),
    site("layers.1.q_proj", 24, 16),
    site("embed", 12, 30, "embedding"),
    site("conv", 18, 24, "conv"),
]
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("core_space", {"inner": "ties", "density": 0.4}),
    ("core_space", {"inner": "tsv_m", "flatten": True}),
    ("core_space", {"inner": "dare_linear"}),
    ("knots", {"density": 0.4}),
    ("knots", {"stack": "rows", "density": 0.3}),
    ("knots", {"inner": "dare_ties"}),
    ("knots", {"inner": "iso_c"}),
    ("robust_merge", {}),
    ("lori", {"sparsity": 0.5}),
    ("lori", {"sparsity": 0.7, "granularity": "layer", "combination": "linear"}),
    ("from_norm", {"k": 2.0}),
    ("lore", {"mu": 0.5, "tau_scale": 2.0}),
]
NEED_ONE_RANK = ("robust_merge", "linear")


def given(name: str, params: dict[str, Any]) -> list[Adapter]:
    """Three adapters: mixed ranks where the method takes them, alphas, rsLoRA, one module missing, one extra."""
    one = name in NEED_ONE_RANK or params.get("combination") in NEED_ONE_RANK
    ranks = (3, 3, 3) if one else (3, 5, 2)
    return [
        adapter([module(s, ranks[0], i, alpha=6) for i, s in enumerate(SITES)], "a"),
        adapter([module(s, ranks[1], 10 + i, alpha=4, rslora=True) for i, s in enumerate(SITES)], "b"),
        adapter([module(s, ranks[2], 20 + i, alpha=1) for i, s in enumerate(SITES) if i != 2], "c"),
    ]


def weights_of(name: str) -> dict[str, Any]:
    return {} if name in ("robust_merge", "from_norm", "lore") else {"weights": [1.0, 0.5, 2.0]}


def direct(name: str, params: dict[str, Any], inputs: list[Adapter], fold: bool = True) -> dict[str, torch.Tensor]:
    """The method on the matrices themselves, scales multiplied in, by module."""
    deltas: dict[str, list[Delta]] = {}
    for s in SITES:
        absent = Factors(torch.zeros(s.shape[0], 0), torch.zeros(0, s.shape[1]))
        found = [x.modules.get(s.module) for x in inputs]
        deltas[s.weight] = [absent if m is None else m.factors(fold_scale=fold) for m in found]
    merged = merge_all(name, deltas, **params)
    return {s.module: dense(merged[s.weight].delta) for s in SITES}


@pytest.mark.parametrize(("name", "params"), METHODS, ids=[f"{n}-{'-'.join(map(str, p.values()))}" for n, p in METHODS])
def test_all_kinds_of_sites(name: str, params: dict[str, Any], tmp_path: Path) -> None:
    inputs = given(name, params)
    options = {**params, **weights_of(name)}
    result = merge_adapters(inputs, name, scale=0.7, **options)
    assert set(result.modules) == {s.module for s in SITES}
    want = direct(name, options, inputs)
    linear = params.get("combination") == "linear"
    for s in SITES:
        if linear:  # the driver tells the method the scales, which it divides between the factors
            continue
        assert relative(result.delta(s.module), s.to_weight(0.7 * want[s.module])) < 1e-5, s.module
    result.save(tmp_path / "merged")
    again = merge_adapters([tmp_path / "merged"], "cat")
    for s in SITES:
        # A kernel whose sizes are not in the file is read as the matrix that it is.
        assert relative(again.delta(s.module).reshape(-1), result.delta(s.module).reshape(-1)) < 1e-6
    cut = merge_adapters(inputs, name, rank=2, **options)
    for s in SITES:
        assert cut.modules[s.module][1].rank <= 2
    assert repr(merge_adapters(inputs, name, **options).delta("embed")) == repr(
        merge_adapters(inputs, name, **options).delta("embed")
    )


@pytest.mark.parametrize(("name", "params"), METHODS, ids=[f"{n}-{'-'.join(map(str, p.values()))}" for n, p in METHODS])
def test_one_adapter_without_pruning_returns_itself(name: str, params: dict[str, Any]) -> None:
    everything = {
        "core_space": {"inner": "ties", "density": 1.0},
        "knots": {"inner": "ties", "density": 1.0, "stack": params.get("stack", "columns")},
        "robust_merge": {"keep": 1.0, "clamp": 0.0, "factor_scale": 1.0},
        "lori": {"sparsity": 0.0, "combination": params.get("combination", "cat")},
        "from_norm": {"k": 3.0},
        "lore": {"tau_scale": 4.0},
    }[name]
    one = given(name, params)[:1]
    result = merge_adapters(one, name, **everything)
    for s in SITES:
        assert relative(result.delta(s.module), s.to_weight(one[0].modules[s.module].factors().dense())) < 1e-6


@pytest.mark.parametrize("name", ["knots", "core_space", "lori", "robust_merge"])
def test_scales_that_are_ignored(name: str) -> None:
    """fold_scale false, and the dialect code, see the factors as the files hold them."""
    params: dict[str, Any] = {"knots": {"density": 0.5}, "core_space": {"inner": "iso_c"}}.get(name, {})
    inputs = given(name, params)
    for options in ({"fold_scale": False}, {"dialect": "code"}):
        result = merge_adapters(inputs, name, **params, **options)
        want = direct(name, {**params, **options}, inputs, fold=False)
        for s in SITES:
            assert relative(result.delta(s.module), s.to_weight(want[s.module])) < 1e-5
    folded = merge_adapters(inputs, name, **params, dialect="code", fold_scale=True)
    assert relative(folded.delta("embed"), merge_adapters(inputs, name, **params, dialect="code").delta("embed")) > 0.1


def test_refusals_name_the_module_before_data_is_read() -> None:
    read: list[str] = []

    def watched(x: Adapter) -> Adapter:
        from dataclasses import replace

        return replace(
            x,
            modules={
                n: replace(m, load=lambda n=n, m=m: (read.append(n), m.load())[1])  # type: ignore[misc]
                for n, m in x.modules.items()
            },
        )

    mixed = [watched(x) for x in given("knots", {})]
    for name, params in (("robust_merge", {}), ("lori", {"combination": "linear"})):
        with pytest.raises(MergeError) as caught:
            merge_adapters(mixed, name, **params)
        assert "rank" in str(caught.value)
    for name, params in (
        ("core_space", {}),
        ("core_space", {"inner": "ties", "density": 3.0}),
        ("knots", {"inner": "sce"}),
        ("knots", {"weights": [1.0]}),
        ("from_norm", {}),
        ("lore", {"mu": -1.0}),
        ("robust_merge", {"weights": [1.0, 1.0, 1.0]}),
    ):
        with pytest.raises(ArgumentError):
            merge_adapters(mixed, name, **params)
    assert read == []


def test_reports_and_warnings() -> None:
    inputs = given("knots", {})
    report = merge_adapters(inputs, "knots").report
    assert set(report.modules) == {s.module for s in SITES}
    assert report.modules["embed"].rank == 10
    assert any("layers.1.q_proj" in w for w in report.warnings)  # one adapter lacks it
    lore = merge_adapters(inputs, "lore")
    assert any("plain average" in w for w in lore.report.warnings)
