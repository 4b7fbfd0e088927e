"""Ops over matrices beside what they replace, both in turn in one run, results compared before anything is timed.

`pytest bench_spectral.py [--quick] [--results FILE]` in this folder; the rows go into the section "spectral" of a file.
Every thread of the machine is used, by both sides. Data are float32 matrices with independent normal entries (square:
condition 1e3 to 1e4; aspect 4: condition 3) unless a case says otherwise.
"""

from __future__ import annotations

import contextlib
import io
from typing import Any

import pytest
import torch

import mergekernels as mk
from mergekernels import ops
from mergekernels._methods.arguments import bind_matrix
from mergekernels._methods.matrix import MatrixSpec
from mergekernels._methods.matrix_table import get_matrix
from mergekernels.adapters.model import Factors


def normal(m: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def svd_polar(x: torch.Tensor) -> torch.Tensor:
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    return u @ vh


def distance(p: torch.Tensor, q: torch.Tensor) -> float:
    return float((p - q).norm() / q.norm())


@pytest.fixture
def side(request: pytest.FixtureRequest) -> int:
    return 256 if request.config.getoption("--quick") else 1024


@pytest.mark.parametrize("aspect", [1, 4])
def test_polar(versus: Any, side: int, aspect: int) -> None:
    x = normal(aspect * side, side)
    # The bound is that of the peer: eps times the condition, up to 1e4 where a matrix is square.
    versus(
        "polar",
        f"{aspect * side} x {side}",
        lambda: ops.polar(x).p,
        {"torch.linalg.svd": lambda: svd_polar(x)},
        distance,
        1e-4,
    )


@pytest.mark.parametrize("route", ["gram", "svd", "qdwh", "newton_schulz"])
def test_polar_routes(versus: Any, side: int, route: Any) -> None:
    x = normal(side, side)
    versus(
        f"polar {route}",
        f"{side} x {side}",
        lambda: ops.polar(x, route=route).p,
        {"torch.linalg.svd": lambda: svd_polar(x)},
        distance,
        1e-4,
    )


def test_polar_list(versus: Any, side: int) -> None:
    xs = [normal(side // 2, side // 2, seed) for seed in range(8)]
    versus(
        "polar",
        f"8 of {side // 2} x {side // 2}",
        lambda: torch.stack([p.p for p in ops.polar(xs)]),
        {"torch.linalg.svd": lambda: torch.stack([svd_polar(x) for x in xs])},
        distance,
        1e-4,
    )


def test_polar_factors(versus: Any, side: int) -> None:
    parts = Factors(normal(2 * side, 64), normal(64, 2 * side, 1))
    versus(
        "polar",
        f"rank 64 of {2 * side} x {2 * side}",
        lambda: ops.polar(parts).p.dense(),
        {"QR, QR, svd (torch)": lambda: qr_polar(parts)},
        distance,
        1e-5,
    )


def qr_polar(parts: Factors) -> torch.Tensor:
    left, r = torch.linalg.qr(parts.b)
    right, s = torch.linalg.qr(parts.a.mT)
    u, _, vh = torch.linalg.svd(r @ s.mT)
    return left @ (u @ vh) @ right.mT


def test_tall_qr(versus: Any, side: int) -> None:
    x = normal(4 * side, side // 8)
    flops = 4 * x.numel() * x.shape[1]
    versus(
        "tall_qr",
        f"{4 * side} x {side // 8}",
        lambda: ops.tall_qr(x),
        {"torch.linalg.qr": lambda: torch.linalg.qr(x)},
        lambda ours, theirs: distance(ours.q @ (ours.q.mT @ theirs.Q), theirs.Q),
        1e-5,
        flops,
    )


@pytest.mark.parametrize("size", [16, 64])
def test_small_svd(versus: Any, size: int) -> None:
    ms = [normal(size, size, seed).double() for seed in range(256)]
    versus(
        "small_svd",
        f"256 of {size} x {size}",
        lambda: torch.stack([m.s for m in ops.small_svd(ms)]),
        {"torch.linalg.svd, one by one": lambda: torch.stack([torch.linalg.svd(m).S for m in ms])},
        distance,
        1e-13,
    )


def test_soft_threshold(versus: Any, side: int) -> None:
    x = normal(2 * side, side)
    mu = 0.5 * float(torch.linalg.matrix_norm(x, ord=2))

    def by_svd() -> torch.Tensor:
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
        return (u * (s - mu).clamp_min(0)) @ vh

    versus(
        "soft_threshold",
        f"{2 * side} x {side}",
        lambda: ops.soft_threshold(x, mu).y,
        {"torch.linalg.svd": by_svd},
        lambda y, z: float((y - z).norm() / x.norm()),
        1e-6,
    )


def published_tsv_m(tasks: list[torch.Tensor]) -> torch.Tensor:
    """As published: a thin decomposition of every task, and of the two stacks."""
    k = min(tasks[0].shape) // len(tasks)
    parts = [torch.linalg.svd(x, full_matrices=False) for x in tasks]
    left = torch.cat([u[:, :k] for u, _, _ in parts], 1)
    right = torch.cat([vh[:k] for _, _, vh in parts])
    values = torch.cat([s[:k] for _, s, _ in parts])
    return (svd_polar(left) * values) @ svd_polar(right)


def fusion_bench_tsv_m() -> Any:
    """FusionBench's function on one matrix per task, where it is installed, else the same steps in torch."""
    try:
        from fusion_bench.method.task_singular_vector.utils import TSVM_utils
    except ImportError:
        return "T + 2 thin SVDs (torch)", published_tsv_m

    def run(tasks: list[torch.Tensor]) -> torch.Tensor:
        vectors = [{"w": x} for x in tasks]
        with contextlib.redirect_stdout(io.StringIO()):
            found: torch.Tensor = TSVM_utils.compute_and_sum_svd_mem_reduction(vectors, accelerator="cpu")["w"]
        return found

    return "fusion_bench", run


@pytest.mark.parametrize("times", [1, 2])
def test_tsv_m(versus: Any, side: int, times: int) -> None:
    n = times * side
    tasks = [normal(n, n, seed) for seed in range(8)]
    base = torch.zeros(n, n)
    name, peer = fusion_bench_tsv_m()
    versus(
        "tsv_m",
        f"8 of {n} x {n}",
        lambda: mk.merge(tasks, "tsv_m", base=base),
        {name: lambda: peer(tasks)},
        distance,
        1e-4,
    )


@pytest.mark.parametrize("aspect", [1, 4])
def test_iso_c(versus: Any, side: int, aspect: int) -> None:
    tasks = [normal(aspect * side, side, seed) for seed in range(8)]
    base = torch.zeros(aspect * side, side)

    def published() -> torch.Tensor:
        u, s, vh = torch.linalg.svd(sum(tasks[1:], tasks[0]), full_matrices=False)
        return u @ torch.diag(torch.ones_like(s) * s.mean()) @ vh

    versus(
        "iso_c",
        f"8 of {aspect * side} x {side}",
        lambda: mk.merge(tasks, "iso_c", base=base),
        {"svd of the sum (torch)": published},
        distance,
        1e-4,
    )


@pytest.mark.parametrize("method", ["tsv_m", "iso_c"])
def test_methods_on_factors(versus: Any, side: int, method: str) -> None:
    n = 2 * side
    tasks = [Factors(normal(n, 16, seed), normal(16, n, 100 + seed)) for seed in range(8)]
    found = get_matrix(method, "adapters")
    spec = MatrixSpec("w", (n, n), 8, bind_matrix(found, {}, 8, "default"))
    dense_tasks = [f.dense() for f in tasks]

    def published() -> torch.Tensor:
        if method == "tsv_m":
            # What a null space holds is arbitrary there: only the kept triplets of each task are looked at.
            parts = [torch.linalg.svd(x, full_matrices=False) for x in dense_tasks]
            left = torch.cat([u[:, :16] for u, _, _ in parts], 1)
            right = torch.cat([vh[:16] for _, _, vh in parts])
            values = torch.cat([s[:16] for _, s, _ in parts])
            return (svd_polar(left) * values) @ svd_polar(right)
        u, s, vh = torch.linalg.svd(sum(dense_tasks[1:], dense_tasks[0]), full_matrices=False)
        return float(s.mean()) * (u[:, :128] @ vh[:128])

    versus(
        f"{method} of adapters",
        f"8 of {n} x {n}, rank 16",
        lambda: found.merge(spec, tasks).delta,
        {"dense SVDs (torch)": published},
        lambda ours, theirs: distance(ours.dense(), theirs),
        1e-4,
    )
