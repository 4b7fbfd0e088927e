"""mergekit's methods, hooked and unhooked in one process: results, dtypes, shapes, borrowed inputs, fall-backs."""

from __future__ import annotations

import multiprocessing
import threading
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
    distance,
    in_a_process,
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


def both(mk: Any, case: Case, tensors: list[torch.Tensor], **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(hooked, unhooked); the inputs stay as they were and the call was served."""
    before = [t.clone() for t in tensors]
    fast.reset_stats()
    torch.manual_seed(1)
    theirs = mk.merge_tensors(tensors, case.method, **arguments(case, **more))
    with fast.enabled(seed=1):
        ours = mk.merge_tensors(tensors, case.method, **arguments(case, **more))
    assert fast.stats().served == {case.method: 1}, str(fast.stats())
    for now, then in zip(tensors, before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)
    assert (ours.shape, ours.dtype, ours.device) == (theirs.shape, theirs.dtype, theirs.device)
    return ours, theirs


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


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_gradients_flow(mk: Any, case: Case) -> None:
    tensors = inputs(case, (12, 16))

    def gradient() -> torch.Tensor:
        leaves = [t.clone().requires_grad_() for t in tensors]
        torch.manual_seed(2)
        mk.merge_tensors(leaves, case.method, **arguments(case)).square().sum().backward()
        return torch.stack([leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for leaf in leaves])

    theirs = gradient()
    with fast.enabled():
        assert torch.equal(gradient(), theirs)
    assert fast.stats().passed_on == {case.method: {"a gradient is wanted": 1}}


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_disabled_is_as_before(mk: Any, case: Case) -> None:
    tensors = inputs(case, (24, 32))

    def run() -> torch.Tensor:
        torch.manual_seed(4)
        return mk.merge_tensors(tensors, case.method, **arguments(case))

    before = run()
    fast.enable()
    run()
    fast.disable()
    assert torch.equal(run(), before)
    assert fast.stats().served == {case.method: 1}


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_state_dicts(mk: Any, case: Case) -> None:
    """Batches give what single tensors give, buffers are mergekit's."""
    names = ["a.w", "b.w", "c.w", "d.w"]
    kinds = [(8, 16), (8, 16), (5,), (8, 16)]
    columns = [inputs(case, shape) for shape in kinds]
    columns[1] = [t * 1.5 for t in columns[1]]
    dicts = [{n: column[i] for n, column in zip(names, columns, strict=True)} for i in range(len(columns[0]))]
    for d in dicts:
        d["steps"] = torch.tensor(3)
    given = {"parameters": case.parameters, "base": arguments(case)["base_index"]}
    with fast.enabled(seed=1):
        merged = mk.merge_state_dicts(dicts, case.method, **given)
        for name, column in zip(names, columns, strict=True):
            single = mk.merge_tensors(column, case.method, **{**arguments(case), "name": name})
            assert torch.equal(merged[name], single)
    assert int(merged["steps"]) == 3
    assert not fast.stats().passed_on


def test_batches_with_values_of_their_own(mk: Any) -> None:
    groups = [mk.TensorGroup.from_tensors(inputs(Case("slerp", 1, True), (4, 8)), base_index=0) for _ in range(3)]
    ts = mk.PerGroupValues([0.1, 0.5, 0.9])
    ws = mk.PerGroupValues([[1.0, 2.0], [0.5, 0.5], [3.0, 1.0]])
    slerp, linear = mk.get("slerp"), mk.get("linear")
    theirs = [*slerp(groups, parameters={"t": ts}), *linear(groups, parameters={"weight": ws})]
    with fast.enabled():
        ours = [*slerp(groups, parameters={"t": ts}), *linear(groups, parameters={"weight": ws})]
    assert fast.stats().served == {"slerp": 1, "linear": 1}
    assert all(distance(a, b) < 1e-6 for a, b in zip(ours, theirs, strict=True))


def test_values_that_are_not_numbers_stay_where_they_were(mk: Any) -> None:
    for case in CASES:
        # Methods that measure the tensor (angles, ranks, norms) spread what is not a number; mergekit does too.
        if case.method not in ("linear", "task_arithmetic", "nearswap", "passthrough"):
            continue
        tensors = inputs(case, (6, 8))
        tensors[-1][2, 3], tensors[0][4, 5] = float("nan"), float("inf")
        ours, theirs = both(mk, case, tensors)
        assert torch.equal(torch.isnan(ours), torch.isnan(theirs)), case.name
        assert torch.equal(torch.isinf(ours), torch.isinf(theirs)), case.name


def test_what_mergekit_refuses_it_still_refuses(mk: Any) -> None:
    case = arithmetic("della", density=0.9, epsilon=0.3)
    with fast.enabled(), pytest.raises(ValueError, match="Epsilon must be chosen"):
        mk.merge_tensors(inputs(case, (4, 8)), "della", **arguments(case))
    opposed = [torch.ones(4), -torch.ones(4), torch.zeros(4)]
    with fast.enabled(), pytest.raises(ValueError, match="zero"):
        mk.merge_tensors(opposed, "multislerp", parameters={"weight": [1.0, 1.0, 0.0], "normalize_weights": False})
    with fast.enabled(), pytest.raises(TypeError, match="Unknown parameter"):
        mk.merge_tensors(opposed, "linear", parameters={"weight": 1.0, "surprise": 1})
    assert not fast.stats().served


def test_somebody_elses_patch(mk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(c for c in CASES if c.method == "ram")
    tensors = inputs(case, (8, 8))
    plain = mk.merge_tensors(tensors, "ram", **arguments(case))
    method = mk.get("ram")
    fast.enable()
    ours = method.implementation
    monkeypatch.setattr(method, "implementation", lambda group, **kw: ours(group, **kw) + 1)
    over = mk.merge_tensors(tensors, "ram", **arguments(case))
    assert distance(over, plain + 1) < 1e-6
    assert fast.stats().served == {"ram": 1}
    with pytest.warns(RuntimeWarning, match="implementation was replaced by somebody else"):
        fast.disable()
    assert torch.equal(mk.merge_tensors(tensors, "ram", **arguments(case)), plain + 1)
    monkeypatch.undo()
    assert torch.equal(mk.merge_tensors(tensors, "ram", **arguments(case)), plain)


def test_two_threads(mk: Any) -> None:
    found: dict[Any, list[torch.Tensor]] = {}
    prepared = [(case, inputs(case, (48, 64))) for case in CASES]

    def work(key: str) -> None:
        found[key] = [mk.merge_tensors(t, case.method, **arguments(case)) for case, t in prepared]

    with fast.enabled(seed=1):
        threads = [threading.Thread(target=work, args=(key,)) for key in ("a", "b")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        work("alone")
    assert all(all(map(torch.equal, found[key], found["alone"])) for key in ("a", "b"))
    assert sum(fast.stats().served.values()) == 3 * len(CASES)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_processes(mk: Any, start: str) -> None:
    """A forked process is hooked like its parent and counts for itself; a new one is as new."""
    case = next(c for c in CASES if c.method == "model_stock")
    tensors = inputs(case, (8, 8))
    context = multiprocessing.get_context(start)
    queue = context.Queue()
    plain = mk.merge_tensors(tensors, case.method, **arguments(case))
    with fast.enabled():
        ours = mk.merge_tensors(tensors, case.method, **arguments(case))
        process = context.Process(target=in_a_process, args=(queue, tensors, case))
        process.start()
        values, served = queue.get(timeout=60)
        process.join()
    assert process.exitcode == 0
    assert torch.equal(torch.tensor(values), ours if start == "fork" else plain)
    assert served == ({"model_stock": 1} if start == "fork" else {})
    assert fast.stats().served == {"model_stock": 1}


def test_on_a_gpu(mk: Any) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    for case in CASES:
        tensors = [t.cuda() for t in inputs(case, (48, 65))]
        with fast.enabled(seed=1), torch.device("cuda"):
            gpu = mk.merge_tensors(tensors, case.method, **arguments(case))
        with fast.enabled(seed=1):
            cpu = mk.merge_tensors([t.cpu() for t in tensors], case.method, **arguments(case))
        assert gpu.is_cuda
        assert torch.equal(gpu.cpu(), cpu)
