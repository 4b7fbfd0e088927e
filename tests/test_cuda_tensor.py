"""The least squares and products of the CUDA module: compiled for the host here, and on a GPU where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from cuda_host_module import build
from mergekernels._backends import _cuda_launches as launches
from mergekernels._backends import _tensor, cuda_small
from mergekernels.ops import cp_als, mttkrp
from mergekernels.ops.tensor import _als, _fused
from mergekernels.ops.tensor._sweeps import Batch
from mergekernels.ops.tensor.stack import stacks_of
from stacks import dense, random_stack
from test_tensor_native import EQUATIONS, SHAPES, batch_of, factors_of, start_of

DEVICE = torch.device("cuda:0")
REASON = cuda_small.why_not(DEVICE)
LIMIT = 166912
"""Bytes of shared memory of the host's chip, see cuda_host_jacobi.cpp."""


@pytest.fixture(scope="session")
def host_module(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return build(tmp_path_factory)


@pytest.fixture(params=["host", "cuda"])
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "cuda":
        if REASON is not None:
            pytest.skip(f"cuda: {REASON}")
        yield str(DEVICE)
        return
    module = request.getfixturevalue("host_module")
    monkeypatch.setattr(launches, "native", lambda: module)
    monkeypatch.setattr(launches, "queue_of", lambda x: (0, 0))
    yield "cpu"


def fused(batch: Batch, given: Any, options: _als.Options, target: str, far: bool | None = None) -> list[_als.Outcome]:
    """The code of the device, on the target."""
    b, a, norm2 = (x.to(target) for x in (batch.b, batch.a, batch.norm2))
    moved = Batch(b, a, batch.tasks, norm2)
    shape = (len(batch.tasks), batch.b.shape[2], batch.b.shape[1], batch.a.shape[1], int(given[1].shape[-1]))
    found = _tensor.room(shape, 0) if far is None else far
    assert found is not None

    def launch(*rest: Any) -> None:
        _tensor._launch(b, a, batch.tasks.ranks, shape, found, *rest)

    return _fused._run(moved, *(x.to(target) for x in given), options, launch)


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES[:4], ((8, 8, 8), 90, 80, 20), SHAPES[-1]], ids=str)
def test_sweeps_are_those_of_tensor_operations(target: str, shape: Any, search: bool, far: bool) -> None:
    """Cores next to the factors, and where they are; after pruning, host threads run in the other order."""
    ranks, m, n, c = shape
    batch = batch_of([random_stack(ranks, m, n, seed=s) for s in range(2)])
    given, options = start_of(batch, 3, c), _als.Options(12, 1e-4, 0.0, 1e-6, search)
    ours, theirs = fused(batch, given, options, target, far), _als.run(batch, *given, options)
    for x, y in zip(ours, theirs, strict=True):
        assert (x.sweeps, x.converged, x.start, x.longer_steps) == (y.sweeps, y.converged, y.start, y.longer_steps)
        assert x.history == pytest.approx(y.history, abs=1e-11) and x.finals == pytest.approx(y.finals, abs=1e-11)
        models = [torch.einsum("tk,ik,jk->tij", *(f.cpu() for f in (o.c, o.u, o.v))) for o in (x, y)]
        assert float((models[0] - models[1]).norm() / models[1].norm()) < 1e-6


def test_barriers_suffice(target: str) -> None:
    """The threads of the host build run forwards in one launch, backwards in the next: steps must not notice.

    Singular Grams without a proximal weight are tried again, and a start of infinities breaks down.
    """
    batch = batch_of([random_stack((4, 3, 4), 30, 25)])
    c, u, v = start_of(batch, 2, 6)
    u[0, 0, :, 1] = u[0, 0, :, 0]
    v[0, 0, :, 1] = v[0, 0, :, 0]
    u[0, 1, 0, 0] = float("inf")
    for search in (False, True):
        options = _als.Options(9, 0.0, 0.0, 0.0, search)
        first, second = (fused(batch, (c, u, v), options, target)[0] for _ in range(2))
        assert first.history == second.history and torch.equal(first.u, second.u) and torch.equal(first.c, second.c)
        assert first.finals[0] < 1.0 and first.finals[1] == float("inf")


