"""mergekit's integration on a package of its shape: what goes to the tool's own code, and why. No mergekit."""

from __future__ import annotations

import pytest
import torch

import mergekernels
import mergekernels.integrations.mergekit as fast
from mergekernels.errors import MergeError
from mergekernels.integrations.mergekit import compute
from mergekit_shape import group_of, imports, method, tensors


@pytest.fixture
def shaped(tmp_path, monkeypatch):
    """Imports a mergekit of the shape asked for."""
    yield from imports(tmp_path, monkeypatch)


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


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["arcee_fusion", "nearswap", "ram", "ramplus_tl", "sce"])
def test_methods_that_choose_entries_leave_what_is_not_finite_to_the_tool(shaped, name, value):
    package = shaped()
    base, *models = tensors(2 if name in ("arcee_fusion", "nearswap") else 3)
    models[-1][1, 2] = value
    parameters = {"t": 1.0} if name == "nearswap" else {}
    with fast.enabled():
        got = method(package, name).implementation(group_of(package, models, base), **parameters)
    assert torch.equal(got.nan_to_num(5.0), sum([*models, base]).nan_to_num(5.0))
    assert fast.stats().passed_on == {name: {"values that are not finite": 1}}


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


def test_our_own_error_is_no_fall_back(shaped, monkeypatch):
    package = shaped()
    base, *models = tensors(3)

    def broken(*args):
        raise RuntimeError("out of registers")

    fast.enable()
    monkeypatch.setattr(compute, "merge_one", broken)
    with pytest.raises(MergeError, match=r"tensor 'layer\.0': sce failed .*out of registers"):
        method(package, "sce").implementation(group_of(package, models, base))
    assert fast.stats().passed_on == fast.stats().served == {}


def test_a_backend_that_cannot_is_passed_on(shaped):
    package = shaped()
    base, *models = tensors(3)
    with fast.enabled(backend="cuda"):
        got = method(package, "sce").implementation(group_of(package, models, base))
    assert torch.equal(got, sum([*models, base]))
    (reason,) = fast.stats().passed_on["sce"]
    assert reason.startswith("no backend for these tensors")


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
