"""`subspace` beside singular value decompositions in float64: quality, angles, energy, restarts of every kind."""

from __future__ import annotations

import pytest
import torch

from mergekernels import ops
from mergekernels.adapters.model import Factors
from mergekernels.errors import ArgumentError, DataError
from mergekernels.ops.spectral import _krylov, _pairs
from mergekernels.ops.spectral._krylov import Want, krylov
from mergekernels.ops.spectral._maps import DenseMap
from spectra import F64, SPECTRA, angle, factors, gaussian, matrix, orthonormal, svd, with_values

SHAPES = {"right": (260, 220), "left": (220, 300)}


def iterated(monkeypatch):
    """Every call iterates, however small the matrix."""
    monkeypatch.setattr(_pairs, "cheapest", lambda x, *_: "dense")


def excess(x, basis, side="right"):
    """||X - X W W^T|| beyond what the op promises, over ||X||."""
    x, w = x.to(F64), torch.linalg.qr(basis.to(F64))[0]
    x = x if side == "right" else x.mT
    best = float(svd(x)[1][w.shape[1] :].square().sum()) ** 0.5
    size = max(float(x.norm()), 1e-300)
    return (float((x - x @ w @ w.mT).norm()) - (1 + 1e-4) * best - 1e-6 * size) / size


def rank_of(x, cut=1e-5):
    s = svd(x)[1]
    return int((s > cut * s[0]).sum())


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_quality(spectrum, side, monkeypatch):
    m, n = SHAPES[side]
    x = matrix(spectrum, m, n)
    s = svd(x)[1]
    for route in ("chosen", "iterated"):
        if route == "iterated":
            iterated(monkeypatch)
        for k, accuracy in ((1, "energy"), (20, "energy"), (20, "subspace"), (45, "energy")):
            found = ops.subspace(x, k=k, side=side, accuracy=accuracy)
            size = min(k, rank_of(x))
            assert found.basis.shape == (n if side == "right" else m, size) and found.basis.dtype == torch.float32
            gram = found.basis.to(F64).mT @ found.basis.to(F64)
            assert float((gram - torch.eye(size)).norm()) <= 1e-7 * max(1, size) ** 0.5
            assert excess(x, found.basis, side) <= 0
            if size:
                off = float((found.ritz - s[:size].square()).abs().max()) / float(s[0]) ** 2
                assert off <= (1e-2 if accuracy == "energy" else 1e-6)
                assert abs(found.captured - float(found.ritz.sum() / s.square().sum())) <= 1e-6


def test_no_dimension():
    for x in (matrix("gap", 30, 20), torch.zeros(5, 4), torch.zeros(0, 4)):
        found = ops.subspace(x, k=0, side="left")
        assert found.basis.shape == (len(x), 0) and found.ritz.shape == (0,) and found.gap == 0.0
    assert ops.subspace(torch.zeros(5, 4), k=3).captured == 1.0


@pytest.mark.parametrize("spectrum", [s for s in SPECTRA if s not in ("zero", "degenerate")])
def test_the_subspace_itself(spectrum, monkeypatch):
    """Angles of all directions but those at a cut without a gap: float32 products leave eps sigma_1 / gap."""
    iterated(monkeypatch)
    for m, n in SHAPES.values():
        x = matrix(spectrum, m, n)
        u, s, vh = svd(x)
        for k in (5, 24):
            for side, true in (("right", vh[:k].mT), ("left", u[:, :k])):
                found = ops.subspace(x, k=k, side=side, accuracy="subspace")
                gap = float((s[k - 1] - s[k]) / s[0])
                assert angle(found.basis, true) <= 2e-6 / gap
                assert found.gap == pytest.approx(float(s[k] / s[k - 1]), abs=2e-2)
                assert found.rounds >= 1 and found.residual < 1e-3


