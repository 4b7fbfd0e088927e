"""Run by test_fusionbench_hooks.py inside FusionBench's environment: its classes and functions beside ours."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import fusion_bench.method as their
import pytest
import torch
from fusion_bench.method.dare.ties_merging import DareTiesMerging
from fusion_bench.method.isotropic_merging import iso
from fusion_bench.method.regmean import regmean
from fusion_bench.method.task_singular_vector.utils import TSVM_utils
from fusion_bench.method.ties_merging import ties_merging as ties_module
from fusion_bench.modelpool import BaseModelPool
from fusion_bench.utils import instantiate
from hydra import compose, initialize_config_dir
from torch import nn

import mergekernels.integrations.fusionbench as ours
from mergekernels.errors import MergeError, ToolError
from mergekernels.integrations.fusionbench import functions

torch.set_num_threads(1)
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


class Net(nn.Module):
    """Square and oblong matrices, a convolution, an embedding, buffers of floats and integers."""

    def __init__(self, seed: int = 0, dtype: str = "float32", buffers: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed = nn.Embedding(20, 12)
        self.first = nn.Linear(12, 32)
        self.second = nn.Linear(32, 32, bias=False)
        self.conv = nn.Conv1d(4, 6, 3)
        if buffers:
            self.norm = nn.BatchNorm1d(32)
        self.head = nn.Linear(32, 10)
        for tensor in self.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
        generator.manual_seed(seed)
        for tensor in self.state_dict().values():
            if seed and tensor.is_floating_point():
                tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))
            elif seed:
                tensor.fill_(3 * seed)
        self.to(getattr(torch, dtype))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(self.embed(tokens))))))


def pool(count: int = 3, dtype: str = "float32", buffers: bool = False) -> BaseModelPool:
    """buffers : of BatchNorm; most of FusionBench's algorithms fail where counters of batches differ."""
    models = {f"model_{i}": Net(i, dtype, buffers) for i in range(1, count + 1)}
    return BaseModelPool({"_pretrained_": Net(0, dtype, buffers), **models})


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def run(kind: Any, models: BaseModelPool, **parameters: Any) -> dict[str, torch.Tensor]:
    """The merged tensors. The fine-tuned models must come out as they went in, unless the first is the result."""
    before = {n: state(models.load_model(n)) for n in models.model_names}
    result = kind(**parameters).run(models)
    if kind.__module__.startswith("mergekernels"):
        for name, tensors in before.items():
            model = models.load_model(name)
            assert model is result or all(torch.equal(tensors[k], v) for k, v in model.state_dict().items())
    return state(result)


def agree(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], bound: float) -> None:
    """bound : of the difference, relative to the norm of the tensor."""
    assert got.keys() == want.keys()
    for key, w in want.items():
        g = got[key]
        assert (g.dtype, g.shape) == (w.dtype, w.shape), key
        assert float((g.double() - w.double()).norm()) <= bound * float(w.double().norm()), key


