"""Recipes with `model+adapter`: task vectors made tile by tile, against models that were merged beforehand."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import engine_cases as cases
import lora_folders as adapters
import mergekernels.engine.generated as generated
from matrix_methods import Flat, plain_iso, registered
from mergekernels import _cpu
from mergekernels._methods import get, names
from mergekernels.errors import DataError, InputError, MergeError

MLPS = ("model.layers.0.mlp.weight", "model.layers.1.mlp.weight")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapters.save_family(tmp_path_factory.mktemp("family"))


def load(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def recipe(root: Path, method: str, models: list[object], **top: object) -> Path:
    path = root / f"r-{abs(hash((method, repr(models), repr(top))))}.yml"
    entries = [m if isinstance(m, dict) and "model" in m and "lora" not in m else {"model": m} for m in models]
    data = {"merge_method": method, "base_model": str(root / "base"), "models": entries, "dtype": "float32", **top}
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not None}))
    return path


def base_of() -> dict[str, torch.Tensor]:
    return cases.state_dicts(dtype=torch.float32)[0]


def deltas(seed: int) -> dict[str, torch.Tensor]:
    if seed == 1:
        return {f"{m}.weight": adapters.delta(m, seed=1) for m in adapters.MODULES}
    modules = (*adapters.MODULES, "model.embed_tokens")
    return {f"{m}.weight": adapters.delta(m, seed=2, rank=7, alpha=3.5) for m in modules}


def dense_models(root: Path) -> list[Path]:
    """Float64 checkpoints: base, and the base with each adapter, exact to 1e-16."""
    folder = root / "dense"
    if not folder.exists():
        wide = {n: t.double() if t.is_floating_point() else t for n, t in base_of().items()}
        cases.save(folder / "base", wide)
        for seed in (1, 2):
            cases.save(folder / f"tuned{seed}", wide | {n: wide[n] + d for n, d in deltas(seed).items()})
    return [folder / "base", folder / "tuned1", folder / "tuned2"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("isa", _cpu.isas())
def test_a_product_has_its_bits_in_any_piece(dtype: torch.dtype, isa: str) -> None:
    generator = torch.Generator().manual_seed(0)
    code = {torch.float32: 2, torch.float64: 3}[dtype]
    for m, n, r in ((7, 5, 0), (33, 70, 1), (40, 161, 9), (3, 300, 33)):
        b = torch.randn(m, r, generator=generator, dtype=dtype)
        a = torch.randn(r, n, generator=generator, dtype=dtype)
        exact = adapters.exact_product(b, a)

        def run(piece: tuple[int, int, int, int], out: torch.Tensor, add: bool) -> None:
            views = [(t.data_ptr(), code, -1, tuple(t.shape), tuple(t.stride())) for t in (b, a)]  # noqa: B023
            _cpu.product(*views, piece, (out.data_ptr(), code, -1, (out.numel(),), (1,)), add, isa)

        for g0, count in ((0, m * n), (1, m * n - 2), (n - 1, 3), (n // 2, n), (2 * n, n), (m * n - 1, 1)):
            out = torch.full((count,), 5.0, dtype=dtype)
            run((g0, 1, count, count), out, False)
            assert torch.equal(out, exact.flatten()[g0 : g0 + count])
            out = torch.full((count,), 0.3, dtype=dtype)
            run((g0, 1, count, count), out, True)
            assert torch.equal(out, 0.3 * torch.ones((), dtype=dtype) + exact.flatten()[g0 : g0 + count])
        out = torch.empty(3 * 4, dtype=dtype)
        run((n * 0 + 1, 3, 4, n), out, False)
        assert torch.equal(out.view(3, 4), exact[:3, 1:5])
        # A box of another matrix form of the same elements.
        length = m * n // 2
        out = torch.empty(2 * 3, dtype=dtype)
        run((1, 2, 3, length), out, False)
        flat = exact.flatten()
        assert torch.equal(out, torch.cat([flat[1:4], flat[length + 1 : length + 4]]))
    with pytest.raises(ValueError, match="outside"):
        run((m * n - 1, 1, 2, 2), torch.empty(2, dtype=dtype), False)


SKIP = {
    "fisher": "needs importances",
    "passthrough": "one model, tested below",
    "slerp": "two models, tested below",
    "nearswap": "one model, tested below",
    "expo": "one model, tested below",
    "arcee_fusion": "one model, tested below",
}
PARAMETERS: dict[str, dict[str, object]] = {
    "ties": {"density": 0.4, "tie_policy": "index"},
    "della": {"density": 0.6, "epsilon": 0.2},
    "della_linear": {"density": 0.6, "epsilon": 0.2},
    "dare_linear": {"density": 0.6},
    "dare_ties": {"density": 0.6},
    "breadcrumbs": {"density": 0.6, "gamma": 0.1},
    "breadcrumbs_ties": {"density": 0.6, "gamma": 0.1},
    "sce": {"select_topk": 0.5},
    "from_norm": {"k": 1.0},
}
ONE = {"nearswap": {"t": 0.001}, "expo": {"extrapolation_factor": 0.5}, "arcee_fusion": {}, "passthrough": {}}


def merge(root: Path, out: Path, method: str, models: list[object], **top: object) -> dict[str, torch.Tensor]:
    cases.run_of(recipe(root, method, models, **top), out)
    return load(out)


QUICK = ("linear", "ties", "dare_ties", "sce", "multislerp", "from_norm")
"""One of each kind of pass; the others run with the slow tests."""


@pytest.mark.parametrize(
    "method",
    [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in names() if n not in SKIP],
)
def test_equals_merged_models(root: Path, tmp_path: Path, method: str) -> None:
    """Against float64 checkpoints with the deltas folded in: a task vector is exact, not rounded to the base."""
    info = get(method).info
    params = {"weight": 0.7} | PARAMETERS.get(method, {})
    params = {k: v for k, v in params.items() if any(p.name == k for p in info.params)}
    made = merge(root, tmp_path / "made", method, [f"{root}/base+{root}/lora1", f"{root}/base+{root}/lora2"],
                 parameters=params, out_dtype="float64")  # fmt: skip
    base, *tuned = dense_models(root)
    wanted = merge(root, tmp_path / "wanted", method, [str(t) for t in tuned], parameters=params, dtype=None,
                   base_model=str(base))  # fmt: skip
    assert set(made) == set(wanted)
    by_deltas = info.modifiable
    for name, value in wanted.items():
        if not value.is_floating_point() or not value.numel():
            assert torch.equal(made[name], value)
            continue
        error = (made[name].double() - value).abs()
        if name in MLPS and method not in ("linear",):
            assert (value - base_of()[name].double()).norm() > 0.0, "the task vectors do nothing here"
        # Elements that a rule keeps or drops by a hair may differ: few, and none where nothing is selected.
        bound = 2.0**-22 * float(value.abs().max()) + (2e-6 if by_deltas else 1e-5) * float(value.abs().max())
        assert float((error > bound).double().mean()) < 2e-3, (name, float(error.max()), bound)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "magmax"])
def test_task_vectors_are_exact(root: Path, tmp_path: Path, method: str) -> None:
    """On a large base the product keeps its own accuracy: what is added is right to an ulp of the result."""
    base = base_of()
    huge = {n: t * 1e4 if t.is_floating_point() else t for n, t in base.items()}
    folder = tmp_path / "huge"
    cases.save(folder / "base", huge)
    models = [f"{folder}/base+{root}/lora1", f"{folder}/base+{root}/lora2"]
    params = {"task_arithmetic": {"weight": 1.0}, "ties": {"weight": 1.0, "density": 1.0}, "magmax": {"lambda": 1.0}}[
        method
    ]
    path = recipe(root, method, models, base_model=str(folder / "base"), parameters=params)
    cases.run_of(path, tmp_path / "out")
    merged = load(tmp_path / "out")
    one, two = deltas(1), deltas(2)
    for name in MLPS:
        d1, d2 = one[name], two[name]
        if method == "task_arithmetic":
            d = d1 + d2
        elif method == "magmax":
            d = torch.where(d1.abs() > d2.abs(), d1, d2)
        else:
            sign = torch.sign(d1 + d2)
            agree = [(torch.sign(x) == sign).double() for x in (d1, d2)]
            d = (d1 * agree[0] + d2 * agree[1]) / (agree[0] + agree[1]).clamp(min=1)
        wanted = huge[name].double() + d
        assert (
            torch.equal(merged[name], wanted.float())
            or (
                (merged[name].double() - wanted).abs() <= 0.51 * torch.finfo(torch.float32).eps * wanted.abs() * 2
            ).all()
        )


def test_bits_do_not_depend_on_tiles_threads_or_memory(root: Path, tmp_path: Path) -> None:
    models = [f"{root}/base+{root}/lora1", f"{root}/tuned1", f"{root}/tuned2+{root}/lora2"]
    for method, params in (("ties", {"weight": 1.0, "density": 0.3}), ("dare_ties", {"weight": 1.0, "density": 0.5})):
        path = recipe(root, method, models, parameters=params, out_dtype="bfloat16")
        digests = set()
        for i, (threads, tile, memory) in enumerate(((1, 4096, "40MB"), (2, None, None), (3, 8192, "90MB"))):
            report = cases.run_of(path, tmp_path / f"{method}{i}", threads=threads, tile=tile, memory=memory)
            digests.add(report.checkpoint_sha256)
            assert report.peak_tensor_memory <= report.memory
        digests.add(cases.run_of(path, tmp_path / f"{method}r", backend="reference").checkpoint_sha256)
        assert len(digests) == 1


def test_mixed_with_full_models(root: Path, tmp_path: Path) -> None:
    models = [f"{root}/base+{root}/lora1", f"{root}/tuned1", f"{root}/tuned2+{root}/lora2"]
    merged = merge(root, tmp_path / "out", "task_arithmetic", models, parameters={"weight": 0.5})
    base, one, two, _ = cases.state_dicts(dtype=torch.float32)
    for name, value in merged.items():
        if not value.is_floating_point():
            continue
        d = (one[name].double() - base[name]) + (two[name].double() - base[name])
        d = d + deltas(1).get(name, 0.0) + deltas(2).get(name, 0.0)
        wanted = base[name].double() + 0.5 * d
        assert torch.allclose(value.double(), wanted, rtol=2e-7, atol=1e-9), name


def test_one_model_methods(root: Path, tmp_path: Path) -> None:
    base, tuned = dense_models(root)[:2]
    for method, params in ONE.items():
        top = {"parameters": params, "base_model": str(root / "base")}
        if method == "passthrough":
            top["base_model"] = None
        made = merge(root, tmp_path / method, method, [f"{root}/base+{root}/lora1"], **top)
        top["base_model"] = None if method == "passthrough" else str(base)
        wanted = merge(root, tmp_path / f"{method}-w", method, [str(tuned)], dtype=None, **top)
        for name in MLPS:
            same = torch.isclose(made[name].double(), wanted[name], rtol=1e-6, atol=1e-9)
            # arcee_fusion keeps what is above a quantile of float32 values: some elements fall on the other side.
            assert float(same.double().mean()) > (0.99 if method == "arcee_fusion" else 0.999), (method, name)
            assert not torch.equal(made[name], base_of()[name])


def test_slerp_reads_adapted_base_and_model(root: Path, tmp_path: Path) -> None:
    base = dense_models(root)
    made = merge(root, tmp_path / "made", "slerp", [f"{root}/base+{root}/lora1"], parameters={"t": 0.3},
                 base_model=f"{root}/base+{root}/lora2")  # fmt: skip
    wanted = merge(root, tmp_path / "wanted", "slerp", [str(base[1])], parameters={"t": 0.3}, dtype=None,
                   base_model=str(base[2]))  # fmt: skip
    for name, value in wanted.items():
        if value.is_floating_point():
            assert torch.allclose(made[name].double(), value, rtol=2e-6, atol=1e-8), name


def test_orientations_embeddings_and_saved_modules(root: Path, tmp_path: Path) -> None:
    head = torch.randn(64, generator=torch.Generator().manual_seed(5))
    adapters.save_adapter(
        tmp_path / "lora",
        seed=2,
        rank=7,
        alpha=3.5,
        modules=("model.layers.0.mlp", "model.embed_tokens"),
        dtype=torch.bfloat16,
        extras={"model.norm.weight": head},
    )
    merged = merge(root, tmp_path / "out", "task_arithmetic", [f"{root}/base+{tmp_path}/lora"],
                   parameters={"weight": 1.0}, tokenizer_source="base")  # fmt: skip
    base = base_of()
    for module in ("model.layers.0.mlp", "model.embed_tokens"):
        name = f"{module}.weight"
        d = adapters.delta(module, seed=2, rank=7, alpha=3.5, dtype=torch.bfloat16)
        assert torch.allclose(merged[name].double(), base[name].double() + d, rtol=2e-7, atol=1e-9)
    assert torch.allclose(merged["model.norm.weight"], head, rtol=1e-6)
    assert torch.equal(merged["model.layers.1.mlp.weight"], base["model.layers.1.mlp.weight"])


def test_resumes_after_an_error(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = recipe(
        root, "ties", [f"{root}/base+{root}/lora1", f"{root}/tuned1"], parameters={"weight": 1, "density": 0.5}
    )
    cases.run_of(path, tmp_path / "whole", threads=1)
    add = generated.Generated._add
    calls: list[int] = []

    def failing(self: generated.Generated, source: int, *rest: object, **options: bool) -> None:
        calls.append(source)
        if len(calls) == 30:
            # Files are committed beside the work: the first must have its receipt, or there is nothing to resume.
            limit = time.monotonic() + 60
            while not any(tmp_path.glob("out.mk-*/receipts/*")) and time.monotonic() < limit:
                time.sleep(0.01)
            raise MergeError("stopped")
        add(self, source, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(generated.Generated, "_add", failing)
    with pytest.raises(MergeError, match="stopped"):
        cases.run_of(path, tmp_path / "out", threads=1, tile=4096)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(generated.Generated, "_add", add)
    report = cases.run_of(path, tmp_path / "out", threads=2)
    assert report.resumed_units > 0
    assert cases.published(tmp_path / "out") == cases.published(tmp_path / "whole")


def test_matrices_get_factors(root: Path, tmp_path: Path) -> None:
    method = Flat()
    with registered(method):
        models = [f"{root}/base+{root}/lora1", f"{root}/base+{root}/lora2", f"{root}/tuned1"]
        merged = merge(root, tmp_path / "out", "test_flat", models, parameters={"weight": 0.5})
    seen = dict(method.seen)
    assert seen["model.layers.0.mlp.weight"] == ["Factors", "Factors", "Tensor"]
    base, tuned = cases.state_dicts(dtype=torch.float32)[:2]
    for name in (*MLPS, "model.embed_tokens.weight"):
        total = (tuned[name].double() - base[name]) + deltas(1).get(name, 0.0) + deltas(2).get(name, 0.0)
        wanted = base[name].double() + plain_iso(0.5 * total)
        error = (merged[name].double() - wanted).norm()
        assert error <= 1e-6 * (wanted - base[name]).norm() + 2.0**-24 * wanted.norm(), name


def test_memory_of_a_low_rank_matrix_is_that_of_its_factors(root: Path, tmp_path: Path) -> None:
    with registered(Flat()):
        made = cases.plan_of(recipe(root, "test_flat", [f"{root}/base+{root}/lora1"] * 1), tmp_path / "o")
        dense = cases.plan_of(recipe(root, "test_flat", [f"{root}/tuned1"]), tmp_path / "o")
    assert made.survey.floor < dense.survey.floor
    # Nothing of the model under the adapter is read beside the base.
    adapted = sum(made.merge.inputs[0].tensors[n].nbytes for n in MLPS)
    assert made.bytes_in <= dense.bytes_in - adapted


def test_the_plan_knows_adapter_and_scale(root: Path, tmp_path: Path) -> None:
    adapters.save_adapter(tmp_path / "lora", seed=1)
    path = recipe(root, "task_arithmetic", [f"{root}/base+{tmp_path}/lora"], parameters={"weight": 1.0})
    first = cases.plan_of(path, tmp_path / "out")
    config = tmp_path / "lora" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8.0', '"lora_alpha": 16.0'))
    assert cases.plan_of(path, tmp_path / "out").hash != first.hash
    report = cases.run_of(path, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "merge_manifest.json").read_text())
    entry = next(i for i in manifest["inputs"] if "adapter" in i)
    assert entry["label"] == f"{root}/base+{tmp_path}/lora"
    assert entry["adapter"]["path"] == str(tmp_path / "lora")
    assert entry["adapter"]["modules"]["model.layers.0.mlp.weight"] == [4, 4.0, "linear"]
    assert [f["name"] for f in entry["files"]][-1] == "adapter_model.safetensors"
    assert report.warnings == ()
    for inside in ("lora", "lora/out"):
        with pytest.raises(MergeError, match="touch an input"):
            cases.plan_of(path, tmp_path / inside)


def test_references(root: Path, tmp_path: Path) -> None:
    wanted = merge(root, tmp_path / "a", "task_arithmetic", [f"{root}/base+{root}/lora1"], parameters={"weight": 1.0})
    for i, model in enumerate((
        {"model": {"model": {"path": f"{root}/base"}, "lora": f"{root}/lora1"}},
        {"model": {"path": f"{root}/base", "lora": {"path": f"{root}/lora1"}}},
    )):  # fmt: skip
        merged = merge(root, tmp_path / f"b{i}", "task_arithmetic", [model], parameters={"weight": 1.0})
        assert all(torch.equal(merged[n], wanted[n]) for n in wanted)

    def problem(model: object) -> str:
        with pytest.raises(MergeError) as caught:
            cases.plan_of(recipe(root, "linear", [model], base_model=None, parameters={"weight": 1}), tmp_path / "x")
        return str(caught.value)

    assert "adapter" in problem(f"{root}/base+{root}/nothing")
    assert "does not exist" in problem(f"{root}/base+{root}/nothing")
    assert "model+adapter" in problem(f"{root}/base+{root}/lora1+{root}/lora2")
    assert "listed twice" in _twice(root, tmp_path)
    text = problem({"model": {"path": f"{root}/base+{root}/lora1"}})
    assert "does not exist" in text


def _twice(root: Path, tmp_path: Path) -> str:
    models: list[object] = [f"{root}/base+{root}/lora1", f"{root}/base+{root}/lora1"]
    with pytest.raises(MergeError) as caught:
        cases.plan_of(recipe(root, "linear", models, base_model=None, parameters={"weight": 1}), tmp_path / "x")
    return str(caught.value)


def test_bad_adapters_are_refused_with_lines(root: Path, tmp_path: Path) -> None:
    adapters.save_adapter(tmp_path / "dora", use_dora=True)
    adapters.save_adapter(tmp_path / "nan")
    tensors = load_file(tmp_path / "nan" / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "nan" / "adapter_model.safetensors")
    path = tmp_path / "r.yml"
    path.write_text(
        f"merge_method: task_arithmetic\nbase_model: {root}/base\nmodels:\n"
        f"- model: {root}/base+{tmp_path}/dora\n  parameters: {{weight: 1}}\n"
    )
    with pytest.raises(MergeError, match="use_dora") as caught:
        cases.plan_of(path, tmp_path / "out")
    assert "Named on line 4 of the recipe" in str(caught.value)
    with pytest.raises(DataError, match="factor A of an adapter holds NaN"):
        merge(root, tmp_path / "out", "task_arithmetic", [f"{root}/base+{tmp_path}/nan"], parameters={"weight": 1})
    from mergekernels.engine.masks import compress

    adapted = recipe(root, "tall_mask", [f"{root}/base+{root}/lora1", f"{root}/tuned1"], parameters={})
    with pytest.raises(MergeError, match="masks are made of full models"):
        compress(adapted, tmp_path / "masks")


def test_verify_with_adapters(root: Path, tmp_path: Path) -> None:
    from mergekernels.engine.verify import verify

    merge(root, tmp_path / "out", "task_arithmetic", [f"{root}/base+{root}/lora1"], parameters={"weight": 1})
    assert verify(tmp_path / "out").ok
    with pytest.raises(InputError, match="adapters"):
        verify(tmp_path / "out", recompute=1)


def test_a_changed_adapter_ends_the_run(root: Path, tmp_path: Path) -> None:
    adapters.save_adapter(tmp_path / "lora", seed=1)
    plan = cases.plan_of(
        recipe(root, "task_arithmetic", [f"{root}/base+{tmp_path}/lora"], parameters={"weight": 1}), tmp_path / "out"
    )
    file = tmp_path / "lora" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes())
    from mergekernels.engine.driver import execute

    with pytest.raises(InputError, match="changed"):
        execute(plan, overwrite=False, progress=None, io=cases.FaultyIo(-1, 0), start=0.0)
    assert not (tmp_path / "out").exists()
