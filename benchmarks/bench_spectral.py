"""Ops over matrices beside what they replace, both in turn in one run, results compared before anything is timed.

`pytest bench_spectral.py [--quick] [--results FILE]` in this folder; the rows go into the section "spectral" of a file.
Every thread of the machine is used, by both sides. Data are float32 matrices with independent normal entries (square:
condition 1e3 to 1e4; aspect 4: condition 3) unless a case says otherwise.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mergekernels import ops
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
        "polar", f"{aspect * side} x {side}", lambda: ops.polar(x).p, {"torch.linalg.svd": lambda: svd_polar(x)},
        distance, 1e-4,
    )  # fmt: skip


@pytest.mark.parametrize("route", ["gram", "svd", "qdwh", "newton_schulz"])
def test_polar_routes(versus: Any, side: int, route: Any) -> None:
    x = normal(side, side)
    versus(
        f"polar {route}", f"{side} x {side}", lambda: ops.polar(x, route=route).p,
        {"torch.linalg.svd": lambda: svd_polar(x)}, distance, 1e-4,
    )  # fmt: skip


def test_polar_list(versus: Any, side: int) -> None:
    xs = [normal(side // 2, side // 2, seed) for seed in range(8)]
    versus(
        "polar", f"8 of {side // 2} x {side // 2}", lambda: torch.stack([p.p for p in ops.polar(xs)]),
        {"torch.linalg.svd": lambda: torch.stack([svd_polar(x) for x in xs])}, distance, 1e-4,
    )  # fmt: skip


def test_polar_factors(versus: Any, side: int) -> None:
    parts = Factors(normal(2 * side, 64), normal(64, 2 * side, 1))
    versus(
        "polar", f"rank 64 of {2 * side} x {2 * side}", lambda: ops.polar(parts).p.dense(),
        {"QR, QR, svd (torch)": lambda: qr_polar(parts)}, distance, 1e-5,
    )  # fmt: skip


def qr_polar(parts: Factors) -> torch.Tensor:
    left, r = torch.linalg.qr(parts.b)
    right, s = torch.linalg.qr(parts.a.mT)
    u, _, vh = torch.linalg.svd(r @ s.mT)
    return left @ (u @ vh) @ right.mT


def test_tall_qr(versus: Any, side: int) -> None:
    x = normal(4 * side, side // 8)
    flops = 4 * x.numel() * x.shape[1]
    versus(
        "tall_qr", f"{4 * side} x {side // 8}", lambda: ops.tall_qr(x),
        {"torch.linalg.qr": lambda: torch.linalg.qr(x)},
        lambda ours, theirs: distance(ours.q @ (ours.q.mT @ theirs.Q), theirs.Q), 1e-5, flops,
    )  # fmt: skip


@pytest.mark.parametrize("size", [16, 64])
def test_small_svd(versus: Any, size: int) -> None:
    ms = [normal(size, size, seed).double() for seed in range(256)]
    versus(
        "small_svd", f"256 of {size} x {size}", lambda: torch.stack([m.s for m in ops.small_svd(ms)]),
        {"torch.linalg.svd, one by one": lambda: torch.stack([torch.linalg.svd(m).S for m in ms])}, distance, 1e-13,
    )  # fmt: skip


def test_soft_threshold(versus: Any, side: int) -> None:
    x = normal(2 * side, side)
    mu = 0.5 * float(torch.linalg.matrix_norm(x, ord=2))

    def by_svd() -> torch.Tensor:
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
        return (u * (s - mu).clamp_min(0)) @ vh

    versus(
        "soft_threshold", f"{2 * side} x {side}", lambda: ops.soft_threshold(x, mu).y,
        {"torch.linalg.svd": by_svd}, lambda y, z: float((y - z).norm() / x.norm()), 1e-6,
    )  # fmt: skip