@pytest.fixture(autouse=True)
def off(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(functions, "SMALLEST_SIDE", 2)
    ours.disable()
    ours.reset_stats()
    yield
    ours.disable()


LINEAR = [
    ("SimpleAverage", their.SimpleAverageAlgorithm, {}),
    ("SimpleAverage", their.SimpleAverageAlgorithm, {"inplace": False}),
    ("TaskArithmetic", their.TaskArithmeticAlgorithm, {"scaling_factor": 0.3}),
    ("TaskArithmetic", their.TaskArithmeticAlgorithm, {"scaling_factor": 1, "inplace": False}),
]
TIES = [
    ("TIES", their.TiesMergingAlgorithm, {"scaling_factor": 0.4, "threshold": k, "remove_keys": [], "merge_func": f})
    for k, f in itertools.product((0, 0.3, 20, 99.9), ("sum", "mean", "max", "dis-mean"))
]


@pytest.mark.parametrize(("name", "kind", "parameters"), [*LINEAR, *TIES])
def test_bits(name: str, kind: Any, parameters: dict[str, Any]) -> None:
    """Up to four models torch adds in our order, so float32 and float64 agree bit for bit."""
    for count, dtype in itertools.product((1, 2, 3), ("float32", "float64")):
        models = [pool(count, dtype, name in ("SimpleAverage", "TIES")) for _ in range(2)]
        agree(run(getattr(ours, name), models[0], **parameters), run(kind, models[1], **parameters), 0.0)


@pytest.mark.parametrize(("name", "kind", "parameters"), [LINEAR[0], LINEAR[2], *TIES[4:7]])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_are_rounded_once(name: str, kind: Any, parameters: dict[str, Any], dtype: str) -> None:
    """FusionBench computes in 16 bits; the same models as float32, rounded at the end, are what is wanted."""
    narrow = pool(3, dtype, name == "TIES")
    wide = BaseModelPool({n: deepcopy(m).float() for n, m in narrow._models.items()})
    got = run(getattr(ours, name), narrow, **parameters)
    want = run(kind, wide, **parameters)
    agree(got, {k: v.to(getattr(torch, dtype)) if v.is_floating_point() else v for k, v in want.items()}, 0.0)


def test_many_models() -> None:
    for name, kind, parameters in (LINEAR[0], LINEAR[2], TIES[9]):
        agree(run(getattr(ours, name), pool(7), **parameters), run(kind, pool(7), **parameters), 1e-6)


def test_ties_where_fusionbench_fails() -> None:
    everything = run(ours.TIES, pool(1), scaling_factor=1.0, threshold=1, remove_keys=[], merge_func="mean")
    agree(everything, state(Net(1)), 1e-6)
    with pytest.raises(RuntimeError):
        run(their.TiesMergingAlgorithm, pool(1), scaling_factor=1.0, threshold=1, remove_keys=[], merge_func="mean")
    options = {"scaling_factor": 1.0, "threshold": 20, "merge_func": "sum", "remove_keys": ["first.weight"]}
    got = run(ours.TIES, pool(2), **options)
    assert torch.equal(got["first.weight"], state(Net(0))["first.weight"])
    assert not torch.equal(got["second.weight"], state(Net(0))["second.weight"])


def test_a_plain_dict_of_models() -> None:
    models = {"_pretrained_": Net(0), "a": Net(1), "b": Net(2)}
    got = state(ours.TaskArithmetic(scaling_factor=0.5).run(models))
    agree(got, run(their.TaskArithmeticAlgorithm, pool(2), scaling_factor=0.5), 0.0)


SPECTRAL = [
    ("TSVM", their.TaskSingularVectorMerging, {"alpha": 1}),
    ("TSVM", their.TaskSingularVectorMerging, {"alpha": None}),
    ("TSVM", their.TaskSingularVectorMerging, {"alpha": [0.5, 1.0, 2.0], "exclude_keys": ["second.weight"]}),
    ("IsoC", their.ISO_C_Merge, {"scaling_factor": 0.7}),
    ("IsoC", their.ISO_C_Merge, {"scaling_factor": 1.0, "exclude_keys": ["embed.weight"]}),
    ("IsoCTS", their.ISO_CTS_Merge, {"scaling_factor": 0.7, "common_space_fraction": 0.8}),
    ("IsoCTS", their.ISO_CTS_Merge, {"scaling_factor": 1.0, "common_space_fraction": 0.4, "exclude_keys": ["x"]}),
    ("IsoCTS", their.ISO_CTS_Merge, {"scaling_factor": 1.0, "common_space_fraction": 1.0}),
]


@pytest.mark.parametrize(("name", "kind", "parameters"), SPECTRAL)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_spectral(name: str, kind: Any, parameters: dict[str, Any], dtype: str) -> None:
    # Full-rank task vectors with separated singular values: what LAPACK's float32 allows on both sides.
    bound = 2e-5 if dtype == "float32" else 1e-6
    agree(run(getattr(ours, name), pool(3, dtype), **parameters), run(kind, pool(3, dtype), **parameters), bound)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("TaskArithmetic", {"scaling_factor": 0.5}),
        ("TSVM", {"alpha": 0.5}),
        ("IsoC", {"scaling_factor": 0.5}),
        ("IsoCTS", {"scaling_factor": 0.5, "common_space_fraction": 0.8}),
    ],
)
def test_counters_where_fusionbench_fails(name: str, parameters: dict[str, Any]) -> None:
    """The counters are 0, 3 and 6; what is not a whole number is cut when it is loaded."""
    got = run(getattr(ours, name), pool(2, buffers=True), **parameters)
    whole = (3 + 6) * 0.5 / (1 if name == "TaskArithmetic" else 2)
    assert int(got["norm.num_batches_tracked"]) == int(whole)
    without = run(getattr(ours, name), pool(2), **parameters)
    assert torch.equal(got["embed.weight"], without["embed.weight"])


