"""mergekit's integration on a package of its shape: recognition, eligibility, translation, activation. No mergekit."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import threading
import warnings
from enum import Enum
from pathlib import Path

import pytest
import torch

import mergekernels
import mergekernels.integrations.mergekit as fast
import mergekit_shape
from mergekernels.errors import ArgumentError, DataError, MergeError, ToolError
from mergekernels.integrations.mergekit import compute
from mergekernels.integrations.mergekit.options import options
from mergekernels.integrations.mergekit.translate import arithmetic

PTH = Path(mergekernels.__file__).resolve().parent.parent / "mergekernels_mergekit.pth"


class Kind(str, Enum):
    """As mergekit's: strings with a value."""

    sum = "sum"
    count = "count"
    magnitude = "magnitude"
    random = "random"
    magnitude_outliers = "magnitude_outliers"
    della_magprune = "della_magprune"


def forget():
    for name in [n for n in sys.modules if n.partition(".")[0] == "mergekit"]:
        del sys.modules[name]


@pytest.fixture
def shaped(tmp_path, monkeypatch):
    """Imports a mergekit of the shape asked for; everything is undone afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(generation="0.1.5", **signatures):
        forget()
        mergekit_shape.write(tmp_path, generation, **signatures)
        importlib.invalidate_caches()
        return importlib.import_module("mergekit.merge_methods")

    forget()
    fast.reset_stats()
    yield make
    fast.disable()
    fast.reset_stats()
    forget()


def group_of(package, tensors, base=None, name="layer.0"):
    """A group of inputs called 0, 1, ..., the base last."""
    entries = [package.TensorEntry(i, t) for i, t in enumerate(tensors)]
    if base is not None:
        entries.append(package.TensorEntry("base", base, is_base=True))
    return package.TensorGroup(tuple(entries), package.TensorMetadata(name=name))


def tensors(count=3, shape=(4, 8), dtype=torch.float32):
    """Deterministic, without equal magnitudes."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]


def method(package, name):
    return next(m for m in package.registered_methods() if m.spec.name == name)


def per_input(count, **values):
    return {name: dict.fromkeys(range(count), value) for name, value in values.items()}


def test_served_and_restored(shaped):
    package = shaped()
    base, *models = tensors(4)
    group = group_of(package, models, base)
    sce = method(package, "sce")
    original = sce.implementation
    fast.enable()
    got = sce.implementation(group, int8_mask=False, select_topk=0.5)
    assert torch.equal(got, mergekernels.merge(models, "sce", base=base, select_topk=0.5))
    assert fast.stats().served == {"sce": 1}
    fast.disable()
    assert sce.implementation is original
    assert torch.equal(sce.implementation(group), sum([*models, base]))


@pytest.mark.parametrize(
    ("consensus", "sparsification", "ours"),
    [
        (None, None, "task_arithmetic"),
        ("sum", "magnitude", "ties"),
        (None, "random", "dare_linear"),
        ("sum", "random", "dare_ties"),
        (None, "magnitude_outliers", "breadcrumbs"),
        ("sum", "magnitude_outliers", "breadcrumbs_ties"),
        (None, "della_magprune", "della_linear"),
        ("sum", "della_magprune", "della"),
    ],
)
def test_task_arithmetic_in_all_its_forms(shaped, consensus, sparsification, ours):
    package = shaped()
    base, *models = tensors(4, (16, 32))
    made = package.GeneralizedTaskArithmeticMerge(
        consensus and Kind(consensus), sparsification and Kind(sparsification), "named"
    )
    weights = [0.5, -0.25, 1.0]
    parameters = {
        "int8_mask": True,
        "normalize": True,
        "rescale": True,
        "lambda": 0.75,
        "weight": dict(enumerate(weights)),
        **per_input(3, density=0.5),
    }
    expected = {"normalize": True, "scale": 0.75}
    if sparsification is not None:
        expected |= {"density": 0.5, "rescale": True}
    if sparsification == "magnitude_outliers":
        parameters |= per_input(3, gamma=0.125)
        expected["gamma"] = 0.125
    if sparsification == "della_magprune":
        parameters |= per_input(3, epsilon=0.2)
        expected["epsilon"] = 0.2
    with fast.enabled(seed=11):
        got = made.merge_group(group_of(package, models, base), **parameters)
    seed = {"seed": 11} if sparsification in ("random", "della_magprune") else {}
    wanted = mergekernels.merge(models, ours, base=base, weights=weights, name="layer.0", **seed, **expected)
    assert torch.equal(got, wanted)
    assert fast.stats().served == {"named": 1}
    assert torch.equal(made.merge_group(group_of(package, models, base)), sum([*models, base]))


