"""Tensor ops beside TensorLy and scikit-learn, both in turn in one run, results compared before anything is timed.

`pytest bench_tensor.py [--quick] [--results FILE]` in this folder; the rows go into the section "spectral" of a file.
TensorLy works on the dense tensor, so its rows need it installed (`pip install tensorly`); without it they are left
out, and a plain sweep by torch on the dense tensor stands in. Every thread of the machine is used, by both sides.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch

from mergekernels.ops import cluster, cp_als
from mergekernels.ops.tensor.stack import stacks_of

try:
    import tensorly
    from tensorly.decomposition import parafac
except ImportError:
    tensorly = None

Stack = list[tuple[torch.Tensor, torch.Tensor]]
TASKS, RANK = 8, 16


@pytest.fixture
def side(request: pytest.FixtureRequest) -> int:
    return 256 if request.config.getoption("--quick") else 2048


def related(side: int, seed: int = 0, tasks: int = TASKS, rank: int = RANK) -> Stack:
    """Updates that share half of their terms, with weights of their own."""
    g = torch.Generator().manual_seed(seed)
    b, a = torch.randn(side, rank // 2, generator=g), torch.randn(rank // 2, side, generator=g)
    stack = []
    for _ in range(tasks):
        weights = 0.5 + torch.rand(rank // 2, generator=g)
        own = torch.randn(side, rank - rank // 2, generator=g), torch.randn(rank - rank // 2, side, generator=g)
        stack.append((torch.cat([b * weights, 0.5 * own[0]], 1), torch.cat([a, own[1]])))
    return stack


def dense(stack: Stack) -> torch.Tensor:
    return torch.stack([b @ a for b, a in stack])


def model(factors: list[torch.Tensor]) -> torch.Tensor:
    c, u, v = (f.float() for f in factors)
    return (u * c[:, None]) @ v.mT


def inside(stack: Stack, rank: int) -> list[torch.Tensor]:
    """A start in the span of the stack, on which compression has no influence."""
    g = torch.Generator().manual_seed(3)
    b, a = torch.cat([b for b, _ in stack], 1), torch.cat([a for _, a in stack])
    mixtures = [torch.randn(b.shape[1], rank, generator=g) for _ in range(2)]
    return [torch.rand(len(stack), rank, generator=g), b @ mixtures[0], a.mT @ mixtures[1]]


def distance(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x - y).norm() / y.norm())


def dense_sweeps(x: torch.Tensor, start: list[torch.Tensor], sweeps: int) -> list[torch.Tensor]:
    """Alternating least squares on the dense tensor."""
    c, u, v = start
    for _ in range(sweeps):
        c = torch.linalg.solve((u.mT @ u) * (v.mT @ v), torch.einsum("tik,ik->kt", x @ v, u)).mT
        u = torch.linalg.solve((c.mT @ c) * (v.mT @ v), torch.einsum("tik,tk->ki", x @ v, c)).mT
        v = torch.linalg.solve((c.mT @ c) * (u.mT @ u), torch.einsum("tjk,tk->kj", x.mT @ u, c)).mT
    return [c, u, v]


def tensorly_sweeps(x: torch.Tensor, start: list[torch.Tensor], sweeps: int) -> list[torch.Tensor]:
    with tensorly.backend_context("pytorch"):
        copies = [f.clone() for f in start]
        return list(parafac(x, start[0].shape[1], n_iter_max=sweeps, init=(None, copies), tol=0.0).factors)


SWEEPS = 11


def test_sweep(versus: Any, side: int) -> None:
    """Sweeps from one start: the difference of 11 and 1 of them would be 10 alone; here all that a call does counts."""
    stack = related(side)
    x, start = dense(stack), inside(stack, RANK)
    peers = {"dense sweeps (torch)": lambda: model(dense_sweeps(x, start, SWEEPS))}
    if tensorly:
        peers["tensorly"] = lambda: model(tensorly_sweeps(x, start, SWEEPS))
    versus(
        f"cp_als, {SWEEPS} sweeps, core included", f"{TASKS} x {side} x {side}, rank {RANK}",
        lambda: model(cp_als(stack, RANK, init=(None, start), max_iter=SWEEPS, prox=0.0, tol=0.0).factors),
        peers, distance, 1e-2,
    )  # fmt: skip


def test_one_sweep(versus: Any, side: int) -> None:
    """A sweep alone, on a core that is there, beside a sweep of the peer on a tensor that is there."""
    from mergekernels.ops.tensor._sweeps import Batch, State, sweep
    from mergekernels.ops.tensor.stack import core_of

    stack = related(side)
    core, x, start = core_of(stacks_of(stack)[0]), dense(stack), inside(stack, RANK)
    batch = Batch(core.b[None], core.a[None], core.tasks, core.norm2.sum()[None])
    small = [start[0].double() / core.scale, core.qb.double().mT @ start[1].double(),
             core.qa.double().mT @ start[2].double()]  # fmt: skip
    state = State.start(batch, *(f[None, None] for f in small), 0.0)

    def ours() -> torch.Tensor:
        after = sweep(batch, state, 0.0)[0]
        return torch.einsum("tk,ik,jk->tij", after.c[0, 0] * core.scale, after.u[0, 0], after.v[0, 0])

    def error(mine: torch.Tensor, theirs: list[torch.Tensor]) -> float:
        inner = [theirs[0].double(), core.qb.double().mT @ theirs[1].double(), core.qa.double().mT @ theirs[2].double()]
        return distance(mine, torch.einsum("tk,ik,jk->tij", *inner))

    peers = {"dense sweep (torch)": lambda: dense_sweeps(x, start, 1)}
    if tensorly:
        peers["tensorly"] = lambda: tensorly_sweeps(x, start, 1)
    versus("cp_als, one sweep", f"{TASKS} x {side} x {side}, rank {RANK}", ours, peers, error, 1e-2)


@pytest.mark.skipif(tensorly is None, reason="needs TensorLy")
def test_merge(versus: Any, side: int, request: pytest.FixtureRequest) -> None:
    """All starts, all sweeps, all modules of ours, per module; TensorLy on one module, from its start by SVD."""
    quick = request.config.getoption("--quick")
    modules = 4 if quick else 16
    stacks = [related(side, seed) for seed in range(modules)]
    x = dense(stacks[0])

    def ours() -> float:
        return 1.0 - cp_als(stacks, RANK)[0].fit

    def theirs() -> float:
        with tensorly.backend_context("pytorch"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its start by SVD has fewer columns than terms in the mode of tasks
            cp = parafac(x, RANK, n_iter_max=100, tol=1e-7, init="svd", random_state=0)
        return distance(model(list(cp.factors)), x)

    ours_alone, their_error = ours(), theirs()
    assert ours_alone <= 1.001 * their_error
    versus.rounds = 1
    versus(
        f"cp_als of {modules} modules; the peer has 1", f"{TASKS} x {side} x {side}, rank {RANK}, 4 starts", ours,
        {"tensorly": theirs}, lambda mine, other: max(0.0, mine / other - 1.0), 1e-3,
    )  # fmt: skip


@pytest.mark.parametrize("related_units", [True, False], ids=["related", "independent"])
def test_cluster(versus: Any, side: int, request: pytest.FixtureRequest, related_units: bool) -> None:
    """k-means of the rank units of 8 adapters, beside scikit-learn on the raw vectors, 10 starts on both sides."""
    from sklearn.cluster import KMeans

    modules = 4 if request.config.getoption("--quick") else 16
    units = []
    for seed in range(modules):
        stack = related(side, seed) if related_units else related(side, seed, rank=2 * RANK)
        units.append(torch.cat([torch.cat([b.mT, a], 1)[-RANK:] for b, a in stack]))

    def theirs() -> list[float]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return [float(KMeans(RANK, n_init=10, random_state=0).fit(np.asarray(x)).inertia_) for x in units]

    versus.rounds = 1
    versus(
        f"cluster, {modules} modules", f"{TASKS * RANK} units of {2 * side}, k {RANK}, 10 starts",
        lambda: [found.inertia for found in cluster(units, RANK, n_starts=10)], {"scikit-learn": theirs},
        lambda mine, other: max(0.0, sum(mine) / sum(other) - 1.0), 5e-3,
    )  # fmt: skip


def test_cost_is_linear_in_adapters(versus: Any, request: pytest.FixtureRequest) -> None:
    """10 sweeps of 100 and of 1000 adapters of rank 16: the larger beside ten times the smaller."""
    side, low, high = (128, 20, 100) if request.config.getoption("--quick") else (512, 100, 1000)
    small, large = related(side, tasks=low), related(side, tasks=high)
    options: dict[str, Any] = {"init": "hosvd", "n_starts": 1, "max_iter": 10, "tol": 0.0}

    def repeated() -> float:
        return [cp_als(small, RANK, **options).fit for _ in range(high // low)][-1]

    versus(
        f"cp_als of {high} adapters", f"{side} x {side}, rank {RANK}, 10 sweeps",
        lambda: cp_als(large, RANK, **options).fit, {f"{high // low} times {low} adapters": repeated},
        lambda mine, other: abs(mine - other), 1.0,
    )  # fmt: skip
