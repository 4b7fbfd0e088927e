"""The C++ code of mttkrp and least squares on the CPU: beside einsum, and sweep by sweep beside tensor operations."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from mergekernels import _cpu
from mergekernels._backends import _tensor
from mergekernels.ops import cp_als, mttkrp
from mergekernels.ops.tensor import _als, _fused
from mergekernels.ops.tensor._sweeps import Batch
from mergekernels.ops.tensor.stack import cores_of, stacks_of
from stacks import dense, planted_stack, random_stack

EQUATIONS = ("tij,ik,jk->tk", "tij,tk,jk->ik", "tij,tk,ik->jk")
EPS = 2.0**-52


def factors_of(tasks: int, m: int, n: int, c: int, seed: int = 5) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(size, c, generator=g, dtype=torch.float64) for size in (tasks, m, n)]


@pytest.fixture(params=_cpu.isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MERGEKERNELS_CPU_ISA", request.param)
    return str(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("ranks", "m", "n", "c"),
    [((4, 4), 300, 131, 16), ((1, 5, 0, 3), 23, 17, 1), ((70, 3), 9, 65, 13), ((130,), 70, 8, 24), ((2,), 1, 1, 7)],
)
def test_products_are_within_the_stated_bound(
    isa: str, dtype: torch.dtype, ranks: tuple[int, ...], m: int, n: int, c: int
) -> None:
    """Sums of more than one stretch, widths that are not whole vectors, a rank of zero."""
    stack = random_stack(ranks, m, n, dtype=dtype)
    factors = factors_of(len(ranks), m, n, c)
    x = dense(stack)
    sizes = dense([(b.abs(), a.abs()) for b, a in stack])
    for mode, equation in enumerate(EQUATIONS):
        others = [f for k, f in enumerate(factors) if k != mode]
        modules = [(s.b, s.at, s.ranks, [*factors]) for s in stacks_of([stack])]
        (found,) = _tensor.mttkrp(modules, mode, c)
        bound = (max(m, n) + sum(ranks)) * EPS * torch.einsum(equation, sizes, *(f.abs() for f in others))
        assert ((found - torch.einsum(equation, x, *others)).abs() <= bound).all()


def test_modules_of_all_shapes_in_one_call_and_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has the bits that it has alone, whatever the threads; widths that differ are calls of their own."""
    shapes = [((16, 16, 16), 700, 900, 16), ((4,), 30, 20, 5), ((16, 2), 1300, 600, 16)]
    stacks = [random_stack(r, m, n, seed=i) for i, (r, m, n, _) in enumerate(shapes)]
    factors = [factors_of(len(r), m, n, c) for r, m, n, c in shapes]
    calls: list[int] = []
    native = _cpu.mttkrp
    monkeypatch.setattr(_cpu, "mttkrp", lambda table, *rest: calls.append(len(table)) or native(table, *rest))
    for mode in range(3):
        alone = [mttkrp(s, f, mode) for s, f in zip(stacks, factors, strict=True)]
        for threads in (1, 3, 8):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            together = mttkrp(stacks, factors, mode)
            assert all(torch.equal(x, y) for x, y in zip(alone, together, strict=True))
    assert calls == [1, 1, 1, *[2, 1] * 3] * 3


def test_tasks_without_columns_are_zeros() -> None:
    stack = random_stack((0, 0), 6, 5)
    for mode, rows in enumerate((2, 6, 5)):
        assert torch.equal(mttkrp(stack, factors_of(2, 6, 5, 3), mode), torch.zeros(rows, 3, dtype=torch.float64))


