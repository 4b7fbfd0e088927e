"""Triplets of matrices that change little from call to call."""

from __future__ import annotations

import pytest
import torch

import spectral_brute as brute
from mergekernels import ops
from mergekernels.ops.spectral import above
from mergekernels.ops.spectral.follow import followed


def drifting(m: int, n: int, step: int, power: float = 1.0) -> torch.Tensor:
    x = brute.with_spectrum(m, n, [(i + 1.0) ** -power for i in range(n)], 3, torch.float32)
    low = brute.with_spectrum(m, n, [0.02 * 0.9**i for i in range(30)], 50 + step, torch.float32)
    return x + low


def shrunk(x: torch.Tensor, mu: float) -> torch.Tensor:
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    return (u * (s - mu).clamp_min(0)) @ vh


@pytest.mark.parametrize("shape", [(420, 400), (400, 640)])
def test_every_step_is_within_the_promise(shape, monkeypatch):
    calls = []
    monkeypatch.setattr(above, "followed", lambda *a: calls.append(followed(*a)) or calls[-1])
    warm, mu = None, 0.05
    for step in range(3):
        x = drifting(*shape, step) if shape[0] >= shape[1] else drifting(*shape[::-1], step).T.contiguous()
        found = ops.soft_threshold(x, mu, warm=warm)
        want = shrunk(x, mu)
        assert found.route == "above" and found.rank == int((torch.linalg.svdvals(x.double()) > mu).sum())
        assert float((found.y - want).norm() / x.norm()) <= 1e-6
        warm = found.basis
    assert len(calls) == 2 and all(c is not None for c in calls)


def test_a_strong_direction_that_the_basis_lacks_is_found():
    x = drifting(420, 400, 0)
    basis = ops.soft_threshold(x, 0.05).basis
    outside = torch.randn(400, 1, generator=torch.Generator().manual_seed(9))
    outside = outside - basis @ (basis.T @ outside)
    left = torch.randn(420, 1, generator=torch.Generator().manual_seed(8))
    changed = x + 0.9 * (left / left.norm()) @ (outside / outside.norm()).T
    found = ops.soft_threshold(changed, 0.05, warm=basis)
    assert float((found.y - shrunk(changed, 0.05)).norm() / changed.norm()) <= 1e-6


def test_what_cannot_be_followed():
    x = drifting(420, 400, 0)
    basis = ops.soft_threshold(x, 0.05).basis
    tau = 0.05
    assert followed(x, basis, lambda s: tau, 4e-7) is not None
    assert followed(x, basis[:, :10], lambda s: tau, 4e-7) is None  # all of it is above the threshold
    assert followed(x, basis, lambda s: 10.0, 4e-7) is None  # nothing is
    assert followed(x, torch.eye(400)[:, :60], lambda s: tau, 1e-12) is None  # more exact than float32
