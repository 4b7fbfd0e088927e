"""`merge_adapters`: sums, truncation, coverage, streaming, refusals, files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mergekernels as mk
from adapter_cases import adapter, adapters, best, dense, error, module, product, site, weighted
from mergekernels.adapters.model import Adapter, Module
from mergekernels.errors import ArgumentError, BackendError, DataError, InputError, MergeError, OutputError, PlanError

pytestmark = pytest.mark.usefixtures("one_thread")

SITES = [
    site("layers.0.q", 24, 16),
    site("layers.0.c", 20, 12, "fan_in_fan_out"),
    site("embed", 12, 30, "embedding"),
    site("conv", 16, 12, "conv"),
]


def matrix(merged: mk.MergedAdapter, name: str) -> torch.Tensor:
    return product(merged.modules[name][1])


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, -2.0, 0.0], [1.0, 2.0, -3.0]])
def test_cat_is_the_weighted_sum(weights: list[float]) -> None:
    group = adapters(3, SITES, [2, 3, 1], alpha=5.0)
    merged = mk.merge_adapters(group, "cat", weights=weights)
    assert list(merged.modules) == sorted(s.module for s in SITES)
    for at in SITES:
        want = weighted(group, weights, at.module)
        assert error(matrix(merged, at.module), want) < 1e-6
        # the delta comes in the shape of the weight
        assert error(merged.delta(at.module), at.to_weight(want)) < 1e-6
        assert merged.delta(at.module).shape == at.weight_shape
        used = sum(r for r, w in zip([2, 3, 1], weights, strict=True) if w)
        assert merged.report.modules[at.module].rank == used


def test_cat_of_more_ranks_than_the_matrix_has_is_dense_and_says_so() -> None:
    group = adapters(9, [SITES[0]], [2], alpha=1.0)
    merged = mk.merge_adapters(group, "cat")
    report = merged.report.modules["layers.0.q"]
    assert report.rank == 16
    assert "ranks add up to 18" in report.route
    assert error(matrix(merged, "layers.0.q"), weighted(group, [1.0] * 9, "layers.0.q")) < 1e-6
    flipped = [site("t", 16, 24)]
    merged = mk.merge_adapters(adapters(8, flipped, [2]), "cat")
    assert merged.report.modules["t"].rank == 16
    assert error(matrix(merged, "t"), weighted(adapters(8, flipped, [2]), [1.0] * 8, "t")) < 1e-6


@pytest.mark.parametrize("rank", [1, 3, 6, 40])
@pytest.mark.parametrize("spread", ["b", "sqrt", "a"])
def test_svd_is_the_best_approximation(rank: int, spread: str) -> None:
    group = adapters(3, SITES, [2, 4], alpha=3.0, rslora=True)
    weights = [1.0, -0.5, 2.0]
    merged = mk.merge_adapters(group, "svd", weights=weights, rank=rank, spread=spread)  # type: ignore[arg-type]
    for at in SITES:
        full = weighted(group, weights, at.module)
        assert error(matrix(merged, at.module), best(full, rank)) < 1e-5
        report = merged.report.modules[at.module]
        values = torch.linalg.svdvals(full)
        assert report.rank == min(rank, 8)
        assert report.kept_energy == pytest.approx(float((values[:rank] ** 2).sum() / (values**2).sum()), abs=1e-6)


def test_svd_defaults_to_the_largest_rank_and_obeys_energy() -> None:
    group = adapters(4, SITES, [2, 5])
    assert {m.rank for m in mk.merge_adapters(group, "svd").report.modules.values()} == {5}
    merged = mk.merge_adapters(group, "svd", energy=0.8)
    for at in SITES:
        squares = torch.linalg.svdvals(weighted(group, [1.0] * 4, at.module)) ** 2
        least = int((squares.cumsum(0) / squares.sum() < 0.8).sum()) + 1
        assert merged.report.modules[at.module].rank == least
        assert merged.report.modules[at.module].kept_energy >= 0.8
    # other methods are truncated only on request
    assert mk.merge_adapters(group, "cat", rank=3).report.modules["embed"].rank == 3


@pytest.mark.parametrize("method", ["cat", "svd"])
@pytest.mark.parametrize("rank", [4, 7])
def test_one_adapter_returns_itself(method: str, rank: int) -> None:
    group = [
        adapter([module(SITES[0], rank, 1, alpha=2.0, rslora=True), module(SITES[2], 3, 2, alpha=9.0)]),
    ]
    merged = mk.merge_adapters(group, method)
    for name in ("layers.0.q", "embed"):
        assert error(matrix(merged, name), weighted(group, [1.0], name)) < 1e-6


def test_permuting_inputs_changes_nothing_and_weights_scale() -> None:
    group = adapters(4, SITES, [1, 2, 3], alpha=2.0)
    weights = [1.0, -2.0, 0.5, 3.0]
    for method, options in (("svd", {"rank": 3}), ("cat", {}), ("ties_svd", {"density": 0.4, "rank": 30})):
        here = mk.merge_adapters(group, method, weights=weights, **options)
        there = mk.merge_adapters(group[::-1], method, weights=weights[::-1], **options)
        double = mk.merge_adapters(group, method, weights=[2 * w for w in weights], **options)
        scaled = mk.merge_adapters(group, method, weights=weights, scale=2.0, **options)
        for at in SITES:
            one = matrix(here, at.module)
            assert error(matrix(there, at.module), one) < 1e-5
            assert error(matrix(double, at.module), 2 * one) < 1e-6
            assert error(matrix(scaled, at.module), 2 * one) < 1e-6


def test_a_weight_and_its_negative_cancel() -> None:
    one = adapters(1, SITES, [3], alpha=7.0)[0]
    merged = mk.merge_adapters([one, one], "svd", weights=[0.75, -0.75])
    for at in SITES:
        assert float(matrix(merged, at.module).abs().max()) < 1e-5 * float(
            dense(one.modules[at.module], at.shape).norm()
        )
    nothing = mk.merge_adapters([one, one], "cat", weights=0.0)
    for name, report in nothing.report.modules.items():
        assert report.rank == 1
        assert not matrix(nothing, name).any()
        assert any("zero" in warning for warning in report.warnings)


@pytest.mark.parametrize("method", ["cat", "svd", "linear", "ties", "lori", "from_norm", "robust_merge"])
def test_zero_factors_give_rank_1_of_zeros_and_a_warning(method: str) -> None:
    zero = (torch.zeros(24, 3), torch.ones(3, 16))
    group = [adapter([module(SITES[0], 3, 0, factors=zero)], label=f"a{t}") for t in range(2)]
    params = {"ties": {"density": 0.5}, "from_norm": {"k": 1.0}}.get(method, {})
    merged = mk.merge_adapters(group, method, **params)
    report = merged.report.modules["layers.0.q"]
    assert report.rank == 1 and not matrix(merged, "layers.0.q").any()
    assert any("the merged delta is zero" in w for w in report.warnings)
    assert any("layers.0.q: the merged delta is zero" in w for w in merged.report.warnings)


def test_what_is_said_of_many_modules_is_said_once() -> None:
    group = adapters(2, [site(f"layers.{i}.q", 6, 5) for i in range(9)], [2])
    warnings = mk.merge_adapters(group, "cat", weights=0.0).report.warnings
    assert warnings == (
        "layers.0.q, layers.1.q, layers.2.q, layers.3.q, layers.4.q and 4 more: "
        "the merged delta is zero: written as rank 1 of zeros",
    )


@pytest.mark.parametrize("device", ["meta", "xpu", "cuda:x", 1.5])
def test_devices_that_are_neither_cpu_nor_cuda(device: object) -> None:
    with pytest.raises(ArgumentError, match="device is not usable; expected 'cpu'"):
        mk.merge_adapters(adapters(2, SITES[:1], [2]), "cat", device=device)  # type: ignore[arg-type]


def test_factors_below_the_range_of_the_output_are_named() -> None:
    tiny = (torch.full((24, 1), 1e-9), torch.ones(1, 16))
    merged = mk.merge_adapters([adapter([module(SITES[0], 1, 0, factors=tiny)])], "cat", out_dtype="float16")
    assert not matrix(merged, "layers.0.q").any()
    assert any("below the range of float16" in w for w in merged.report.warnings)


def test_a_cut_that_nobody_asked_for_is_told() -> None:
    """iso_c of as many ranks as the matrix has gives equal singular values, of which the largest rank is a part."""
    group = adapters(6, SITES[:1], [3])
    merged = mk.merge_adapters(group, "iso_c")
    assert merged.report.modules["layers.0.q"].rank == 3
    assert "iso_c gives dense matrices in 1 of 1 modules" in merged.report.warnings[-1]
    assert "3: layers.0.q keeps 18.8%" in merged.report.warnings[-1]
    for quiet in ({"rank": 3}, {"energy": 0.5}):
        assert mk.merge_adapters(group, "iso_c", **quiet).report.warnings == ()
    assert mk.merge_adapters(group[:2], "iso_c").report.warnings == ()
    assert mk.merge_adapters(group, "svd").report.warnings == ()


def test_missing_modules_are_zero_and_reported() -> None:
    full, part = adapters(2, SITES, [2])
    part = adapter([part.modules["embed"]], label="part")
    merged = mk.merge_adapters([full, part], "svd", rank=4)
    for at in SITES:
        assert error(matrix(merged, at.module), weighted([full, part], [1, 1], at.module)) < 1e-6
        assert merged.report.modules[at.module].adapters == (2 if at.module == "embed" else 1)
    assert any("part lacks 3 of 4 modules" in w and "layers.0.q" in w for w in merged.report.warnings)


def test_an_adapter_that_shares_nothing_is_refused_unless_the_base_vouches() -> None:
    left = adapter([module(SITES[0], 2, 0)], label="left")
    right = adapter([module(SITES[1], 2, 1)], label="right")
    with pytest.raises(InputError, match="no module of left, right is in any other") as caught:
        mk.merge_adapters([left, right], "cat")
    assert caught.value.code == "adapter.coverage"
    shapes = {s.weight: s.weight_shape for s in SITES}
    merged = mk.merge_adapters([left, right], "cat", base=shapes)
    assert set(merged.modules) == {"layers.0.q", "layers.0.c"}


def test_the_base_is_checked() -> None:
    group = adapters(2, SITES, [2])
    shapes = {s.weight: s.weight_shape for s in SITES}
    mk.merge_adapters(group, "cat", base=shapes)
    del shapes["embed.weight"]
    shapes["conv.weight"] = (16, 3, 2, 3)
    with pytest.raises(PlanError) as caught:
        mk.merge_adapters(group, "cat", base=shapes)
    text = str(caught.value)
    assert "embed.weight" in text
    assert "(16, 3, 2, 3)" in text
    assert caught.value.exit_code == 3


def test_different_bases_are_refused_unless_one_is_given() -> None:
    one, two = adapters(2, SITES, [2])
    one, two = (Adapter(a.label, a.modules, base) for a, base in ((one, "org/a"), (two, "org/b")))
    with pytest.raises(InputError, match=r"different bases.*org/a.*org/b"):
        mk.merge_adapters([one, two], "cat")
    merged = mk.merge_adapters([one, two], "cat", base={s.weight: s.weight_shape for s in SITES})
    assert any("different bases" in w for w in merged.report.warnings)


def test_different_shapes_and_kinds_are_refused() -> None:
    one = adapter([module(site("x", 24, 16), 2, 0)], label="one")
    for other in (site("x", 24, 20), site("x", 24, 16, "fan_in_fan_out")):
        with pytest.raises(InputError, match="one") as caught:
            mk.merge_adapters([one, adapter([module(other, 2, 1)], label="two")], "cat")
        assert caught.value.code == "adapter.shape"


def test_replaced_tensors_are_carried_or_refused() -> None:
    one, two = adapters(2, SITES, [2])
    head = torch.ones(3)
    with_head = Adapter("head", one.modules, extras={"head.weight": lambda: head})
    merged = mk.merge_adapters([with_head, two], "cat")
    assert torch.equal(merged.extras["head.weight"](), head)
    assert any("head.weight" in w for w in merged.report.warnings)
    equal = Adapter("equal", two.modules, extras={"head.weight": lambda: head.clone()})
    assert torch.equal(mk.merge_adapters([with_head, equal], "cat").extras["head.weight"](), head)
    also = Adapter("also", two.modules, extras={"head.weight": lambda: head + 1})
    with pytest.raises(InputError, match=r"head\.weight.*head, also"):
        mk.merge_adapters([with_head, also], "cat")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("method", ["cat", "svd", "linear", "ties", "ties_svd"])
def test_values_that_are_not_finite_are_named(value: float, side: int, method: str) -> None:
    pair = (torch.ones(24, 2), torch.ones(2, 16))
    pair[side][1, 1] = value
    bad = adapter([module(SITES[0], 2, 0, factors=pair)], label="spoiled")
    good = adapter([module(SITES[0], 2, 0)], label="good")
    options = {"density": 0.5} if "ties" in method else {}
    with pytest.raises(DataError, match=rf"layers\.0\.q.*lora_{'BA'[side]} of spoiled has 1 values"):
        mk.merge_adapters([good, bad], method, **options)


def test_overflow_in_the_output_is_an_error() -> None:
    pair = (torch.full((24, 2), 6e4, dtype=torch.float16), torch.ones(2, 16, dtype=torch.float16))
    group = [adapter([module(SITES[0], 2, 0, factors=pair)], label=f"big{i}") for i in range(2)]
    with pytest.raises(DataError, match="beyond the range of float16"):
        mk.merge_adapters(group, "svd", rank=1)
    merged = mk.merge_adapters(group, "svd", rank=1, out_dtype="float32")
    assert error(matrix(merged, "layers.0.q"), weighted(group, [1, 1], "layers.0.q")) < 1e-6


@pytest.mark.parametrize("method", ["svd", "cat", "ties_svd", "iso_c"])
def test_overflow_on_the_way_names_the_module(method: str) -> None:
    options = {"density": 0.5} if "ties" in method else {}
    group = adapters(2, [SITES[0]], [2], alpha=1e10)
    with pytest.raises(DataError, match=r"layers\.0\.q"):
        mk.merge_adapters(group, method, weights=3e38, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_half_results_are_the_rounded_float32_result(dtype: torch.dtype) -> None:
    group = adapters(3, SITES, [2], dtype=dtype)
    merged = mk.merge_adapters(group, "svd", rank=3)
    wide = mk.merge_adapters(group, "svd", rank=3, out_dtype=torch.float64 if dtype is torch.float64 else "float32")
    for at in SITES:
        got, full = merged.modules[at.module][1], wide.modules[at.module][1]
        assert got.b.dtype == dtype
        assert torch.equal(got.b, full.b.to(dtype))
        assert torch.equal(got.a, full.a.to(dtype))
    bound = 1e-12 if dtype is torch.float64 else 1e-5
    assert error(matrix(wide, "embed"), best(weighted(group, [1] * 3, "embed"), 3)) < bound
    mixed = [group[0], adapters(1, SITES, [2], seed=9)[0]]
    assert mk.merge_adapters(mixed, "cat").dtype == "F32"


class _Counting:
    """Factors that are counted while somebody holds them."""

    live = 0
    peak = 0

    def __init__(self, b: torch.Tensor) -> None:
        self.b = b


def test_many_adapters_are_read_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 adapters whose ranks exceed the matrix: loaded one chunk at a time, summed densely."""
    from mergekernels._methods.adapters import sums
    from mergekernels.adapters import deltas

    monkeypatch.setattr(deltas, "_KEEP_BYTES", 0)
    monkeypatch.setattr(sums, "_CHUNK_RANK", 64)
    at = site("wide", 48, 40)
    held: dict[int, object] = {}
    peak = 0

    def make(t: int) -> Module:
        import weakref

        def load() -> tuple[torch.Tensor, torch.Tensor]:
            nonlocal peak
            g = torch.Generator().manual_seed(t)
            b, a = torch.randn(48, 16, generator=g), torch.randn(16, 40, generator=g)
            held[id(b)] = weakref.finalize(b, held.pop, id(b), None)
            peak = max(peak, len(held))
            return b, a

        return Module(at, 16, 16.0, 1.0, "F32", load)

    group = [adapter([make(t)], label=f"a{t}") for t in range(1000)]
    merged = mk.merge_adapters(group, "svd", weights=1e-3, rank=16)
    # a chunk of 64 columns is four adapters
    assert peak <= 6
    assert "16000" in merged.report.modules["wide"].route
    want = best(weighted(group, [1e-3] * 1000, "wide"), 16)
    assert error(matrix(merged, "wide"), want) < 1e-5