def test_a_vote_without_sparsifier_and_what_has_no_name(shaped):
    package = shaped()
    base, *models = tensors(3)
    group = group_of(package, models, base)
    parameters = {"int8_mask": False, "normalize": True, "rescale": False, "lambda": 1.0, **per_input(2, weight=1.0)}
    parameters |= per_input(2, density=0.25)  # without a sparsifier nobody reads it
    with fast.enabled():
        vote = package.GeneralizedTaskArithmeticMerge(Kind.sum, None, "vote")
        assert torch.equal(
            vote.merge_group(group, **parameters), mergekernels.merge(models, "ties", base=base, weights=1.0)
        )
        count = package.GeneralizedTaskArithmeticMerge(Kind.count, Kind.magnitude, "count")
        assert torch.equal(count.merge_group(group, **parameters), sum([*models, base]))
        trim = package.GeneralizedTaskArithmeticMerge(None, Kind.magnitude, "trim")
        assert torch.equal(trim.merge_group(group, **parameters), sum([*models, base]))
    reason = "a combination of consensus and sparsification that has no name in mergekit"
    assert fast.stats().served == {"vote": 1}
    assert fast.stats().passed_on == {"count": {reason: 1}, "trim": {reason: 1}}


def test_batches(shaped):
    package = shaped()
    a, b = tensors(2, (5, 4, 8))
    batch = package.TensorBatch((a, b), base_index=0)
    linear, slerp = (method(package, name) for name in ("linear", "slerp"))
    weights = torch.tensor([[0.25, 0.75], [1.0, 0.5], [2.0, 2.0], [0.0, 1.0], [-1.0, 2.0]])
    t = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    with fast.enabled():
        for normalize in (True, False):
            got = linear.implementation(batch, weights, normalize)
            same = linear.implementation(batch, weight=weights[:1].expand(5, 2), normalize=normalize)
            for g in range(5):
                pair = [a[g], b[g]]
                expected = mergekernels.merge(pair, "linear", weights=weights[g], normalize=normalize)
                assert torch.equal(got[g], expected)
                expected = mergekernels.merge(pair, "linear", weights=[0.25, 0.75], normalize=normalize)
                assert torch.equal(same[g], expected)
        got = slerp.implementation(batch, t)
        same = slerp.implementation(batch, t=torch.full((5,), 0.3))
        for g in range(5):
            assert torch.equal(got[g], mergekernels.merge([b[g]], "slerp", base=a[g], t=float(t[g])))
            assert torch.equal(same[g], mergekernels.merge([b[g]], "slerp", base=a[g], t=float(torch.tensor(0.3))))
        other = package.TensorBatch((b, a), base_index=1)
        assert torch.equal(slerp.implementation(other, t), got)
        empty = package.TensorBatch((a[:, :0], b[:, :0]), base_index=0)
        assert slerp.implementation(empty, t).shape == (5, 0, 8)
        # Only one angle for all would make these two outputs depend on each other.
        assert not torch.equal(got[2], mergekernels.merge([b], "slerp", base=a, t=0.5)[2])
    assert fast.stats().passed_on == {}


@pytest.mark.parametrize("name", ["arcee_fusion", "ramplus_tl", "ram", "nearswap"])
def test_sixteen_bits_where_mergekit_widens(shaped, name):
    package = shaped()
    base, model, other = tensors(3, (8, 16), torch.bfloat16)
    models = [model] if name in ("arcee_fusion", "nearswap") else [model, other]
    parameters = {"t": 0.5} if name == "nearswap" else {}
    with fast.enabled():
        got = method(package, name).implementation(group_of(package, models, base), **parameters)
    wide = name in ("arcee_fusion", "ramplus_tl")
    assert got.dtype is (torch.float32 if wide else torch.bfloat16)
    assert torch.equal(got, mergekernels.merge(models, name, base=base, out_dtype=got.dtype, **parameters))


