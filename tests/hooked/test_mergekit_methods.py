"""mergekit's methods, hooked and unhooked in one process: results, dtypes, shapes, borrowed inputs, fall-backs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from mergekit_cases import (
    CASES,
    RANDOM,
    Case,
    arguments,
    arithmetic,
    at_a_cut,
    both,
    distance,
    inputs,
    is_random,
)

import mergekernels.integrations.mergekit as fast

pytestmark = pytest.mark.peer
NAMES = [case.name for case in CASES]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def mk() -> Any:
    return pytest.importorskip("mergekit.merge_methods", reason="needs mergekit 0.1.5 in this environment")


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    fast.reset_stats()
    yield
    fast.disable()


def test_all_twenty_are_here(mk: Any) -> None:
    assert {case.method for case in CASES} == {m.spec.name for m in mk.registered_methods()}
    assert len(mk.registered_methods()) == 20


@pytest.mark.parametrize("case", [c for c in CASES if not is_random(c)], ids=lambda c: c.name)
def test_float32_and_float64(mk: Any, case: Case) -> None:
    for shape in ((48, 65), (16, 3, 5, 7), (300,)):
        for dtype in (torch.float32, torch.float64):
            ours, theirs = both(mk, case, inputs(case, shape, dtype))
            bound = case.bound
            # karcher stops at tol, and the factors of ramplus_tl are float32 in mergekit whatever the inputs are.
            if dtype is torch.float64 and case.method not in ("karcher", "ramplus_tl"):
                bound *= 1e-3
            if case.method == "arcee_fusion":
                # The divergence of a row is a difference of nearly equal numbers: in float32 its rounding decides about
                # a few elements at the threshold.
                assert (ours != theirs).float().mean() < (0.05 if dtype is torch.float32 else 1e-9)
            else:
                assert distance(ours, theirs) <= bound, (shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if not is_random(c)], ids=lambda c: c.name)
def test_sixteen_bits_are_float32_rounded_once(mk: Any, case: Case, dtype: torch.dtype) -> None:
    """Compared with mergekit computing in float32 on the same inputs."""
    tensors = inputs(case, (48, 65), dtype)
    with fast.enabled():
        ours = mk.merge_tensors(tensors, case.method, **arguments(case))
    wide = mk.merge_tensors([t.float() for t in tensors], case.method, **arguments(case)).to(ours.dtype)
    free = torch.zeros(wide.shape, dtype=torch.bool)
    if case.method in ("ties", "breadcrumbs", "breadcrumbs_ties", "sce"):
        free = at_a_cut(case, tensors)
    if case.method == "sce" and "select_topk" in case.parameters:
        free |= ours != wide  # variances tie in 16 bits; test_float32_and_float64 has the exact comparison
        assert free.float().mean() < 0.05
    differ = (ours != wide) & ~free
    if case.method == "arcee_fusion":
        assert differ.float().mean() < 0.05
        return
    if ours.dtype == torch.float32:
        assert distance(ours, wide) <= case.bound
        return
    step = 2.0**-8 if dtype is torch.bfloat16 else 2.0**-11
    assert differ.float().mean() <= 0.01
    error = (ours.double() - wide.double()).abs()[differ]
    assert bool((error <= 2.01 * step * wide.double().abs()[differ] + 1e-6).all())


def recorded_masks(mk: Any, case: Case, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """What we keep of each model, seen from outside: the model alone moves the base, without rescaling."""
    base, *models = tensors
    linear = {"dare_ties": "dare_linear", "della": "della_linear"}.get(case.method, case.method)
    masks = []
    for t, model in enumerate(models):
        alone = [base, *(model if i == t else base for i in range(len(models)))]
        parameters = {**case.parameters, "rescale": False, "normalize": False, "lambda": 1.0, "weight": 1.0}
        with fast.enabled(seed=1):
            moved = mk.merge_tensors(alone, linear, **arguments(case, parameters=parameters))
        masks.append(moved != base)
    return masks


@pytest.mark.parametrize("case", [c for c in CASES if is_random(c)], ids=lambda c: c.name)
def test_random_masks_and_their_arithmetic(mk: Any, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """mergekit, made to draw our masks, gives our result."""
    tensors = inputs(case, (96, 130))
    masks = recorded_masks(mk, case, tensors)
    density = case.parameters["density"]
    for mask in masks:
        spread = 5 * (density * (1 - density) / mask.numel()) ** 0.5
        assert abs(mask.float().mean().item() - density) < spread + 1e-3
    if case.method.startswith("della"):  # large entries are kept more often, by about 2 epsilon from end to end
        ranks = (tensors[1] - tensors[0]).abs().argsort(dim=1).argsort(dim=1)
        top, bottom = masks[0][ranks >= 104].float().mean(), masks[0][ranks < 26].float().mean()
        assert 0.2 < float(top - bottom) < 0.44
    drawn = iter(masks)
    monkeypatch.setattr(torch, "bernoulli", lambda probabilities: next(drawn).to(probabilities.dtype))
    ours, theirs = both(mk, case, tensors)
    assert next(drawn, None) is None
    assert distance(ours, theirs) <= 1e-5  # mergekit's L1 norms are float32 sums


@pytest.mark.parametrize("method", RANDOM)
def test_masks_depend_on_seed_name_and_place_alone(mk: Any, method: str) -> None:
    case = arithmetic(method, density=0.4)
    tensors = inputs(case, (64, 64))

    def run(**more: Any) -> torch.Tensor:
        return mk.merge_tensors(tensors, method, **arguments(case, **more))

    with fast.enabled():
        torch.manual_seed(5)
        first = run()
        assert torch.equal(run(), first)
        assert not torch.equal(run(name="layers.1.w"), first)
        one, two = run(name=None), run(name=None)
        assert not torch.equal(one, two)
        torch.manual_seed(5)
        assert torch.equal(run(name=None), one)
        torch.manual_seed(6)
        assert not torch.equal(run(), first)


SHAPES = [(), (0,), (1,), (3, 0), (1, 1), (5, 1), (1, 7), (2, 3), (17,), (3, 5, 7, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_odd_shapes(mk: Any, case: Case, shape: tuple[int, ...]) -> None:
    tensors = inputs(case, shape)
    try:
        torch.manual_seed(1)
        theirs = mk.merge_tensors(tensors, case.method, **arguments(case))
    except (RuntimeError, IndexError, ValueError):
        theirs = None
    try:
        with fast.enabled(seed=1):
            ours = mk.merge_tensors(tensors, case.method, **arguments(case))
    except (RuntimeError, IndexError, ValueError):
        assert theirs is None  # what is passed on fails as it does in mergekit
        assert not fast.stats().served
        return
    assert ours.shape == torch.Size(shape)
    if theirs is not None:
        assert ours.dtype == theirs.dtype
        if not is_random(case) and case.method != "arcee_fusion":
            # The angle between short vectors that are nearly parallel is an acos near 1, which has half the digits.
            bound = 5e-4 if case.method == "nuslerp" else max(case.bound, 1e-6)
            assert distance(ours, theirs) <= bound or not torch.isfinite(theirs).all()
    assert torch.isfinite(ours).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_strided_and_misaligned(mk: Any, case: Case, dtype: torch.dtype) -> None:
    """The bits do not depend on where and how the inputs lie in memory."""
    plain = inputs(case, (24, 33), dtype)
    strided = [torch.stack([t.T, t.T], dim=-1)[..., 0].T for t in plain]
    assert not any(t.is_contiguous() for t in strided)
    shifted = [torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view(t.shape) for t in plain]
    assert all(t.data_ptr() % 16 for t in shifted)
    expanded = [t[:1].expand(24, 33) for t in plain]
    with fast.enabled(seed=1):
        results = [mk.merge_tensors(t, case.method, **arguments(case)) for t in (plain, strided, shifted)]
        rows = mk.merge_tensors(expanded, case.method, **arguments(case))
        same = mk.merge_tensors([t.contiguous() for t in expanded], case.method, **arguments(case))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert torch.equal(rows, same)
    assert fast.stats().served == {case.method: 5}


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_another_place_for_the_base(mk: Any, case: Case) -> None:
    """The base may be any input."""
    if not case.base or case.method == "linear":
        assert "base_index" not in case.parameters
        return
    tensors = inputs(case, (24, 32))
    moved = [*tensors[1:], tensors[0]]
    more = {**arguments(case), "base_index": len(tensors) - 1}
    with fast.enabled(seed=1):
        first = mk.merge_tensors(tensors, case.method, **arguments(case))
        assert torch.equal(mk.merge_tensors(moved, case.method, **more), first)