@pytest.mark.slow
def test_types_on_deltas_hold_few_dense_matrices() -> None:
    """Eight adapters on 2048 x 2048: PEFT's formula holds 40 dense matrices and more, a fifth would be eight."""
    code = """
import resource, sys
import torch
from adapter_cases import adapters, site
import mergekernels as mk
torch.set_num_threads(1)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
mk.merge_adapters(adapters(2, [site("small", 600, 600)], [16]), "ties_svd", density=0.3, rank=16)
group = adapters(8, [site("large", 2048, 2048)], [16])
before = peak()
mk.merge_adapters(group, "ties_svd", density=0.3, rank=16)
print((peak() - before) / (2048 * 2048 * 4 / 1024))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 8


def test_batches_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    from mergekernels.adapters import cutting

    many = [site(f"m{i}", 24, 16) for i in range(6)] + SITES
    group = adapters(3, many, [3])
    once = mk.merge_adapters(group, "svd", rank=4)
    monkeypatch.setattr(cutting, "_BATCH_BYTES", 1)
    single = mk.merge_adapters(group, "svd", rank=4)
    again = mk.merge_adapters(group, "svd", rank=4)
    for at in many:
        assert error(matrix(single, at.module), matrix(once, at.module)) < 1e-6
        assert torch.equal(single.modules[at.module][1].b, again.modules[at.module][1].b)


def test_saved_and_reloaded_is_the_same(tmp_path: Path) -> None:
    group = adapters(3, SITES, [2, 3], alpha=5.0, dtype=torch.bfloat16)
    group = [Adapter(a.label, a.modules, "org/base", config={"task_type": "CAUSAL_LM"}) for a in group]
    merged = mk.merge_adapters(group, "svd", energy=0.9, out=tmp_path / "out")
    again = mk.merge_adapters([tmp_path / "out"], "cat")
    for at in SITES:
        assert torch.equal(merged.delta(at.module), again.delta(at.module))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config == merged.config
    assert config["base_model_name_or_path"] == "org/base"
    assert config["task_type"] == "CAUSAL_LM"
    assert config["lora_alpha"] == config["r"]
    assert config["use_rslora"] is False
    from safetensors import safe_open

    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as file:
        assert set(file.keys()) == set(merged.state_dict)
        for key, tensor in merged.state_dict.items():
            assert torch.equal(file.get_tensor(key), tensor)
        told = json.loads(file.metadata()["mergekernels.modules"])
        assert file.metadata()["mergekernels.method"] == "svd"
    assert told["embed"]["kept_energy"] == merged.report.modules["embed"].kept_energy
    with pytest.raises(OutputError):
        merged.save(tmp_path / "out")
    merged.save(tmp_path / "out", overwrite=True)
    in_memory = mk.merge_adapters([merged], "cat")
    assert torch.equal(in_memory.delta("conv"), merged.delta("conv"))
    mapping = mk.merge_adapters(
        [(merged.state_dict, merged.config)], "cat", base={s.weight: s.weight_shape for s in SITES}
    )
    assert torch.equal(mapping.delta("conv"), merged.delta("conv"))


def test_kohya_files(tmp_path: Path) -> None:
    group = adapters(2, [SITES[0], SITES[3]], [2, 3], alpha=5.0)
    merged = mk.merge_adapters(group, "svd", rank=2)
    merged.save(tmp_path / "merged.safetensors", form="kohya")
    base = {s.weight: s.weight_shape for s in SITES}
    again = mk.merge_adapters([tmp_path / "merged.safetensors"], "cat", base=base)
    for name in merged.modules:
        assert torch.equal(again.delta(name), merged.delta(name))
    with pytest.raises(OutputError):
        merged.save(tmp_path / "merged.safetensors", form="kohya")
    with pytest.raises(ArgumentError, match="unknown form"):
        merged.save(tmp_path / "other", form="bin")  # type: ignore[arg-type]
    head = Adapter("head", group[0].modules, extras={"head.weight": lambda: torch.ones(3)})
    with pytest.raises(ArgumentError, match="holds no replaced tensors"):
        mk.merge_adapters([head], "cat").save(tmp_path / "head.safetensors", form="kohya")


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": 2.0}, "rank"),
        ({"rank": True}, "rank"),
        ({"energy": 0.0}, "energy"),
        ({"energy": 1.5}, "energy"),
        ({"energy": float("nan")}, "energy"),
        ({"rank": 2, "energy": 0.5}, "rank"),
        ({"spread": "c"}, "spread"),
        ({"out_dtype": "int8"}, "out_dtype"),
        ({"weights": [1.0]}, "parameter.count"),
        ({"weights": float("inf")}, "parameter.value"),
        ({"density": 0.5}, "parameter.unknown"),
        ({"dialect": "pet"}, "dialect.unknown"),
        ({"weights": [1.0, -1e39]}, "range"),
        ({"scale": 1e39}, "range"),
        ({"device": "abacus"}, "device"),
        ({"device": 1.5}, "device"),
    ],
)
def test_unusable_arguments(options: dict[str, object], code: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        mk.merge_adapters(adapters(2, SITES, [2]), "svd", **options)  # type: ignore[arg-type]
    assert caught.value.code == code


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there() -> None:
    with pytest.raises(BackendError, match="no GPU"):
        mk.merge_adapters(adapters(2, SITES, [2]), "svd", device="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", ["svd", "cat", "linear", "ties", "ties_svd", "dare_ties", "knots", "tsv_m"])
def test_a_gpu_gives_what_the_cpu_gives(method: str) -> None:
    group = adapters(3, SITES, [3])
    options = {"density": 0.4} if "ties" in method else {}
    here = mk.merge_adapters(group, method, rank=20, **options)
    there = mk.merge_adapters(group, method, rank=20, device="cuda", **options)
    for name, (_, factors) in there.modules.items():
        assert factors.b.device.type == "cpu"
        assert error(there.delta(name), here.delta(name)) < 1e-4


def test_unusable_inputs() -> None:
    with pytest.raises(ArgumentError, match="not a list"):
        mk.merge_adapters("folder", "svd")
    with pytest.raises(ArgumentError, match="adapter 0 is not an adapter"):
        mk.merge_adapters([3], "svd")  # type: ignore[list-item]
    with pytest.raises(ArgumentError, match="cannot merge this many"):
        mk.merge_adapters([], "svd")
    with pytest.raises(ArgumentError, match="Did you mean 'ties_svd'"):
        mk.merge_adapters(adapters(1, SITES, [2]), "tiessvd")
    with pytest.raises(MergeError, match="no such adapter"):
        mk.merge_adapters(["does/not/exist/anywhere"], "svd")
    merged = mk.merge_adapters(adapters(1, SITES, [2]), "cat")
    with pytest.raises(ArgumentError, match="Did you mean 'embed'"):
        merged.delta("embd")