def test_masks_by_seed_name_and_place(shaped):
    package = shaped()
    base, *models = tensors(3, (64, 64))
    dare = package.GeneralizedTaskArithmeticMerge(Kind.sum, Kind.random, "dare_ties")
    parameters = {"int8_mask": False, "normalize": False, "rescale": True, "lambda": 1.0}
    parameters |= per_input(2, weight=1.0, density=0.5)

    def merged(name):
        return dare.merge_group(group_of(package, models, base, name), **parameters)

    with fast.enabled():
        torch.manual_seed(3)
        first = merged("a")
        expected = mergekernels.merge(
            models, "dare_ties", base=base, weights=1.0, density=0.5, name="a", seed=3, normalize=False
        )
        assert torch.equal(first, expected)
        assert torch.equal(merged("a"), first)
        assert not torch.equal(merged("b"), first)
        before = torch.get_rng_state()
        assert torch.equal(before, torch.get_rng_state())
        # Without a name the seed comes from the generator: other masks each time, the same ones after the same seed.
        one, two = merged(None), merged(None)
        assert not torch.equal(one, two)
        torch.manual_seed(3)
        assert torch.equal(merged(None), one)
        torch.manual_seed(4)
        assert not torch.equal(merged("a"), first)
    with fast.enabled(seed=3):
        assert torch.equal(merged("a"), first)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.requires_grad_(), "a gradient is wanted"),
        (lambda t: t.as_subclass(type("Other", (torch.Tensor,), {})), "a tensor of another class than torch.Tensor"),
        (lambda t: t.to_sparse(), "a tensor that is not dense"),
        (lambda t: t.to(torch.float8_e4m3fn), "a dtype other than bfloat16, float16, float32 and float64"),
        (lambda t: t.to(torch.int32), "a dtype other than bfloat16, float16, float32 and float64"),
        (lambda t: t.to("meta"), "a device other than a CPU or a GPU"),
        (lambda t: t.double(), "tensors of different dtypes, shapes or devices"),
        (lambda t: t[:2], "tensors of different dtypes, shapes or devices"),
    ],
)
def test_tensors_that_are_passed_on(shaped, change, reason):
    package = shaped()
    base, a, b = tensors(3)
    seen = []
    sce = method(package, "sce")
    sce.implementation.__globals__["sum"] = lambda values: seen.append(list(values)) or "theirs"
    odd = change(b.clone())
    with fast.enabled():
        assert sce.implementation(group_of(package, [a, odd], base), select_topk=0.5) == "theirs"
    assert seen[0][1] is odd
    assert fast.stats().passed_on == {"sce": {reason: 1}}