def test_warm_starts_save_products_and_change_nothing():
    x = matrix("flat", 500, 400)
    near = ops.subspace(x, k=20, accuracy="subspace").basis
    for strict, share, size in ((True, 1.0, 1e-4), (False, 0.5, 1e-6)):
        moved = DenseMap(x + size * gaussian(500, 400, 3).float())
        true = svd(moved.x)[2][:20].mT
        want = Want(20, None, moved.norm2, 1e-5)
        cold, warm = (krylov(moved, want, strict, 1e-5, start, 0) for start in (None, near))
        assert cold is not None and warm is not None
        assert warm.columns <= share * cold.columns
        if strict:
            assert angle(torch.linalg.qr(warm.basis[:, :20])[0], true) < 1e-3
        else:
            assert excess(moved.x, warm.basis[:, :20]) <= 0
    far = ops.subspace(x, k=20, accuracy="subspace", warm=orthonormal(400, 7, 9).float())
    assert angle(far.basis, svd(x)[2][:20].mT) < 1e-3
    left = ops.subspace(x, k=20, side="left", accuracy="subspace", warm=svd(x)[0][:, :20].float())
    assert angle(left.basis, svd(x)[0][:, :20]) < 1e-3


@pytest.mark.parametrize("spectrum", [s for s in SPECTRA if s != "zero"])
@pytest.mark.parametrize("energy", [0.3, 0.9, 0.9999, 1.0])
def test_energy_takes_the_least_dimension(spectrum, energy, monkeypatch):
    for choose in (False, True):
        if choose:
            iterated(monkeypatch)
        x = matrix(spectrum, 240, 200)
        s = svd(x)[1]
        shares = torch.cumsum(s.square(), 0) / s.square().sum()
        found = ops.subspace(x, energy=energy)
        k = found.basis.shape[1]
        assert found.captured >= energy - 1e-6
        if energy < 1.0:
            assert k == int((shares < energy).sum()) + 1
        else:
            assert k == rank_of(x)
        assert ops.subspace(x, k=3, energy=energy).basis.shape[1] == min(3, k)


@pytest.mark.parametrize("copies", [5, 40, 100])
def test_more_copies_than_a_block_holds(copies, monkeypatch):
    """Equal singular values: an invariant subspace is complete before all copies are in it."""
    iterated(monkeypatch)
    i = torch.arange(200, dtype=F64)
    for low in (0.0, 1e-3, 0.3):
        x = with_values(torch.where(i < copies, 1.0, low * (1 - i / 400)), 260, 200).float()
        for k in (4, 30, 50):
            found = ops.subspace(x, k=k, accuracy="subspace")
            assert excess(x, found.basis) <= 0
            if low == 0.0:
                assert found.basis.shape[1] == min(k, copies)
    two = with_values(torch.where(torch.arange(300) < copies, 1.0, 0.5).to(F64), 300, 300).float()
    for k in (20, 45):
        for accuracy in ("energy", "subspace"):
            assert excess(two, ops.subspace(two, k=k, accuracy=accuracy).basis) <= 0
    eye = ops.subspace(torch.eye(200), k=30)
    assert torch.allclose(eye.ritz, torch.ones(30, dtype=F64), atol=1e-6) and eye.gap == pytest.approx(1.0)


def test_a_hidden_half_is_found():
    """Two diagonal blocks: the start must have weight in both."""
    x = torch.block_diag(matrix("decay", 150, 150), 1.5 * matrix("decay", 150, 150, 5))
    found = ops.subspace(x, k=12, accuracy="subspace")
    assert angle(found.basis, svd(x)[2][:12].mT) < 1e-4


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("shape", SHAPES.values())
def test_shards(shape, dim):
    x = matrix("gap", *shape)
    cut = ops.Sharded(x.split(77, dim), dim)
    k = min(shape) // 3
    for side in ("right", "left"):
        whole = ops.subspace(x, k=k, side=side, accuracy="subspace")
        parts = ops.subspace(cut, k=k, side=side, accuracy="subspace")
        assert angle(parts.basis, whole.basis) < 1e-5
        assert parts.captured == pytest.approx(whole.captured, abs=1e-7)
    assert DenseMap(cut).norm2 == DenseMap(x).norm2


