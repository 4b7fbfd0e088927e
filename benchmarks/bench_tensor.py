"""Tensor ops beside TensorLy and scikit-learn, both in turn in one run, results compared before anything is timed.

`pytest bench_tensor.py [--quick] [--results FILE]` in this folder; the rows go into the section "spectral" of a file.
TensorLy works on the dense tensor, so its rows need it: `pip install --no-deps --target FOLDER tensorly==0.10.0`, and
FOLDER in PYTHONPATH. Without it they are left out, and plain sweeps by torch on the dense tensor stand in. Every thread
of the machine is used, by both sides. Of a merge of 64 modules TensorLy does one, whose time counts 64 times.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch

from mergekernels import merge_adapters
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


def test_sweeps(versus: Any, side: int) -> None:
    """Sweeps from one start, with all that a call does: the core first."""
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


def test_sweeps_alone(versus: Any, side: int) -> None:
    """Twenty sweeps on a core that is there, beside twenty of the peer on a tensor that is there."""
    from mergekernels.ops.tensor._als import Options
    from mergekernels.ops.tensor._fused import run
    from mergekernels.ops.tensor._sweeps import Batch
    from mergekernels.ops.tensor.stack import core_of

    sweeps = 20
    stack = related(side)
    core, x, start = core_of(stacks_of(stack)[0]), dense(stack), inside(stack, RANK)
    batch = Batch(core.b[None], core.a[None], core.tasks, core.norm2.sum()[None])
    small = [start[0].double() / core.scale, core.qb.double().mT @ start[1].double(),
             core.qa.double().mT @ start[2].double()]  # fmt: skip
    options = Options(sweeps, 0.0, 0.0, 0.0, False)

    def ours() -> torch.Tensor:
        o = run(batch, *(f[None, None] for f in small), options)[0]
        return torch.einsum("tk,ik,jk->tij", o.c * core.scale, o.u, o.v)

    def error(mine: torch.Tensor, theirs: list[torch.Tensor]) -> float:
        inner = [theirs[0].double(), core.qb.double().mT @ theirs[1].double(), core.qa.double().mT @ theirs[2].double()]
        return distance(mine, torch.einsum("tk,ik,jk->tij", *inner))

    peers = {"dense sweeps (torch)": lambda: dense_sweeps(x, start, sweeps)}
    if tensorly:
        peers["tensorly"] = lambda: tensorly_sweeps(x, start, sweeps)
    versus(f"cp_als, {sweeps} sweeps", f"{TASKS} x {side} x {side}, rank {RANK}", ours, peers, error, 1e-2)


def adapters(stacks: list[Stack]) -> list[Any]:
    """Module i of every stack as PEFT adapters."""
    found = []
    for t in range(TASKS):
        tensors = {}
        for i, stack in enumerate(stacks):
            for letter, x in zip("BA", stack[t], strict=True):
                tensors[f"base_model.model.layers.{i}.q.lora_{letter}.weight"] = x.contiguous()
        found.append((tensors, {"r": RANK, "lora_alpha": RANK, "peft_type": "LORA", "target_modules": ["q"]}))
    return found


def leading(stack: Stack, rank: int) -> list[torch.Tensor]:
    """TensorLy's start by singular vectors, computed on the factors: only the first two of three matter to a sweep."""
    b, a = torch.cat([b for b, _ in stack], 1).double(), torch.cat([a for _, a in stack]).double()
    sides = []
    for x, y in ((b, a.mT), (a.mT, b)):
        parts = zip(x.split(RANK, 1), y.split(RANK, 1), strict=True)
        half = torch.cat([left @ torch.linalg.qr(right)[1].mT for left, right in parts], 1)
        sides.append(torch.linalg.svd(half, full_matrices=False)[0][:, :rank].float())
    return [torch.rand(TASKS, rank, generator=torch.Generator().manual_seed(0)), *sides]


