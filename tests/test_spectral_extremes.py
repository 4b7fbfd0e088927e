"""Truncations of spectra with a far head, and of matrices whose squares leave the range of float32."""

import math

import pytest
import torch

from mergekernels import ops
from mergekernels.adapters.model import Factors

F64 = torch.float64


def orthogonal(rows, cols, seed):
    return torch.linalg.qr(torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed), dtype=F64))[0]


def headed(head, tail):
    """(340, 300) with one value far above 1, 1/2, 1/3, ... or about 1."""
    i = torch.arange(1, 301, dtype=F64)
    s = torch.where(i == 1, float(head), 1 / i if tail == "decay" else 1 + i / 1000)
    return ((orthogonal(340, 300, 1) * s) @ orthogonal(300, 300, 2).T).float()


def least(x, k):
    """The least error of rank k, and the norm."""
    s = torch.linalg.svdvals(x.to(F64))
    k = min(k, int((s > 1e-5 * s[0]).sum()))
    return float(s[k:].square().sum().sqrt()), float(s.square().sum().sqrt())


@pytest.mark.parametrize("head", [1e2, 1e3, 1e4])
def test_weak_directions_beside_a_far_head(head):
    x = headed(head, "decay")
    for k in (4, 16):
        best, norm = least(x, k)
        found = ops.lowrank(x, rank=k)
        error = float((x.to(F64) - found.factors.b.to(F64) @ found.factors.a.to(F64)).norm())
        assert error <= (1 + 1e-4) * best + 1e-6 * norm
        basis = ops.subspace(x, k).basis.to(F64)
        assert float((x.to(F64) - x.to(F64) @ basis @ basis.T).norm()) <= (1 + 1e-4) * best + 1e-6 * norm


@pytest.mark.parametrize("energy", [0.9999985, 1.0])
def test_the_energy_asked_for_beside_a_far_head(energy):
    x = headed(1e4, "flat")
    squares = torch.linalg.svdvals(x.to(F64)).square()
    wanted = int((squares.cumsum(0) < energy * squares.sum() * (1 - 1e-12)).sum()) + 1
    found = ops.lowrank(x, energy=energy)
    assert abs(found.factors.rank - min(wanted, 300)) <= 1
    assert found.kept_energy >= energy - 1e-12


@pytest.mark.parametrize("scale", [2.0**-84, 2.0**84, 2.0**120])
def test_scales_whose_squares_leave_float32(scale):
    x = torch.randn(200, 150, generator=torch.Generator().manual_seed(3))
    plain, far = ops.lowrank(x, rank=3), ops.lowrank(x * scale, rank=3)
    torch.testing.assert_close(far.singular_values / scale, plain.singular_values, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(far.factors.b @ (far.factors.a / scale), plain.factors.b @ plain.factors.a)
    assert math.isclose(far.error, plain.error, rel_tol=1e-6)
    for side in ("left", "right"):
        basis = [ops.subspace(y, 4, side=side, accuracy="subspace").basis for y in (x, x * scale)]
        torch.testing.assert_close(basis[1] @ basis[1].T, basis[0] @ basis[0].T, rtol=0.0, atol=1e-5)
    assert abs(ops.lowrank(x * scale, energy=0.5).factors.rank - ops.lowrank(x, energy=0.5).factors.rank) <= 1


def test_scales_of_products_and_mixes():
    g = torch.Generator().manual_seed(4)
    f, d = (
        Factors(torch.randn(300, 20, generator=g), torch.randn(20, 280, generator=g)),
        torch.randn(300, 280, generator=g),
    )
    for scale in (2.0**-84, 2.0**84):
        far = ops.Mix([(1.0, Factors(f.b * scale, f.a))], [(0.5, d * scale)])
        near = ops.Mix([(1.0, f)], [(0.5, d)])
        for route in ("implicit", "dense", "whole"):
            assert math.isclose(
                ops.lowrank(far, 3, route=route).error, ops.lowrank(near, 3, route=route).error, rel_tol=1e-5
            )


def test_polar_of_a_matrix_whose_norm_float32_does_not_hold():
    x = torch.randn(300, 300, generator=torch.Generator().manual_seed(5)) + 20 * torch.eye(300)
    for route in ("auto", "svd"):
        far, near = ops.polar(x * 2.0**123, route=route, nuclear=True), ops.polar(x, route=route, nuclear=True)
        assert far.rank == near.rank == 300
        assert math.isclose(far.nuclear / 2.0**123, near.nuclear, rel_tol=1e-5)
        torch.testing.assert_close(far.p, near.p, rtol=0.0, atol=1e-4)