def test_single_task_models_are_fusionbenchs() -> None:
    options = {"alpha": 1, "return_single_task_models": True}
    got = ours.TSVM(**options).run(pool(3))
    want = their.TaskSingularVectorMerging(**options).run(pool(3))
    assert got.keys() == want.keys()
    for name in want:
        agree(state(got[name]), state(want[name]), 0.0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_opcm(dtype: str) -> None:
    from fusion_bench.method.opcm.opcm_general import OPCM as TheirOPCM

    options = {"alpha": 0.5, "shuffle_order": False, "save_on_every_step": False}
    got, want = (run(k, pool(3, dtype), **options) for k in (ours.OPCM, TheirOPCM))
    agree(got, want, 2e-5 if dtype == "float32" else 1e-9)
    shuffled = {**options, "shuffle_order": True, "seed": 5}
    agree(run(ours.OPCM, pool(3, dtype), **shuffled), run(TheirOPCM, pool(3, dtype), **shuffled), 2e-5)


def grams_of(model: nn.Module, modules: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    handles = [
        m.register_forward_hook(lambda _, x, __, n=n: found.__setitem__(n, x[0].flatten(0, -2).T @ x[0].flatten(0, -2)))
        for n, m in modules.items()
    ]
    model(torch.arange(400).reshape(20, 20) % 20)
    for h in handles:
        h.remove()
    return {n: g / 400 + 0.05 * torch.eye(len(g)) for n, g in found.items()}


class TheirRegMean(regmean.RegMeanAlgorithm):
    def get_regmean_weights(self, name: str, model: Any, train_dataset: Any, linear_modules_to_merge: Any) -> Any:
        return grams_of(model, linear_modules_to_merge)


class OurRegMean(ours.RegMean):
    def get_regmean_weights(self, name: str, model: Any, train_dataset: Any, linear_modules_to_merge: Any) -> Any:
        return grams_of(model, linear_modules_to_merge)


@pytest.mark.parametrize("ratio", [0.0, 0.6, 0.95])
def test_regmean(ratio: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BaseModelPool, "load_train_dataset", lambda *_: None)
    options = {
        "num_regmean_examples": 8,
        "exclude_param_names_regex": ["embed.*"],
        "reduce_non_diagonal_ratio": ratio,
        "weight_transpose": True,
    }
    got, want = (run(k, pool(3), **options) for k in (OurRegMean, TheirRegMean))
    # FusionBench inverts in float32 what is solved in float64 here.
    agree(got, want, 1e-4)
    assert torch.equal(got["embed.weight"], state(Net(0))["embed.weight"])


DARE = [
    ("DareTaskArithmetic", their.DareTaskArithmetic, {"scaling_factor": 0.5}),
    ("DareSimpleAverage", their.DareSimpleAverage, {}),
    ("DareTIES", DareTiesMerging, {"scaling_factor": 0.5, "threshold": 20, "remove_keys": [], "merge_func": "max"}),
    ("DareTIES", DareTiesMerging, {"scaling_factor": 0.5, "threshold": 20, "remove_keys": [], "merge_func": "mean"}),
]


@pytest.mark.parametrize(("name", "kind", "parameters"), DARE)
def test_dare_that_drops_nothing(name: str, kind: Any, parameters: dict[str, Any]) -> None:
    options = {"sparsity_ratio": 0.0, "only_on_linear_weights": False, "rescale": True, **parameters}
    agree(run(getattr(ours, name), pool(3), **options), run(kind, pool(3), **options), 1e-6)


@pytest.mark.parametrize("only", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
def test_dare_of_one_model(only: bool, rescale: bool) -> None:
    """An entry is the pretrained one, or that and the rescaled difference; the share is the asked one in both tools."""
    options = {"scaling_factor": 1.0, "sparsity_ratio": 0.75, "only_on_linear_weights": only, "rescale": rescale}
    base, tuned = state(Net(0, buffers=True)), state(Net(1, buffers=True))
    results = [
        run(ours.DareTaskArithmetic, pool(1, buffers=True), seed=3, **options),
        run(their.DareTaskArithmetic, pool(1, buffers=True), **options),
    ]
    for result in results:
        kept = total = 0
        for key, parameter in Net(0, buffers=True).named_parameters():
            masked = not only or key in ("first.weight", "second.weight", "head.weight")
            full = base[key] + (tuned[key] - base[key]) * (4.0 if rescale and masked else 1.0)
            near = (result[key] - full).abs() <= 1e-6 * (1 + full.abs())
            assert bool((near | (result[key] == base[key])).all()), key
            if masked:
                kept, total = kept + int(near.sum()), total + parameter.numel()
            else:
                assert bool(near.all()), key
        assert abs(kept / total - 0.25) < 5 * (0.25 * 0.75 / total) ** 0.5
        for key, buffer in Net(0, buffers=True).named_buffers():
            assert torch.equal(result[key], buffer)


def test_seeds_of_dare() -> None:
    options = {"scaling_factor": 1.0, "sparsity_ratio": 0.5, "only_on_linear_weights": False}
    one, same, other = (run(ours.DareTaskArithmetic, pool(2), seed=s, **options) for s in (1, 1, 2))
    agree(one, same, 0.0)
    assert not torch.equal(one["second.weight"], other["second.weight"])
    runs = []
    for _ in range(2):
        torch.manual_seed(7)
        runs.append(run(ours.DareTaskArithmetic, pool(2), **options))
    agree(*runs, 0.0)
    assert ours.DareTaskArithmetic(seed=4, **options).config.seed == 4
    ties = {**options, "threshold": 20, "remove_keys": [], "merge_func": "sum", "rescale": True}
    agree(run(ours.DareTIES, pool(2), seed=1, **ties), run(ours.DareTIES, pool(2), seed=1, **ties), 0.0)


def test_dare_ties_is_ties_of_masked_models() -> None:
    """With one model and a sum, what is kept is the largest fifth of what the masks left."""
    options = {"scaling_factor": 1.0, "sparsity_ratio": 0.5, "only_on_linear_weights": False, "rescale": False}
    got = run(ours.DareTIES, pool(1), seed=1, threshold=20, remove_keys=[], merge_func="sum", **options)
    base, tuned = state(Net(0)), state(Net(1))
    deltas = torch.cat([(tuned[k] - base[k]).flatten() for k in base])
    changed = torch.cat([(got[k] != base[k]).flatten() for k in base])
    count = int(len(deltas) * 0.2) + 1
    assert int(changed.sum()) == count
    assert float(deltas.abs()[changed].min()) > float(deltas.abs().quantile(0.55))


# Functions


def vectors(count: int, shape: tuple[int, ...], dtype: torch.dtype = F32, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        x = torch.randn(shape, generator=generator, dtype=F64)
        x = torch.where(torch.rand(shape, generator=generator) < 0.1, torch.zeros_like(x), x)
        found.append(torch.where(torch.rand(shape, generator=generator) < 0.1, torch.full_like(x, -0.75), x).to(dtype))
    return found


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
@pytest.mark.parametrize("n", [1, 2, 7, 5000])
def test_ties_merging(dtype: torch.dtype, n: int) -> None:
    cases = list(itertools.product((1, 2, 3, 6), (0, 0.01, 0.2, 20, 0.999), ("sum", "mean", "max", "dis-sum")))
    originals = [torch.stack(vectors(c, (n,), dtype)) for c, _, _ in cases]
    want = [ties_module.ties_merging(x.clone(), k, f) for x, (_, k, f) in zip(originals, cases, strict=True)]
    ours.enable()
    for x, (count, k, f), w in zip(originals, cases, want, strict=True):
        before = x.clone()
        got = ties_module.ties_merging(x, k, f)
        assert torch.equal(x, before)
        assert (got.dtype, got.shape) == (w.dtype, w.shape)
        unit = torch.finfo(dtype).eps
        # Beyond four models, and in 16 bits, torch rounds the sum differently.
        bound = 0.0 if count <= 4 and dtype in (F32, F64) else 4 * unit
        assert float((got.double() - w.double()).abs().max()) <= bound * float(w.abs().max())
    assert ours.stats().served == {"ties_merging": len(cases)}
    with pytest.raises(RuntimeError):  # FusionBench's own error
        ties_module.ties_merging(originals[0], 1, "sum")
    assert ours.stats().passed_on == {"ties_merging": {"a threshold that keeps everything or nothing": 1}}


def task_vectors(count: int, dtype: torch.dtype = F32) -> list[dict[str, torch.Tensor]]:
    shapes = {
        "square": (40, 40),
        "tall": (64, 24),
        "wide": (24, 64),
        "left_out": (16, 16),
        "bias": (40,),
        "conv": (4, 3, 3),
        "number": (),
    }
    columns = {k: vectors(count, s, dtype, i) for i, (k, s) in enumerate(shapes.items())}
    return [{k: v[t] for k, v in columns.items()} for t in range(count)]


FUNCTIONS = [
    ("compute_and_sum_svd_mem_reduction", TSVM_utils, {"exclude_keys": ["left_out"], "accelerator": "cpu"}),
    ("iso_c", iso, {"exclude_keys": ["left_out"], "accelerator": "cpu"}),
    ("iso_cts", iso, {"common_space_fraction": 0.8, "exclude_keys": ["left_out"], "accelerator": "cpu"}),
]


@pytest.mark.parametrize(("name", "module", "options"), FUNCTIONS)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_functions(name: str, module: Any, options: dict[str, Any], dtype: torch.dtype) -> None:
    for count in (1, 2, 3, 5):
        given = task_vectors(count, dtype)
        copies = [{k: v.clone() for k, v in g.items()} for g in given]
        want = getattr(module, name)(given, **options)
        ours.reset_stats()
        ours.enable()
        got = getattr(module, name)(given, **options)
        ours.disable()
        agree(got, want, 3e-5 if dtype == F32 else 1e-6)
        assert all(torch.equal(v, c[k]) for g, c in zip(given, copies, strict=True) for k, v in g.items())
        assert ours.stats().served == {name: 7}
        again = getattr(module, name)(given, **options)
        assert all(torch.equal(again[k], want[k]) for k in want)


@pytest.mark.parametrize(("name", "module", "options"), FUNCTIONS)
def test_low_rank_is_fusionbenchs(name: str, module: Any, options: dict[str, Any]) -> None:
    """There the tool adds directions that LAPACK makes up: the same come out with the hooks."""
    given = task_vectors(3)
    for g in given:
        g["tall"] = g["tall"][:, :2] @ g["tall"][:2]
    want = getattr(module, name)(given, **options)
    with ours.enabled():
        got = getattr(module, name)(given, **options)
    assert torch.equal(got["tall"], want["tall"])
    agree(got, want, 3e-5)
    assert ours.stats().passed_on == {name: {"task vectors of too low a rank": 1}}
    assert ours.stats().served == {name: 6}


@pytest.mark.parametrize(("name", "module", "options"), FUNCTIONS)
def test_small_matrices_are_fusionbenchs(
    name: str, module: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(functions, "SMALLEST_SIDE", 30)
    given = task_vectors(3)
    want = getattr(module, name)(given, **options)
    with ours.enabled():
        got = getattr(module, name)(given, **options)
    assert torch.equal(got["tall"], want["tall"]) and torch.equal(got["wide"], want["wide"])
    assert ours.stats().passed_on == {name: {"a matrix too small to gain": 2}}


def test_sixteen_bits_of_tsv_m() -> None:
    given = task_vectors(3, BF16)
    want = TSVM_utils.compute_and_sum_svd_mem_reduction(given, accelerator="cpu")
    with ours.enabled():
        got = TSVM_utils.compute_and_sum_svd_mem_reduction(given, accelerator="cpu")
    agree(got, want, 1e-2)  # FusionBench rounds every step of a mean to 16 bits


def test_single_task_models_of_the_function() -> None:
    given = task_vectors(2)
    want = TSVM_utils.compute_and_sum_svd_mem_reduction(given, None, "cpu", True)
    with ours.enabled():
        got = TSVM_utils.compute_and_sum_svd_mem_reduction(given, None, "cpu", True)
    assert all(torch.equal(got[0][k], want[0][k]) for k in want[0])
    assert ours.stats().passed_on == {"compute_and_sum_svd_mem_reduction": {"single-task models or no task vectors": 1}}


@pytest.mark.parametrize("transposed", [True, False])
def test_merging_with_regmean_weights(transposed: bool) -> None:
    side = 24
    generator = torch.Generator().manual_seed(0)
    shape = (40, side) if transposed else (side, 40)
    names = {"a.weight": shape, "b.weight": (side, side), "a.bias": (40,), "c.weight": (5, 6)}
    values = {k: vectors(3, s, seed=i) for i, (k, s) in enumerate(names.items())}
    inputs = [torch.randn(100, side, generator=generator) for _ in range(3)]
    grams = [{"a": x.T @ x / 100, "b": x.T @ x / 100} for x in inputs]
    want = regmean.merging_with_regmean_weights(values, grams, 0.9, transposed)
    with ours.enabled():
        got = regmean.merging_with_regmean_weights(values, grams, 0.9, transposed)
        singular = [{"a": torch.ones(side, side), "b": g["b"]} for g in grams]
        with pytest.raises(RuntimeError, match="singular"):  # of torch
            regmean.merging_with_regmean_weights(values, singular, 1.0, transposed)
    agree(got, want, 1e-5)
    name = "merging_with_regmean_weights"
    assert ours.stats().served == {name: 4}
    assert ours.stats().passed_on == {name: {"a sum of Grams that is singular": 1}}


def test_algorithms_with_the_functions_replaced() -> None:
    for _, kind, parameters in (TIES[9], *SPECTRAL[:1], *SPECTRAL[3:6:2]):
        want = run(kind, pool(3), **parameters)
        with ours.enabled():
            got = run(kind, pool(3), **parameters)
        agree(got, want, 2e-5)
        agree(run(kind, pool(3), **parameters), want, 0.0)
    assert ours.stats().served["ties_merging"] == 1
    for name in ("compute_and_sum_svd_mem_reduction", "iso_c", "iso_cts"):
        assert ours.stats().served[name] == len(state(Net(0)))
    assert not ours.stats().passed_on


def test_two_threads() -> None:
    cases = [task_vectors(3) for _ in range(4)]
    want = iso.iso_c(cases[0], accelerator="cpu")
    got: dict[int, Any] = {}
    with ours.enabled():
        workers = [
            threading.Thread(target=lambda i=i: got.__setitem__(i, iso.iso_c(cases[i], accelerator="cpu")))
            for i in range(2)
        ]
        for w in workers:
            w.start()
        for w in workers:
            w.join()
    for i in range(2):
        agree(got[i], want, 3e-5)
    assert ours.stats().served == {"iso_c": 14}


def test_not_finite_is_fusionbenchs() -> None:
    given = task_vectors(2)
    given[1]["square"][3, 3] = float("nan")
    with ours.enabled(), pytest.raises(Exception, match=r"[Ss][Vv][Dd]|converge|linalg"):
        iso.iso_c(given, accelerator="cpu")
    assert ours.stats().passed_on == {"iso_c": {"values that are not finite": 1}}


def test_an_error_names_the_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(functions, "matrix", broken)
    with ours.enabled(), pytest.raises(MergeError, match="out of luck") as caught:
        iso.iso_c(task_vectors(2), accelerator="cpu")
    assert caught.value.tensor == "square"


def test_another_version_is_left_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    before = iso.iso_c
    monkeypatch.setattr(iso, "iso_cts", lambda task_vectors, fraction: None)
    with pytest.raises(ToolError, match="left untouched: 'iso_cts'"):
        ours.enable()
    assert iso.iso_c is before
    monkeypatch.delattr(iso, "iso_cts")
    with pytest.raises(ToolError, match="no function 'iso_cts'"):
        ours.enable()


# Configurations


CONFIGS = sorted(p.stem for p in Path(ours.config_path(), "method", "mergekernels").glob("*.yaml"))


def composed(*overrides: str) -> Any:
    from fusion_bench.utils.hydra_utils import get_default_config_path

    search = "hydra.searchpath=[pkg://mergekernels.integrations.fusionbench.config]"
    with initialize_config_dir(version_base=None, config_dir=get_default_config_path()):
        return compose("fabric_model_fusion", overrides=[search, *overrides])


@pytest.mark.parametrize("name", CONFIGS)
def test_hydra_finds_the_configuration(name: str) -> None:
    config = composed(f"method=mergekernels/{name}").method
    algorithm = instantiate(config)
    assert type(algorithm).__module__.startswith("mergekernels.integrations.fusionbench.")
    for key, value in config.items():
        if key != "_target_":
            assert getattr(algorithm, key) == (
                value if value is not None or key != "exclude_keys" else getattr(algorithm, key)
            ), key


def test_every_class_has_a_configuration() -> None:
    texts = [Path(ours.config_path(), "method", "mergekernels", f"{n}.yaml").read_text() for n in CONFIGS]
    targets = {line.rpartition(".")[2] for t in texts for line in t.splitlines() if line.startswith("_target_")}
    assert targets == {n for n in ours.__all__ if n[0].isupper()} - {"RegMean"}


def test_a_configuration_of_fusionbench_with_another_target() -> None:
    target = "method._target_=mergekernels.integrations.fusionbench.TIES"
    config = composed("method=ties_merging", target, "method.threshold=30").method
    got = state(instantiate(config).run(pool(2)))
    agree(
        got,
        run(their.TiesMergingAlgorithm, pool(2), scaling_factor=0.3, threshold=30, remove_keys=[], merge_func="sum"),
        0.0,
    )


MODELPOOL = """
_target_: fusion_bench.modelpool.BaseModelPool
models:
  _pretrained_: {_target_: inside_fusionbench.Net, seed: 0}
  a: {_target_: inside_fusionbench.Net, seed: 1}
  b: {_target_: inside_fusionbench.Net, seed: 2}
"""


def test_the_command_line(tmp_path: Path) -> None:
    """`fusion_bench` itself, with models that it makes from its configuration."""
    pools = tmp_path / "modelpool"
    pools.mkdir()
    (pools / "tiny.yaml").write_text(MODELPOOL)
    search = f"hydra.searchpath=[pkg://mergekernels.integrations.fusionbench.config,file://{tmp_path}]"
    command = [
        str(Path(sys.executable).parent / "fusion_bench"),
        search,
        "method=mergekernels/ties",
        "modelpool=tiny",
        "taskpool=dummy",
        "path.root_dir=.",
        f"merged_model_save_path={tmp_path}/merged.pt",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "mergekernels.integrations.fusionbench.TIES" in done.stdout + done.stderr
