"""mergekit's functions and objects, hooked: gradients, state dicts, batches, refusals, patches, threads, processes."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from mergekit_cases import CASES, Case, arguments, arithmetic, both, distance, in_a_process, inputs

import mergekernels.integrations.mergekit as fast

pytestmark = pytest.mark.peer
NAMES = [case.name for case in CASES]


@pytest.fixture(scope="module")
def mk() -> Any:
    return pytest.importorskip("mergekit.merge_methods", reason="needs mergekit 0.1.5 in this environment")


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    fast.reset_stats()
    yield
    fast.disable()


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
        if case.method not in ("linear", "task_arithmetic", "passthrough"):
            continue
        tensors = inputs(case, (6, 8))
        tensors[-1][2, 3], tensors[0][4, 5] = float("nan"), float("inf")
        ours, theirs = both(mk, case, tensors)
        assert torch.equal(torch.isnan(ours), torch.isnan(theirs)), case.name
        assert torch.equal(torch.isinf(ours), torch.isinf(theirs)), case.name


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, -1])
def test_methods_that_choose_entries_leave_what_is_not_finite_to_mergekit(mk: Any, value: float, place: int) -> None:
    chosen = ("arcee_fusion", "breadcrumbs", "breadcrumbs_ties", "nearswap", "ram", "ramplus_tl", "sce")
    cases = {case.method: case for case in CASES if case.method in chosen}
    assert set(cases) == set(chosen)
    for case in cases.values():
        tensors = inputs(case, (6, 8))
        tensors[place][2, 3] = value
        theirs = mk.merge_tensors(tensors, case.method, **arguments(case))
        fast.reset_stats()
        with fast.enabled():
            ours = mk.merge_tensors(tensors, case.method, **arguments(case))
        assert fast.stats().passed_on == {case.method: {"values that are not finite": 1}}
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_another_default_device_does_not_matter_to_the_recognition(mk: Any) -> None:
    tensors = inputs(CASES[0], (6, 8))
    fast.reset_stats()
    with torch.device("meta"), fast.enabled():
        mk.merge_tensors(tensors, "ramplus_tl", base_index=0)
    assert fast.stats().served == {"ramplus_tl": 1}


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


@pytest.mark.parametrize("case", [c for c in CASES if c.method in ("model_stock", "ties")], ids=lambda c: c.name)
def test_functional_gradients(mk: Any, case: Case) -> None:
    """torch.func wraps its tensors in its own way."""
    first, *others = inputs(case, (6, 5))
    along = torch.ones_like(first)

    def norm(tensor: torch.Tensor) -> torch.Tensor:
        return mk.merge_tensors([tensor, *others], case.method, **arguments(case)).square().sum()

    backward, forward = torch.func.grad(norm)(first), torch.func.jvp(norm, (first,), (along,))
    with fast.enabled():
        assert torch.equal(torch.func.grad(norm)(first), backward)
        assert all(map(torch.equal, torch.func.jvp(norm, (first,), (along,)), forward))
    assert fast.stats().passed_on == {case.method: {"a gradient is wanted": 1, "a forward-mode gradient is wanted": 1}}