def test_no_gradient_is_wanted_under_no_grad(shaped):
    package = shaped()
    base, *models = tensors(3)
    wanted = [m.clone().requires_grad_() for m in models]
    with fast.enabled(), torch.no_grad():
        got = method(package, "sce").implementation(group_of(package, wanted, torch.nn.Parameter(base)))
    assert not got.requires_grad
    assert torch.equal(got, mergekernels.merge(models, "sce", base=base))
    assert fast.stats().served == {"sce": 1}


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, when forward mode is first used
def test_forward_mode_is_passed_on(shaped):
    package = shaped()
    base, *models = tensors(3)
    with fast.enabled(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(models[0], torch.ones_like(base))
        got = method(package, "sce").implementation(group_of(package, [dual, models[1]], base))
        assert torch.autograd.forward_ad.unpack_dual(got).tangent is not None
    assert fast.stats().passed_on == {"sce": {"a forward-mode gradient is wanted": 1}}


@pytest.mark.parametrize(
    ("name", "parameters", "reason"),
    [
        ("karcher", {"max_iter": 0}, "mergekernels refuses the arguments (parameter.value)"),
        ("sce", {"select_topk": float("nan")}, "mergekernels refuses the arguments (parameter.value)"),
        ("nuslerp", {"weight": {0: 1.0}}, "a parameter is missing"),
        ("nearswap", {"t": 1.0}, "mergekernels refuses the arguments (models.count)"),
        ("multislerp", {"weight": {0: 1.0, 1: -1.0}}, "mergekernels refuses the arguments (parameter.combination)"),
    ],
)
def test_arguments_that_are_passed_on(shaped, name, parameters, reason):
    package = shaped()
    base, *models = tensors(3)
    group = group_of(package, models, base)
    with fast.enabled():
        got = method(package, name).implementation(group, **parameters)
    assert torch.equal(got, sum([*models, base]))
    assert fast.stats().passed_on == {name: {reason: 1}}


def test_calls_that_are_wrong_are_the_tools_to_refuse(shaped):
    package = shaped()
    base, *models = tensors(3)
    group = group_of(package, models, base)
    sce, nearswap = method(package, "sce"), method(package, "nearswap")
    with fast.enabled():
        for wrong in ({"surprise": 1}, {"int8_mask": True, "select_topk": 1.0, "more": 2}):
            with pytest.raises(TypeError, match="unexpected keyword"):
                sce.implementation(group, **wrong)
        with pytest.raises(TypeError, match="multiple values"):
            sce.implementation(group, False, int8_mask=True)
        with pytest.raises(TypeError, match="positional arguments"):
            sce.implementation(group, False, 0.5, 3)
        with pytest.raises(TypeError, match="missing"):
            nearswap.implementation(group)
        assert torch.equal(
            sce.implementation(group, False, 0.5), mergekernels.merge(models, "sce", base=base, select_topk=0.5)
        )
    assert fast.stats().passed_on == {
        "sce": {"other parameters than the method has": 4},
        "nearswap": {"a parameter is missing": 1},
    }


def test_one_tensor_alone(shaped):
    package = shaped()
    (only,) = tensors(1)
    for name in ("karcher", "multislerp", "passthrough", "sce"):
        parameters = {"weight": {0: 1.0}} if name == "multislerp" else {}
        group = group_of(package, [], only) if name == "sce" else group_of(package, [only])
        with fast.enabled():
            assert torch.equal(method(package, name).implementation(group, **parameters), only)
    assert set(map(str, fast.stats().passed_on.values())) == {"{'one tensor alone: nothing to compute': 1}"}


def test_densities_as_mergekit_reads_them():
    import types

    def densities(kind, *values):
        group = types.SimpleNamespace(
            base=types.SimpleNamespace(tensor=None),
            non_base=[types.SimpleNamespace(id=i, tensor=None) for i in range(len(values))],
            metadata=types.SimpleNamespace(name=None),
        )
        weight = dict.fromkeys(range(len(values)), 1.0)
        parameters = {"normalize": True, "rescale": False, "lambda": 1.0, "weight": weight}
        made = types.SimpleNamespace(consensus_method=Kind.sum, sparsification_method=kind)
        return arithmetic(made, group, parameters | {"density": dict(enumerate(values))}).arguments["density"]

    assert densities(Kind.magnitude, 1.5, -0.5, 0.25) == [1.0, 0.0, 0.25]
    assert densities(Kind.della_magprune, 1.5, -0.5, 0.25) == [1.0, 0.0, 0.25]
    assert densities(Kind.random, 1.5, -0.5, 0.25) == [1.0, -0.5, 0.25]  # what mergekit refuses stays refusable
    assert densities(Kind.magnitude_outliers, 1.5, -0.5, 0.25) == [1.0, -0.5, 0.25]


def test_nan_and_infinity(shaped):
    package = shaped()
    base, *models = tensors(3, (4, 8))
    models[0][1, 2] = float("nan")
    models[1][3, 4] = float("inf")
    group = group_of(package, models, base, "layers.7.w")
    with fast.enabled():
        got = method(package, "nuslerp").implementation(group, {0: 1.0, 1: 1.0}, nuslerp_flatten=False)
        wanted = mergekernels.merge(models, "nuslerp", base=base, weights=1.0, nuslerp_flatten=False, nan="propagate")
        assert torch.equal(torch.isnan(got), torch.isnan(wanted))
        assert torch.equal(got.nan_to_num(), wanted.nan_to_num())
        assert torch.isnan(got[1]).all()
        assert torch.isfinite(got[[0, 2]]).all()
    with fast.enabled(nan="error"), pytest.raises(DataError, match=r"tensor 'layers\.7\.w': .* holds NaN or Inf"):
        method(package, "sce").implementation(group)
    assert "sce" not in fast.stats().served


def test_our_own_error_is_no_fall_back(shaped, monkeypatch):
    package = shaped()
    base, *models = tensors(3)

    def broken(*args):
        raise RuntimeError("out of registers")

    monkeypatch.setattr(compute, "merge_one", broken)
    with fast.enabled(), pytest.raises(MergeError, match=r"tensor 'layer\.0': sce failed .*out of registers"):
        method(package, "sce").implementation(group_of(package, models, base))
    assert fast.stats().passed_on == fast.stats().served == {}


def test_inputs_are_borrowed(shaped):
    package = shaped()
    wide = tensors(3, (16, 32))
    base, *models = (t[::2, 1::3] for t in wide)
    before = [t.clone() for t in wide]
    with fast.enabled():
        got = method(package, "sce").implementation(group_of(package, models, base), select_topk=0.5)
    assert torch.equal(
        got, mergekernels.merge([m.contiguous() for m in models], "sce", base=base.contiguous(), select_topk=0.5)
    )
    assert all(map(torch.equal, wide, before))


def test_the_older_generation_is_refused(shaped):
    shaped("0.1.4")
    with pytest.raises(ToolError, match=r"mergekit was left untouched: this is the generation of version 0\.1\.4"):
        fast.enable()


@pytest.mark.parametrize(
    ("signatures", "said"),
    [
        ({"sce": "group, topk=1.0"}, r"sce takes \(group, topk\), not \(group, int8_mask, select_topk\)"),
        ({"ram": ""}, "the method ram has no implementation"),
        ({"karcher": "group, max_iter=10, tol=1e-5, robust=False"}, "karcher takes"),
    ],
)
def test_another_shape_is_refused_and_left_untouched(shaped, signatures, said):
    package = shaped(**signatures)
    before = [m.implementation for m in package.registered_methods()]
    with pytest.raises(ToolError, match=said):
        fast.enable()
    assert [m.implementation for m in package.registered_methods()] == before
    assert "merge_group" in vars(package.GeneralizedTaskArithmeticMerge)
    assert package.GeneralizedTaskArithmeticMerge.merge_group.__module__ == "mergekit.merge_methods"


def test_missing_fields_are_refused(shaped):
    package = shaped()
    package.TensorMetadata = int
    with pytest.raises(ToolError, match="TensorMetadata lacks name, vocabulary_axis"):
        fast.enable()


def test_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "mergekit", None)
    with pytest.raises((ToolError, ModuleNotFoundError)):
        fast.enable()