def test_host_and_device_have_the_same_bits(host_module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if REASON is not None:
        pytest.skip(f"cuda: {REASON}")
    batch = batch_of([random_stack((4, 3, 4), 60, 50, seed=s) for s in range(3)])
    given, options = start_of(batch, 3, 6), _als.Options(30, 1e-9, 0.0, 1e-6, True)
    on_device = fused(batch, given, options, str(DEVICE))
    monkeypatch.setattr(launches, "native", lambda: host_module)
    monkeypatch.setattr(launches, "queue_of", lambda x: (0, 0))
    for x, y in zip(on_device, fused(batch, given, options, "cpu"), strict=True):
        assert x.history == y.history and torch.equal(x.u.cpu(), y.u) and torch.equal(x.c.cpu(), y.c)


def test_degenerate_terms_on_the_chip(target: str) -> None:
    """The ridge is raised at the sweeps at which tensor operations raise it."""
    a, b = torch.eye(6, dtype=torch.float64)[:2]
    slices = (torch.outer(a, b) + torch.outer(b, a), torch.outer(a, a))
    batch = batch_of([[(x, torch.eye(6, dtype=torch.float64)) for x in slices]])
    near = torch.eye(6, dtype=torch.float64)[:, :2] @ torch.tensor([[1.0, 1.0], [0.05, -0.05]], dtype=torch.float64)
    given = (torch.zeros(1, 1, 2, 2, dtype=torch.float64), near[None, None], near[None, None])
    options = _als.Options(32, 1e-9, 0.0, 1e-6, False)
    ours, theirs = fused(batch, given, options, target)[0], _als.run(batch, *given, options)[0]
    assert ours.ridge == theirs.ridge >= 1e-5 and ours.sweeps == theirs.sweeps
    assert ours.history == pytest.approx(theirs.history, abs=1e-8)


def test_what_fits_on_the_chip(host_module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the shape alone: cores beside the state, cores in global memory, and not at all."""
    monkeypatch.setattr(launches, "native", lambda: host_module)
    assert _tensor.room((4, 64, 64, 64, 16), 0) is False
    assert _tensor.room((8, 128, 128, 128, 16), 0) is True
    assert _tensor.room((8, 128, 128, 128, 64), 0) is None
    small, large = host_module.als_room((8, 64, 64, 64, 16), True), host_module.als_room((8, 64, 64, 64, 16), False)
    assert large - small == 8 * 2 * 64 * 65 and large <= LIMIT
    with pytest.raises(ValueError, match="sizes of 1"):
        host_module.als_room((8, 64, 0, 64, 16), False)
    # An H100 has 232,448 bytes: cores of 128 x 128 at 32 terms are served.
    assert host_module.als_room((8, 128, 128, 128, 32), True) <= 232448


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_are_within_the_stated_bound(target: str, dtype: torch.dtype) -> None:
    """Modules of unequal shapes in one launch; edges in every direction, a task without columns."""
    shapes = [((4, 4), 131, 70), ((1, 5, 0, 3), 23, 17), ((70, 3), 9, 65), ((2,), 1, 1)]
    stacks = [random_stack(r, m, n, seed=i, dtype=dtype) for i, (r, m, n) in enumerate(shapes)]
    for c in (1, 16, 37, 70):
        factors = [factors_of(len(r), m, n, c) for r, m, n in shapes]
        for mode, equation in enumerate(EQUATIONS):
            modules: list[Any] = []
            for s, f in zip(stacks_of(stacks), factors, strict=True):
                assert isinstance(s.b, torch.Tensor) and isinstance(s.at, torch.Tensor)
                modules.append((s.b.to(target), s.at.to(target), s.ranks, [x.to(target) for x in f]))
            rows = [(len(r), m, n)[mode] for r, m, n in shapes]
            results = [torch.empty((r, c), dtype=torch.float64, device=target) for r in rows]
            _tensor._on_gpu(modules, mode, c, results)
            for (r, m, n), stack, f, found in zip(shapes, stacks, factors, results, strict=True):
                others = [x for k, x in enumerate(f) if k != mode]
                sizes = torch.einsum(
                    equation, dense([(b.abs(), a.abs()) for b, a in stack]), *(x.abs() for x in others)
                )
                eps = 2.0**-18 if dtype == torch.float32 else (max(m, n) + sum(r)) * 2.0**-52
                assert ((found.cpu() - torch.einsum(equation, dense(stack), *others)).abs() <= eps * sizes).all()


def test_ops_on_a_gpu() -> None:
    """cp_als of small cores in one launch, of large ones by tensor operations; mttkrp of several modules."""
    if REASON is not None:
        pytest.skip(f"cuda: {REASON}")
    stack = [(b.to(DEVICE), a.to(DEVICE)) for b, a in random_stack((4, 3, 4), 60, 50, dtype=torch.float32)]
    host = [(b.cpu(), a.cpu()) for b, a in stack]
    ours, theirs = cp_als(stack, 4, tol=1e-9), cp_als(host, 4, tol=1e-9)
    assert ours.fit == pytest.approx(theirs.fit, abs=1e-6)
    factors = factors_of(3, 60, 50, 5)
    for mode in range(3):
        found = mttkrp([stack, stack], [[f.to(DEVICE) for f in factors]] * 2, mode)
        want = mttkrp(host, factors, mode)
        assert all(float((x.cpu() - want).norm() / want.norm()) < 1e-5 for x in found)
        many = mttkrp([stack] * 130, [[f.to(DEVICE) for f in factors]] * 130, mode)  # enough for one call
        assert all(float((x.cpu() - want).norm() / want.norm()) < 1e-6 for x in many)


def test_few_modules_are_left_to_a_library() -> None:
    """Off the CPU; there threads share the stretches of one module as well."""
    stack = stacks_of([random_stack((40, 60), 9, 8)])[0]
    assert isinstance(stack.b, torch.Tensor) and isinstance(stack.at, torch.Tensor)
    module: Any = (stack.b.to("meta"), stack.at.to("meta"), stack.ranks, [None, None, None])
    assert not _tensor.fills([module] * 63, 16) and _tensor.fills([module] * 64, 16)
    assert not _tensor.fills([module] * 31, 65) and _tensor.fills([module] * 32, 65)
    assert _tensor.fills([(stack.b, stack.at, stack.ranks, [None, None, None])], 16)


def test_binding_refuses_what_would_crash(host_module: Any) -> None:
    with pytest.raises(ValueError, match="needs cores"):
        host_module.als_table([(8, 0, 8, 8, 8, 1.0)])
    with pytest.raises(ValueError, match="needs tables"):
        host_module.als(0, 1, (1, 1, 1, 1, 1), 8, 8, 0.0, 0.0, 1, False, False, 0, 0)
    with pytest.raises(ValueError, match="sizes and addresses"):
        host_module.thin_table([(8, 0, 0, 0, 8, 1, 1, 1, True)], 4, 3)
    with pytest.raises(ValueError, match="tiles"):
        host_module.thin(8, 1, 4, 0, 3, 0, 0)
    with pytest.raises(ValueError, match="addresses and tasks"):
        host_module.task_table([(8, 8, 8, 8, 0)], 4)
    with pytest.raises(ValueError, match="elements"):
        host_module.task_sums(8, 1, 4, 0, 0, 0)