def test_a_library_serves_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    b = torch.ones(4, 2)
    assert _tensor.serves_products(b, b, 16) and _tensor.serves_products(b, b, 17) == (_cpu.isas()[0] != "base")
    monkeypatch.setenv("MERGEKERNELS_CPU_ISA", "base")
    assert _tensor.serves_products(b, b, 16) and not _tensor.serves_products(b, b, 17)
    core = torch.ones(1, 3, 4, dtype=torch.float64)
    assert _tensor.least_squares(core, core, (4,), 33, 1) is None
    assert _tensor.least_squares(core, core, (4,), 32, 1) is not None
    large = torch.empty(1, 1 << 10, (1 << 10) + 1, dtype=torch.float64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert _tensor.least_squares(large, large, ((1 << 10) + 1,), 4, 1) is None
    assert _tensor.least_squares(large, large, ((1 << 10) + 1,), 4, 2) is not None


def batch_of(stacks: list[Any]) -> Batch:
    cores = cores_of(stacks_of(stacks))
    b, a = (torch.stack([getattr(core, x) for core in cores]) for x in ("b", "a"))
    return Batch(b, a, cores[0].tasks, torch.stack([core.norm2.sum() for core in cores]))


def start_of(batch: Batch, starts: int, c: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    count, p, q = batch.b.shape[0], batch.b.shape[1], batch.a.shape[1]
    u, v = (torch.randn(count, starts, rows, c, generator=g, dtype=torch.float64) for rows in (p, q))
    return torch.zeros(count, starts, len(batch.tasks), c, dtype=torch.float64), u, v


SHAPES = [
    ((4, 4, 4), 30, 25, 5),
    ((1, 5, 2, 3), 40, 30, 8),  # ranks of their own
    ((6, 6), 7, 20, 3),  # one side is not compressed
    ((3, 0, 4), 20, 20, 9),  # a task without columns, more terms than columns of the core
    ((40, 40, 40, 40), 200, 180, 16),  # sums of more than one stretch
    ((2,), 5, 4, 1),
]


def check_sweeps(shape: tuple[tuple[int, ...], int, int, int], search: bool, run: Any, bound: float) -> None:
    """`run` beside tensor operations: the histories, the sweeps, the choice of the start, and the models."""
    ranks, m, n, c = shape
    batch = batch_of([random_stack(ranks, m, n, seed=s) for s in range(2)])
    given = start_of(batch, 3, c)
    options = _als.Options(14, 1e-4, 0.0, 1e-6, search)
    ours, theirs = run(batch, *given, options), _als.run(batch, *given, options)
    for x, y in zip(ours, theirs, strict=True):
        assert (x.sweeps, x.converged, x.start, x.ridge) == (y.sweeps, y.converged, y.start, y.ridge)
        assert x.longer_steps == y.longer_steps and x.orthogonal == y.orthogonal
        assert x.history == pytest.approx(y.history, abs=bound) and x.finals == pytest.approx(y.finals, abs=bound)
        assert (x.theta, x.growth) == pytest.approx((y.theta, y.growth), rel=1e-6)
        models = [torch.einsum("tk,ik,jk->tij", o.c, o.u, o.v) for o in (x, y)]
        assert float((models[0] - models[1]).norm() / models[1].norm()) < 1e-6


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sweeps_are_those_of_tensor_operations(shape: Any, search: bool) -> None:
    check_sweeps(shape, search, _fused.run, 1e-11)


def test_sweeps_of_every_instruction_set(isa: str) -> None:
    check_sweeps(SHAPES[1], True, _fused.run, 1e-11)


def test_threads_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = batch_of([random_stack((4, 3), 20, 15, seed=s) for s in range(5)])
    given = start_of(batch, 3, 4)
    one, four = (_fused.run(batch, *given, _als.Options(30, 1e-8, 0.0, 1e-6, True, threads)) for threads in (1, 4))
    for x, y in zip(one, four, strict=True):
        assert x.history == y.history and torch.equal(x.u, y.u) and torch.equal(x.c, y.c)
    asked: list[int] = []
    native = _cpu.als
    monkeypatch.setattr(_cpu, "als", lambda *rest: asked.append(rest[-2]) or native(*rest))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    stacks = [random_stack((4, 3), 20, 15, seed=s) for s in range(3)]
    cp_als(stacks[0], 2, max_iter=2)  # one batch: threads share its starts
    cp_als(stacks, 2, max_iter=2)  # as many batches as threads
    assert asked == [4, 1, 1, 1]


def border_rank() -> Any:
    """a a b + a b a + b a a: of rank 3, but as near as one likes to a tensor of rank 2."""
    a, b = torch.eye(6, dtype=torch.float64)[:2]
    slices = torch.stack([torch.outer(a, b) + torch.outer(b, a), torch.outer(a, a)])
    return [(slices[t], torch.eye(6, dtype=torch.float64)) for t in range(2)]


def test_degenerate_terms_raise_the_ridge_at_the_same_sweep() -> None:
    """From a start close to the limit that has no best fit."""
    batch = batch_of([border_rank()])
    near = torch.eye(6, dtype=torch.float64)[:, :2] @ torch.tensor([[1.0, 1.0], [0.05, -0.05]], dtype=torch.float64)
    start = [near[None, None]] * 2
    given = (torch.zeros(1, 1, 2, 2, dtype=torch.float64), *start)
    options = _als.Options(32, 1e-9, 0.0, 1e-6, False)
    ours, theirs = _fused.run(batch, *given, options)[0], _als.run(batch, *given, options)[0]
    assert ours.ridge == theirs.ridge >= 1e-5 and ours.sweeps == theirs.sweeps
    assert ours.history == pytest.approx(theirs.history, abs=1e-8)


def test_what_needs_an_orthonormal_factor_goes_to_tensor_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole module is done over, the others are not."""
    batch = batch_of([random_stack((4, 3), 20, 15, seed=s) for s in range(3)])
    given, options = start_of(batch, 2, 4), _als.Options(12, 0.0, 0.0, 1e-6, False)
    plain = _fused.run(batch, *given, options)
    again: list[torch.Tensor] = []
    run = _als.run
    monkeypatch.setattr(_als, "run", lambda batch, *rest: again.append(batch.b) or run(batch, *rest))
    native = _tensor._launch

    def launch(*arguments: Any) -> None:
        native(*arguments)
        arguments[10][3, 1] = 2.0  # the report of start 1 of module 1

    monkeypatch.setattr(_tensor, "_launch", launch)
    found = _fused.run(batch, *given, options)
    assert len(again) == 1 and torch.equal(again[0], batch.b[1:2])
    for x, y in zip(found, plain, strict=True):
        assert x.history == pytest.approx(y.history, abs=1e-11)


def test_breakdown_ends_a_start_and_the_others_go_on() -> None:
    """A start of infinities has no result; the best of the others is taken."""
    batch = batch_of([random_stack((4, 3), 20, 15)])
    c, u, v = start_of(batch, 3, 4)
    u[0, 0, 0, 0] = float("inf")
    (found,) = _fused.run(batch, c, u, v, _als.Options(30, 1e-8, 0.0, 1e-6, False))
    assert found.start in (1, 2) and found.finals[0] == float("inf") and found.history[-1] < 1.0


def test_ops_take_native_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """And without it the same comes out."""
    stack, _ = planted_stack(4, 30, 25, 3)
    calls: list[int] = []
    native = _cpu.als
    monkeypatch.setattr(_cpu, "als", lambda table, *rest: calls.append(len(table)) or native(table, *rest))
    ours = cp_als(stack, 3)
    assert calls[0] == 4 and all(count <= 2 for count in calls[1:])
    monkeypatch.setattr(_tensor, "least_squares", lambda *rest: None)
    theirs = cp_als(stack, 3)
    assert ours.history == pytest.approx(theirs.history, abs=1e-7) and ours.fit > 1 - 1e-5
    assert importlib.import_module("mergekernels.ops.tensor.cp").run is _fused.run


def test_the_binding_refuses_what_would_crash() -> None:
    with pytest.raises(ValueError, match="sizes of 1 and more"):
        _cpu.als([], (1, 1, 0, 1, 1), 0, 0, 0.0, 0.0, 1, False, 1, "base")
    b = torch.ones(3, 2)
    with pytest.raises(ValueError, match="two matrices of R columns"):
        _tensor.mttkrp([(b, b, (3,), [None, None, None])], 0, 1)


def test_singular_grams_without_a_proximal_weight(isa: str) -> None:
    """Copies hold fewer terms than are asked for, so that every Gram becomes singular: the error does not rise."""
    stack = [random_stack((2,), 20, 9)[0]] * 3
    plain = 0
    for seed in range(12):
        found = cp_als(stack, 3, prox=0.0, tol=0.0, max_iter=40, init="random", n_starts=1, seed=seed)
        rises = [y - x for x, y in zip(found.history[:-1], found.history[1:], strict=True)]
        raised = found.diagnostics["ridge"] > 0.0  # against terms that cancel: then it may
        plain += not raised
        assert max(rises) < (0.1 if raised else 1e-6)
    assert plain > 3
