"""What holds for every method of adapters, whoever wrote it: files, missing modules, order, scale, repetition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import mergekernels as mk
from adapter_cases import adapter, adapters, error, product, site, weighted
from mergekernels._methods.matrix import Wants
from mergekernels._methods.matrix_table import get_matrix, matrix_names
from mergekernels._methods.protocol import REQUIRED
from mergekernels.adapters.job import wants_of
from mergekernels.errors import MergeError

pytestmark = pytest.mark.usefixtures("one_thread")

SITES = [
    site("layers.0.q", 40, 28),
    site("layers.0.c", 28, 36, "fan_in_fan_out"),
    site("embed", 20, 50, "embedding"),
    site("conv", 16, 24, "conv"),
]
METHODS = matrix_names("adapters")
RANDOM = ("dare",)
ORDERED = {"opcm": "a stream", "tc_lora": "iterations from a start", "lora_lego": "clusters from seeded centres"}
MORE: dict[str, dict[str, Any]] = {
    "tc_lora": {"n_starts": 1, "max_iter": 10},  # the properties do not need a converged fit
}


def options(method: str) -> dict[str, Any]:
    """Values for parameters that have no default."""
    info = get_matrix(method, "adapters").info
    needed = [p for p in info.params if p.default is REQUIRED and p.name != "weight"]
    given = {p.keyword: (p.choices[0] if p.choices else 0.5) for p in needed}
    return given | MORE.get(method, {})


def wants(method: str) -> Wants:
    info = get_matrix(method, "adapters").info
    params = {p.name: None if p.default is REQUIRED else p.default for p in info.params}
    return wants_of(get_matrix(method, "adapters"), params, "default")


def group(method: str, count: int = 3) -> list[Any]:
    """Adapters of several ranks where the method takes them."""
    return adapters(count, SITES, [3] if wants(method).equal_ranks else [3, 5, 2], alpha=4.0)


@pytest.mark.parametrize("method", METHODS)
def test_saved_repeated_and_scaled(method: str, tmp_path: Path) -> None:
    given = group(method)
    first = mk.merge_adapters(given, method, seed=4, **options(method))
    again = mk.merge_adapters(given, method, seed=4, **options(method))
    double = mk.merge_adapters(given, method, seed=4, scale=2.0, **options(method))
    first.save(tmp_path / "out")
    loaded = mk.merge_adapters([tmp_path / "out"], "cat", base={s.weight: s.weight_shape for s in SITES})
    moved = 0
    for at in SITES:
        delta = first.delta(at.module)
        moved += bool(delta.any())
        assert delta.shape == at.weight_shape
        assert torch.equal(delta, again.delta(at.module))
        assert torch.equal(delta, loaded.delta(at.module))
        assert error(double.delta(at.module), 2 * delta) < 1e-5
        assert first.report.modules[at.module].rank <= min(at.shape)
    assert moved == len(SITES)


@pytest.mark.parametrize("method", [m for m in METHODS if not m.startswith(RANDOM) and m not in ORDERED])
def test_order_of_adapters(method: str) -> None:
    given = group(method)
    here = mk.merge_adapters(given, method, **options(method))
    there = mk.merge_adapters(given[::-1], method, **options(method))
    for at in SITES:
        assert error(there.delta(at.module), here.delta(at.module)) < 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_missing_modules_and_truncation(method: str) -> None:
    given = group(method)
    given[1] = adapter([m for n, m in given[1].modules.items() if n in ("embed", "conv")], label="part")
    merged = mk.merge_adapters(given, method, rank=2, **options(method))
    assert set(merged.modules) == {s.module for s in SITES}
    assert any("part lacks 2 of 4 modules" in w for w in merged.report.warnings)
    for name, report in merged.report.modules.items():
        assert report.rank <= 2
        assert report.adapters == (3 if name in ("embed", "conv") else 2)
        assert 0.0 <= report.kept_energy <= 1.0
        assert bool(torch.isfinite(product(merged.modules[name][1])).all())


@pytest.mark.parametrize("method", METHODS)
def test_untrained_adapters_give_zero_or_say_why_not(method: str) -> None:
    from dataclasses import replace

    def untrained(m: Any) -> Any:
        b, a = m.load()
        return replace(m, load=lambda: (torch.zeros_like(b), a))

    given = [adapter([untrained(m) for m in a.modules.values()], label=a.label) for a in group(method)]
    try:
        merged = mk.merge_adapters(given, method, **options(method))
    except MergeError as problem:
        pytest.fail(f"{method} refuses untrained adapters: {problem}")
    for at in SITES:
        assert not merged.delta(at.module).any()


@pytest.mark.parametrize("method", METHODS)
def test_half_adapters_give_half_adapters(method: str) -> None:
    given = adapters(3, SITES, [3], alpha=4.0, dtype=torch.bfloat16)
    half = mk.merge_adapters(given, method, seed=1, **options(method))
    wide = mk.merge_adapters(given, method, seed=1, out_dtype="float32", **options(method))
    assert half.dtype == "BF16"
    for name, (_, factors) in half.modules.items():
        assert torch.equal(factors.b, wide.modules[name][1].b.bfloat16())
        assert torch.equal(factors.a, wide.modules[name][1].a.bfloat16())


def test_excluded_modules_get_the_mean() -> None:
    given = group("tsv_m")
    weights = [1.0, -0.5, 2.0]
    for options in ({"exclude": ["embed*", "*.q.weight"]}, {"exclude": "embed*,*.q.weight", "conv": "mean"}):
        merged = mk.merge_adapters(given, "tsv_m", weights=weights, **options)
        for at in SITES:
            mean = weighted(given, [w / 3 for w in weights], at.module)
            plain = at.module in ("embed", "layers.0.q") or (at.module == "conv" and "conv" in options)
            assert (error(product(merged.modules[at.module][1]), mean) < 1e-6) == plain
            assert ("mean" in merged.report.modules[at.module].route) == plain


def test_what_a_shape_forbids_is_refused_before_anything_is_read() -> None:
    from dataclasses import replace

    def never() -> tuple[torch.Tensor, torch.Tensor]:
        raise AssertionError("read")

    given = [adapter([replace(m, load=never) for m in a.modules.values()]) for a in group("iso_cts", 10)]
    with pytest.raises(MergeError, match="iso_cts") as caught:
        mk.merge_adapters(given, "iso_cts", common_space_fraction=0.1, dims="q", conv="flatten")
    problems = getattr(caught.value, "problems", [caught.value])
    assert {p.code for p in problems} == {"matrix.shape"}
    assert "conv" in {p.tensor for p in problems}
