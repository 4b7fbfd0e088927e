"""Ops over matrices beside what they replace, both in turn in one run, results compared before anything is timed.

`pytest bench_spectral.py [--quick] [--results FILE]` in this folder; the rows go into the section "spectral" of a file.
MERGEKERNELS_FUSIONBENCH_ENV=DIR, made by `make_peer_env.sh DIR fusionbench`, adds FusionBench itself as a peer.
Every thread of the machine is used, by both sides. Data are float32 matrices with independent normal entries (square:
condition 1e3 to 1e4; aspect 4: condition 3) unless a case says otherwise.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fusion_peer import Peer, available

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


def published_iso_c(tasks: list[torch.Tensor]) -> torch.Tensor:
    """As published: a thin decomposition of the sum."""
    u, s, vh = torch.linalg.svd(sum(tasks[1:], tasks[0]), full_matrices=False)
    return u @ torch.diag(torch.ones_like(s) * s.mean()) @ vh


def beside_fusion_bench(versus: Any, tmp_path: Path, method: str, tasks: list[torch.Tensor], theirs: Any) -> None:
    """A method beside its published steps in torch, and beside FusionBench itself where its environment is named."""
    m, n = tasks[0].shape
    base = torch.zeros(m, n)
    peers = {"its SVDs (torch)": lambda: theirs(tasks)} if theirs else {}
    process = Peer(tasks, tmp_path) if available() else None
    if process:
        peers["FusionBench"] = lambda: process.run(method)

    def error(mine: torch.Tensor, other: Any) -> float:
        return distance(mine, other.result() if isinstance(other, Peer) else other)

    if not peers:
        pytest.skip("MERGEKERNELS_FUSIONBENCH_ENV names no environment with FusionBench, the only peer")
    try:
        versus(method, f"8 of {m} x {n}", lambda: mk.merge(tasks, method, base=base), peers, error, 1e-4)
    finally:
        if process:
            process.close()


@pytest.mark.parametrize("times", [1, 2])
def test_tsv_m(versus: Any, tmp_path: Path, side: int, times: int) -> None:
    n = times * side
    beside_fusion_bench(versus, tmp_path, "tsv_m", [normal(n, n, seed) for seed in range(8)], published_tsv_m)


@pytest.mark.parametrize("shape", [(1, 1), (4, 1), (1, 4)])
def test_iso_c(versus: Any, tmp_path: Path, side: int, shape: tuple[int, int]) -> None:
    m, n = shape[0] * side, shape[1] * side
    beside_fusion_bench(versus, tmp_path, "iso_c", [normal(m, n, seed) for seed in range(8)], published_iso_c)


def test_iso_cts(versus: Any, tmp_path: Path, side: int) -> None:
    """The sum of the tasks has a gap where the common space ends: between equal values it would be arbitrary."""
    n = side
    u, v = (torch.linalg.qr(normal(n, n, seed))[0] for seed in (90, 91))
    fall = torch.where(torch.arange(n) < n - 8 * round((n - int(0.8 * n)) / 8), 4.0, 1.0)
    tasks = [(u * fall * torch.linspace(1.5, 1.0, n)) @ v.mT + 0.3 * n**-0.5 * normal(n, n, seed) for seed in range(8)]
    beside_fusion_bench(versus, tmp_path, "iso_cts", tasks, None)


@pytest.mark.parametrize("times", [1, 2])
def test_lore(versus: Any, side: int, times: int) -> None:
    """Twenty sweeps over four task vectors with singular values 1 / i, of which about 40 are above the threshold."""
    n, mu, sweeps = times * side, 0.02, 20
    falling = torch.arange(1, n + 1) ** -1.0

    def task(seed: int) -> torch.Tensor:
        u, v = (torch.linalg.qr(normal(n, n, 2 * seed + i))[0] for i in range(2))
        return (u * falling) @ v.mT

    tasks = [task(seed) for seed in range(4)]
    base = torch.zeros(n, n)
    if times > 1:
        versus.rounds = 1

    def by_svd() -> torch.Tensor:
        deviations = [torch.zeros_like(x) for x in tasks]
        for _ in range(sweeps):
            centre = sum(x - d for x, d in zip(tasks, deviations, strict=True)) / len(tasks)
            for t, x in enumerate(tasks):
                u, s, vh = torch.linalg.svd(x - centre, full_matrices=False)
                deviations[t] = (u * (s - mu).clamp_min(0)) @ vh
        centre = sum(x - d for x, d in zip(tasks, deviations, strict=True)) / len(tasks)
        return centre + 0.5 * sum(deviations) / len(tasks)

    versus(
        "lore",
        f"4 of {n} x {n}, {sweeps} sweeps",
        lambda: mk.merge(tasks, "lore", base=base, mu=mu, iterations=sweeps, tau_scale=0.5),
        {"the same with SVDs (torch)": by_svd},
        distance,
        1e-5,
    )


@pytest.mark.parametrize(("method", "times"), [("tsv_m", 2), ("iso_c", 2), ("iso_c", 4)])
def test_methods_on_factors(versus: Any, side: int, method: str, times: int) -> None:
    n = times * side
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