def test_somebody_elses_method_is_left_alone(shaped):
    package = shaped()
    base, *models = tensors(3)
    group = group_of(package, models, base)
    method(package, "sce").implementation = theirs = lambda *args, **kwargs: "theirs"
    with pytest.warns(RuntimeWarning, match="sce is computed by .*; mergekernels leaves it alone"):
        fast.enable()
    assert method(package, "sce").implementation is theirs
    assert method(package, "sce").implementation(group) == "theirs"
    method(package, "ram").implementation(group)
    assert fast.stats().served == {"ram": 1}


@pytest.mark.parametrize(
    ("given", "name"),
    [({"seed": -1}, "seed"), ({"nan": "ignore"}, "nan"), ({"backend": "tpu"}, "backend"), ({"threads": 0}, "threads")],
)
def test_options_are_checked_before_anything_happens(given, name):
    with pytest.raises(ArgumentError, match=name):
        fast.enable(**given)


def test_a_backend_that_cannot_is_passed_on(shaped):
    package = shaped()
    base, *models = tensors(3)
    with fast.enabled(backend="cuda"):
        got = method(package, "sce").implementation(group_of(package, models, base))
    assert torch.equal(got, sum([*models, base]))
    (reason,) = fast.stats().passed_on["sce"]
    assert reason.startswith("no backend for these tensors")