@pytest.mark.skipif(tensorly is None, reason="needs TensorLy")
@pytest.mark.parametrize("start", ["svd", "given"])
def test_merge(versus: Any, side: int, request: pytest.FixtureRequest, start: str) -> None:
    """tc_lora of 8 adapters with 64 modules, four starts each, beside TensorLy on the first module, times 64.

    svd: TensorLy finds its start by decompositions of the unfolded tensor; given: it gets these singular vectors.
    """
    modules = 4 if request.config.getoption("--quick") else 64
    stacks = [related(side, seed) for seed in range(modules)]
    x, given = dense(stacks[0]), adapters(stacks)

    def ours() -> float:
        return 1.0 - merge_adapters(given, "tc_lora").report.modules["layers.0.q"].details["fit"]

    def theirs() -> float:
        init: Any = (None, leading(stacks[0], RANK)) if start == "given" else "svd"
        with tensorly.backend_context("pytorch"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its start by SVD has fewer columns than terms in the mode of tasks
            cp = parafac(x, RANK, n_iter_max=100, tol=1e-7, init=init, random_state=0)
        return distance(model(list(cp.factors)), x)

    versus(
        f"tc_lora, {modules} modules", f"{TASKS} x {side} x {side}, rank {RANK}, 4 starts", ours,
        {f"tensorly, start {start}, 1 module x {modules}": theirs},
        lambda mine, other: max(0.0, mine / other - 1.0), 1e-3, parts=modules,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["related", "independent"])
def test_cluster(versus: Any, side: int, request: pytest.FixtureRequest, kind: str) -> None:
    """k-means of the rank units of 8 adapters, beside scikit-learn on the raw vectors, 10 starts on both sides."""
    from sklearn.cluster import KMeans

    modules = 4 if request.config.getoption("--quick") else 64
    units = []
    for seed in range(modules):
        stack = related(side, seed) if kind == "related" else related(side, seed, rank=2 * RANK)
        units.append(torch.cat([torch.cat([b.mT, a], 1)[-RANK:] for b, a in stack]))

    def theirs() -> list[float]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return [float(KMeans(RANK, n_init=10, random_state=0).fit(np.asarray(x)).inertia_) for x in units]

    versus(
        f"cluster, {modules} modules, {kind}", f"{TASKS * RANK} units of {2 * side}, k {RANK}, 10 starts",
        lambda: [found.inertia for found in cluster(units, RANK, n_starts=10)], {"scikit-learn": theirs},
        lambda mine, other: max(0.0, sum(mine) / sum(other) - 1.0), 0.0,
    )  # fmt: skip


LINEAR: dict[str, Any] = {"init": "hosvd", "n_starts": 1, "max_iter": 10, "tol": 0.0}


def test_cost_is_linear_in_adapters(versus: Any, request: pytest.FixtureRequest) -> None:
    """10 sweeps of 100 and of 1000 adapters of rank 16: the larger beside ten times the smaller."""
    side, low, high = (128, 20, 100) if request.config.getoption("--quick") else (512, 100, 1000)
    small, large = related(side, tasks=low), related(side, tasks=high)

    def repeated() -> float:
        return [cp_als(small, RANK, **LINEAR).fit for _ in range(high // low)][-1]

    versus(
        f"cp_als of {high} adapters", f"{side} x {side}, rank {RANK}, 10 sweeps",
        lambda: cp_als(large, RANK, **LINEAR).fit, {f"{high // low} times {low} adapters": repeated},
        lambda mine, other: abs(mine - other), 1.0,
    )  # fmt: skip


def test_cost_is_linear_in_width(versus: Any, request: pytest.FixtureRequest) -> None:
    """10 sweeps of 8 adapters of width 2048 and of 8192: the larger beside four times the smaller."""
    low, high = (256, 1024) if request.config.getoption("--quick") else (2048, 8192)
    small, large = related(low), related(high)

    def repeated() -> float:
        return [cp_als(small, RANK, **LINEAR).fit for _ in range(high // low)][-1]

    versus(
        f"cp_als of width {high}", f"{TASKS} adapters, rank {RANK}, 10 sweeps",
        lambda: cp_als(large, RANK, **LINEAR).fit, {f"{high // low} times width {low}": repeated},
        lambda mine, other: abs(mine - other), 1.0,
    )  # fmt: skip


@pytest.mark.parametrize("mode", [0, 1, 2])
@pytest.mark.parametrize(("modules", "large"), [(1, True), (64, False)])
def test_mttkrp(versus: Any, side: int, modules: int, large: bool, mode: int) -> None:
    """Beside the same products by torch in float64, module after module; stacking and checks are on both sides."""
    from mergekernels.ops import mttkrp
    from mergekernels.ops.tensor.mttkrp import _by_torch

    rows, width = (side, RANK) if large else (side // 8, 8)
    stacks = [related(rows, seed, rank=RANK if large else 8) for seed in range(modules)]
    g = torch.Generator().manual_seed(4)
    factors = [
        [torch.randn(n, width, generator=g, dtype=torch.float64) for n in (TASKS, rows, rows)] for _ in range(modules)
    ]

    def theirs() -> list[torch.Tensor]:
        return [_by_torch(stack, f, mode) for stack, f in zip(stacks_of(stacks), factors, strict=True)]

    versus(
        f"mttkrp, mode {mode}, {modules} modules", f"{TASKS} x {rows} x {rows}, {width} columns",
        lambda: mttkrp(stacks, factors, mode), {"torch": theirs},
        lambda mine, other: max(distance(x, y) for x, y in zip(mine, other, strict=True)), 1e-12,
    )  # fmt: skip
