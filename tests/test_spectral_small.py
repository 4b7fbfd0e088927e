"""`small_svd`, `small_eigh`, `rank_cut`: beside their own definition, in float64."""

from __future__ import annotations

import pytest
import torch

import mergekernels as mk
from mergekernels import ops
from spectra import F64, SPECTRA, gaussian, matrix, orthonormal, values, with_values

SHAPES = [(1, 1), (16, 16), (40, 24), (24, 40), (3, 90), (150, 130)]


def orthogonal(q):
    """||Q^T Q - I||_F over the square root of the count."""
    k = q.shape[1]
    return float((q.mT @ q - torch.eye(k, dtype=F64)).norm()) / max(k, 1) ** 0.5


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", SPECTRA)
def test_svd(kind, shape):
    m = matrix(kind, *shape, dtype=F64)
    made = ops.small_svd(m)
    want = values(kind, min(shape))
    top = max(float(want[0]), 1e-300)
    assert (made.s - want.sort(descending=True).values).abs().max() <= 1e-13 * top
    assert (made.u * made.s @ made.vh - m).norm() <= 1e-13 * max(float(m.norm()), 1e-300)
    assert orthogonal(made.u) <= 1e-13 and orthogonal(made.vh.mT) <= 1e-13
    assert made.rank == int((want > 0).sum())
    only = ops.small_svd(m, want="values")
    assert only.u is None and only.vh is None and only.rank == made.rank
    assert (only.s - made.s).abs().max() <= 1e-13 * top


@pytest.mark.parametrize("size", [1, 16, 60, 140])
@pytest.mark.parametrize("kind", SPECTRA)
def test_eigh(kind, size):
    signs = torch.where(torch.arange(size) % 3 == 1, -1.0, 1.0).to(F64)
    q = orthonormal(size, size)
    want = values(kind, size) * signs
    g = q * want @ q.mT
    made = ops.small_eigh((g + g.mT) / 2)
    top = max(float(want.abs().max()), 1e-300)
    assert (made.values - want.sort(descending=True).values).abs().max() <= 1e-13 * top
    assert (made.vectors * made.values @ made.vectors.mT - g).norm() <= 1e-13 * max(float(g.norm()), 1e-300)
    assert orthogonal(made.vectors) <= 1e-13
    assert made.rank == int((want != 0).sum())


def test_eigh_reads_the_lower_triangle():
    g = gaussian(6, 6)
    whole = g.tril() + g.tril(-1).mT
    assert torch.equal(ops.small_eigh(g).values, ops.small_eigh(whole).values)


def test_signs_do_not_depend_on_the_routine():
    """The largest entry of each left vector is positive, whatever sign the input had."""
    m = matrix("gap", 30, 20, dtype=F64)
    for x in (m, -m, m * 3):
        u = ops.small_svd(x).u
        assert (u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all()
    v = ops.small_eigh(m @ m.mT).vectors
    assert (v.gather(0, v.abs().argmax(0, keepdim=True)) > 0).all()
    assert (ops.small_svd(m).u - ops.small_svd(-m).u).abs().max() < 1e-10


def test_lists_of_unequal_shapes():
    ms = [matrix(kind, *shape, dtype=F64) for kind in SPECTRA for shape in SHAPES] * 2
    for m, made in zip(ms, ops.small_svd(ms), strict=True):
        alone = ops.small_svd(m)
        assert made.rank == alone.rank
        assert (made.s - alone.s).abs().max() <= 1e-14 * max(float(alone.s[0]), 1e-300)
        assert (made.u * made.s @ made.vh - m).norm() <= 1e-13 * max(float(m.norm()), 1e-300)
    gs = [m @ m.mT for m in ms]
    for g, made in zip(gs, ops.small_eigh(gs), strict=True):
        assert (made.vectors * made.values @ made.vectors.mT - g).norm() <= 1e-13 * max(float(g.norm()), 1e-300)
    assert ops.small_svd([]) == [] and ops.small_eigh([]) == []


def test_empty_sides():
    made = ops.small_svd(torch.zeros(0, 3))
    assert made.u.shape == (0, 0) and made.vh.shape == (0, 3) and made.rank == 0
    assert ops.small_eigh(torch.zeros(0, 0)).rank == 0


def test_rank():
    """By default what float32 data can tell; by `tol` anything."""
    s = torch.tensor([1.0, 1e-3, 2e-5, 1e-7, 1e-12], dtype=F64)
    m = with_values(s, 12, 9)
    assert ops.small_svd(m).rank == 3
    assert ops.small_svd(m, tol=1e-14).rank == 5 and ops.small_svd(m, tol=1e-8).rank == 4
    assert ops.small_svd(m, tol=0.01).rank == 1
    assert ops.small_svd(m * 1e-30).rank == 3
    g = orthonormal(5, 5) * s @ orthonormal(5, 5).mT
    assert ops.small_eigh(g, tol=1e-4).rank == 2 and ops.small_eigh(g).rank == 5


def test_rank_cut():
    eps32, eps64 = 2.0**-23, 2.0**-52
    assert ops.rank_cut(10, 7) == 10 * eps32 == ops.rank_cut(7, 10, torch.float32)
    assert ops.rank_cut(4096, 4096) == 1e-5  # capped: genuine directions of a large square matrix stay
    assert ops.rank_cut(4096, 1, torch.float64) == 4096 * eps64
    assert ops.rank_cut(0, 0) > 0


def test_bad_input():
    def code(function, *args, **kwargs):
        with pytest.raises(mk.MergeError) as info:
            function(*args, **kwargs)
        return info.value.code, str(info.value)

    m = gaussian(4, 4)
    m[2, 1] = float("nan")
    assert code(ops.small_svd, [gaussian(2, 2), m])[0] == "data.nonfinite"
    assert "M[1]" in code(ops.small_svd, [gaussian(2, 2), m])[1]
    assert "G" in code(ops.small_eigh, m)[1]
    assert code(ops.small_eigh, gaussian(4, 3))[0] == "matrix.square"
    assert code(ops.small_svd, gaussian(4, 3), want="u")[0] == "argument"
    assert code(ops.small_svd, gaussian(4, 3), tol=2.0)[0] == "argument"
    assert code(ops.small_svd, torch.zeros(2, 2, 2))[0] == "matrix.dimension"