def test_threads_of_the_caller(shaped):
    """Two threads at once give what one gives."""
    package = shaped()
    base, *models = tensors(4, (64, 256))
    group = group_of(package, models, base)
    sce = method(package, "sce")
    results = {}

    def work(number):
        results[number] = [sce.implementation(group, select_topk=0.1 * (i % 9 + 1)) for i in range(18)]

    with fast.enabled():
        workers = [threading.Thread(target=work, args=(number,)) for number in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        work("alone")
    assert all(all(map(torch.equal, results[n], results["alone"])) for n in range(2))
    assert fast.stats().served == {"sce": 54}


def test_options_that_are_equal_are_equal():
    assert options(None, "propagate", None, None) == options(None, "propagate", None, None)
    assert options(1, "error", "cpu", 2) != options(1, "propagate", "cpu", 2)


def run(code, folder, variable=None, arguments=(), site=True):
    """A Python process that reads our .pth line as site-packages would."""
    start = f"import site; site.addsitedir({str(folder / 'site')!r})\n" if site else ""
    (folder / "site").mkdir(exist_ok=True)
    (folder / "site" / PTH.name).write_text(PTH.read_text())
    environment = {k: v for k, v in os.environ.items() if k != "MERGEKERNELS_MERGEKIT"}
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), str(PTH.parent)])
    if variable is not None:
        environment["MERGEKERNELS_MERGEKIT"] = variable
    command = [sys.executable, "-c", start + code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


HEAVY = "print(sorted(m for m in ('torch', 'numpy', 'mergekernels', 'mergekernels.merging') if m in sys.modules))"
STATE = "import mergekit.merge_methods as m; print(hasattr(m.registered_methods()[0].implementation, '__wrapped__'))"


def test_the_variable(tmp_path):
    mergekit_shape.write(tmp_path)
    done = run(f"import sys; {HEAVY}; {STATE}", tmp_path)
    assert (done.stdout, done.stderr) == ("[]\nFalse\n", "")
    for off in ("", "0"):
        done = run(STATE, tmp_path, off)
        assert (done.stdout, done.stderr) == ("False\n", "")
    done = run(f"import sys; {HEAVY}; {STATE}", tmp_path, "1")
    assert (done.stdout, done.stderr) == ("['mergekernels']\nTrue\n", "")
    done = run(STATE + "; print(m.__loader__, m.__spec__.loader is m.__loader__)", tmp_path, "report")
    assert "SourceFileLoader" in done.stdout
    assert done.stdout.endswith("True\n")
    assert done.stderr == "mergekernels: mergekit: 0 calls served by mergekernels, 0 by the tool itself\n"
    done = run(STATE, tmp_path, "yes please")
    assert done.stdout == "False\n"
    assert done.stderr.count("\n") == 1
    assert "expected 1, report or 0. Nothing is done." in done.stderr


def test_the_variable_fails_open(tmp_path):
    mergekit_shape.write(tmp_path, "0.1.4")
    done = run("import mergekit.merge_methods; print('runs')", tmp_path, "report")
    assert (done.returncode, done.stdout) == (0, "runs\n")
    assert done.stderr.count("\n") == 1
    assert "mergekit runs without mergekernels: mergekit was left untouched" in done.stderr


def test_without_mergekit_nothing_happens(tmp_path):
    done = run("print('runs')", tmp_path, "report")
    assert (done.returncode, done.stdout, done.stderr) == (0, "runs\n", "")


SCRIPT = "from mergekernels.integrations.mergekit.script import main; main()"


def test_the_script(tmp_path):
    mergekit_shape.write(tmp_path)
    done = run(SCRIPT, tmp_path, arguments=["recipe.yml", "out", "--cuda"], site=False)
    assert (done.returncode, done.stdout) == (0, "mergekernels-mergekit recipe.yml out --cuda\n")
    assert done.stderr == "mergekernels: mergekit: 0 calls served by mergekernels, 0 by the tool itself\n"
    done = run(SCRIPT, tmp_path, arguments=["recipe.yml", "out", "--quiet"], site=False)
    assert done.stderr == ""
    done = run(SCRIPT, tmp_path, arguments=["fail"], site=False)
    assert (done.returncode, done.stderr) == (3, "")


def test_the_script_refuses_what_it_does_not_know(tmp_path):
    mergekit_shape.write(tmp_path, "0.1.4")
    done = run(SCRIPT, tmp_path, arguments=["recipe.yml", "out"], site=False)
    assert done.returncode == ToolError.exit_code
    assert done.stdout == ""
    assert done.stderr.startswith("mergekernels-mergekit: mergekit was left untouched")


def test_no_warning_on_the_usual_way(shaped):
    shaped()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast.enable()
        fast.enable()
        fast.disable()
