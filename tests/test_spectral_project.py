"""`project` and `osrm_init` beside their definitions in float64."""

from __future__ import annotations

import pytest
import torch

from mergekernels import ops
from mergekernels.errors import ArgumentError, DataError
from spectra import F64, gaussian, matrix, orthonormal, relative

KINDS = ("block", "left", "right", "keep", "outer")


def defined(g, u, v, kind):
    g, p, q = g.to(F64), u.to(F64) @ u.to(F64).mT, v.to(F64) @ v.to(F64).mT
    eye_m, eye_n = torch.eye(len(p), dtype=F64), torch.eye(len(q), dtype=F64)
    return {
        "block": g - p @ g @ q,
        "left": (eye_m - p) @ g,
        "right": g @ (eye_n - q),
        "keep": p @ g @ q,
        "outer": (eye_m - p) @ g @ (eye_n - q),
    }[kind]


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 7, 40])
def test_definition_and_idempotence(kind, k, dtype):
    g = gaussian(60, 45).to(dtype)
    u, v = orthonormal(60, k, 1).to(dtype), orthonormal(45, k, 2).to(dtype)
    y = ops.project(g, u, v, kind)
    bound = 1e-6 if dtype == torch.float32 else 1e-13
    assert y.dtype == dtype and float((y.to(F64) - defined(g, u, v, kind)).norm()) <= bound * float(g.norm())
    again = ops.project(y, u, v, kind)
    assert float((again - y).norm()) <= bound * float(g.norm())


def test_nothing_is_left_in_the_block():
    """Also with bases that are orthonormal to 1e-6 only: the second pass."""
    g = gaussian(80, 50).float()
    u = (orthonormal(80, 10, 1) + 3e-7 * gaussian(80, 10, 3)).float()
    v = (orthonormal(50, 10, 2) + 3e-7 * gaussian(50, 10, 4)).float()
    for kind in ("block", "left", "right", "outer"):
        y = ops.project(g, u, v, kind)
        left = u.to(F64).mT @ y.to(F64) @ v.to(F64)
        assert float(left.norm()) <= 2e-7 * float(g.norm())


def test_block_is_not_left_then_right():
    g, u, v = gaussian(30, 20).float(), orthonormal(30, 5, 1).float(), orthonormal(20, 5, 2).float()
    both = ops.project(ops.project(g, u, kind="left"), None, v, "right")
    assert relative(both, ops.project(g, u, v, "outer")) < 1e-6
    assert relative(both, ops.project(g, u, v, "block")) > 0.1


def test_the_complement_by_its_own_basis():
    whole = orthonormal(40, 40, 5)
    g = gaussian(40, 30).float()
    u, rest = whole[:, :30].float(), whole[:, 30:].float()
    assert relative(ops.project(g, rest, kind="keep"), ops.project(g, u, kind="left")) < 1e-6
    v = orthonormal(30, 4, 6).float()
    assert relative(ops.project(g, None, v, "keep") + ops.project(g, None, v, "right"), g) < 1e-6


@pytest.mark.parametrize("dim", [0, 1])
def test_shards_and_lists(dim):
    g, u, v = gaussian(50, 40).float(), orthonormal(50, 6, 1).float(), orthonormal(40, 6, 2).float()
    parts = ops.Sharded(g.split(17, dim), dim)
    cut = ops.project(parts, u, v, "block")
    assert cut.dim == dim and cut.sizes == parts.sizes
    whole = ops.project(g, u, v, "block")
    assert relative(cut.dense(), whole) < 1e-6
    small = gaussian(9, 8).float()
    several = ops.project([g, small, g], [u, None, u], [v, orthonormal(8, 2, 3).float(), v], "keep")
    # One thread for each of a list, all of them for one matrix: sums may be cut differently.
    assert relative(several[0], ops.project(g, u, v, "keep")) < 1e-6
    assert several[1].shape == (9, 8) and relative(several[0], several[2]) < 1e-6


def test_half_precision_in_half_precision_out():
    g = gaussian(30, 20).bfloat16()
    u = orthonormal(30, 4, 1).float()
    y = ops.project(g, u, kind="left")
    assert y.dtype == torch.bfloat16
    want = defined(g.float(), u, torch.zeros(20, 1), "left")
    assert torch.equal(y, want.float().bfloat16()) or relative(y, want) < 4e-3


def test_bad_bases_are_refused():
    g, u = gaussian(30, 20).float(), orthonormal(30, 4, 1).float()
    with pytest.raises(ArgumentError, match="orthonormal"):
        ops.project(g, u * 1.01, kind="left")
    with pytest.raises(ArgumentError, match="does not fit"):
        ops.project(g, None, u, "right")
    with pytest.raises(ArgumentError, match="needs v"):
        ops.project(g, u, kind="block")
    with pytest.raises(ArgumentError, match="u, v or both"):
        ops.project(g, None, None, "keep")
    with pytest.raises(ArgumentError, match="kind"):
        ops.project(g, u, kind="up")
    with pytest.raises(ArgumentError, match="one basis per matrix"):
        ops.project([g, g], [u], kind="left")
    g[3, 4] = float("nan")
    with pytest.raises(DataError, match="G"):
        ops.project(g, u, kind="left")


@pytest.mark.parametrize("samples", [5, 20, 60, 200])
@pytest.mark.parametrize("rank", [1, 8, 40])
def test_osrm_sees_least(samples, rank):
    """The sum of the least eigenvalues, also where H leaves no free direction."""
    h = matrix("decay", samples, 40, seed=samples)
    a = ops.osrm_init(h, rank)
    assert a.shape == (rank, 40) and a.dtype == torch.float32
    assert float((a.to(F64) @ a.to(F64).mT - torch.eye(rank)).norm()) <= 1e-6 * rank**0.5
    least = torch.linalg.eigvalsh(h.to(F64).mT @ h.to(F64))[:rank].clamp_min(0).sum()
    seen = float((a.to(F64) @ h.to(F64).mT).norm() ** 2)
    assert abs(seen - float(least)) <= 1e-6 * float(h.norm()) ** 2


def test_osrm_seeds_stacks_and_centres():
    h = matrix("flat", 12, 40)
    a, same, other = ops.osrm_init(h, 4, seed=1), ops.osrm_init(h, 4, seed=1), ops.osrm_init(h, 4, seed=2)
    assert torch.equal(a, same) and relative(a, other) > 0.5
    assert torch.equal(a, ops.osrm_init([h[:5], h[5:]], 4, seed=1))
    assert float((a @ h.mT).norm()) <= 1e-6 * float(h.norm())
    shifted = h + 3.0
    centred = ops.osrm_init(shifted, 4, seed=1, centre=True)
    assert float((centred @ (shifted - shifted.mean(0)).mT).norm()) <= 1e-5 * float(h.norm())
    assert float((centred @ shifted.mT).norm()) > 0.1
    with pytest.raises(ArgumentError, match="rank"):
        ops.osrm_init(h, 41)
    with pytest.raises(ArgumentError, match="width"):
        ops.osrm_init([h, h[:, :3]], 2)