def test_factors_mixes_and_lists():
    b, a = factors("decay", 120, 90, 12)
    product = Factors(b, a)
    extra = matrix("gap", 120, 90)
    mix = ops.Mix(factors=[(2.0, product)], dense=[(-0.5, extra)])
    dense = [product.dense().to(F64), 2.0 * product.dense().to(F64) - 0.5 * extra.to(F64), extra.to(F64)]
    found = ops.subspace([product, mix, extra], k=[5, 9, 30], accuracy="subspace")
    for x, one, k in zip(dense, found, (5, 9, 30), strict=True):
        assert angle(one.basis, svd(x)[2][:k].mT) < 1e-4
    assert ops.subspace(product, k=90).basis.shape == (90, 12)


@pytest.mark.parametrize("spectrum", ["gap", "decay", "ill"])
def test_float64_stays_float64(spectrum, monkeypatch):
    for choose in (False, True):
        if choose:
            iterated(monkeypatch)
        x = matrix(spectrum, 300, 250, dtype=F64)
        found = ops.subspace(x, k=20, accuracy="subspace", tol=1e-12)
        s, true = svd(x)[1], svd(x)[2][:20].mT
        assert found.basis.dtype == F64
        assert angle(found.basis, true) <= 1e-11 * float(s[0] / (s[19] - s[20]))


def test_same_seed_same_bits():
    x = matrix("flat", 400, 350)
    first, again, other = (ops.subspace(x, k=10, seed=s) for s in (1, 1, 2))
    assert torch.equal(first.basis, again.basis) and not torch.equal(first.basis, other.basis)
    together = ops.subspace([x, x, x], k=10, seed=1)
    assert all(torch.equal(one.basis, first.basis) for one in together)


def test_scaling_and_rotation():
    """Scaling by a power of two keeps every bit; rotating X on the left keeps the right subspace."""
    x = matrix("gap", 220, 210)
    found = ops.subspace(x, k=20)
    for scale in (2.0**40, 2.0**-40):
        scaled = ops.subspace(x * scale, k=20)
        assert torch.equal(scaled.basis, found.basis) and torch.equal(scaled.ritz, found.ritz * scale**2)
    turned = ops.subspace(orthonormal(220, 220, 7).float() @ x, k=70, accuracy="subspace")
    assert angle(turned.basis, ops.subspace(x, k=70, accuracy="subspace").basis) < 1e-5


def test_work_on_a_flat_spectrum():
    """Far fewer products than a filter of the same accuracy needs (42 per vector)."""
    x = DenseMap(matrix("flat", 600, 600))
    found = krylov(x, Want(75, None, x.norm2, 1e-5), True, 1e-5, None, 0)
    assert found is not None and found.columns <= 9 * 75


def test_when_iteration_gives_up_the_whole_is_decomposed(monkeypatch):
    x = matrix("flat", 200, 150)
    monkeypatch.setattr(_krylov, "MAX_ROUNDS", 0)
    iterated(monkeypatch)
    found = ops.subspace(x, k=10, accuracy="subspace")
    assert found.rounds == 0 and angle(found.basis, svd(x)[2][:10].mT) < 1e-5


def test_bad_arguments():
    x = matrix("flat", 30, 20)
    for kwargs, word in (
        ({}, "neither k nor energy"),
        ({"k": 21}, "k is out of range"),
        ({"k": -1}, "k is out of range"),
        ({"energy": 0.0}, "energy"),
        ({"energy": 1.5}, "energy"),
        ({"k": 2, "side": "top"}, "side"),
        ({"k": 2, "accuracy": "best"}, "accuracy"),
        ({"k": 2, "tol": 0.0}, "tol"),
        ({"k": 2, "warm": x}, "warm"),
        ({"k": [1, 2]}, "one number or one per matrix"),
    ):
        with pytest.raises(ArgumentError, match=word):
            ops.subspace(x, **kwargs)
    bad = x.clone()
    bad[4, 5] = float("inf")
    with pytest.raises(DataError, match=r"X\[1\]"):
        ops.subspace([x, bad], k=2)
    with pytest.raises(ArgumentError):
        ops.subspace(x[0], k=1)
    with pytest.raises(ArgumentError):
        ops.subspace(x.int(), k=1)
