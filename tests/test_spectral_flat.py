"""Flat spectra on the CPU: the float32 Gram's shortcuts of `polar` and `subspace`, and when they are not taken."""

from __future__ import annotations

import pytest
import torch

import spectral_brute as brute
from mergekernels import ops
from mergekernels.ops.spectral import _pairs, split_gram
from mergekernels.ops.spectral._plain import plain_eigh
from mergekernels.ops.spectral.split_gram import split_polar

NEVER = ["gap", "head", "power", "ill"]


def gaussian(m: int, n: int, seed: int) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def stacked(n: int, tasks: int) -> torch.Tensor:
    """Orthonormal blocks side by side, square: what TSV-M makes orthogonal. Its condition is about n."""
    k = n // tasks
    return torch.cat([torch.linalg.qr(gaussian(n, k, t).double()).Q for t in range(tasks)], 1).float()


@pytest.mark.parametrize(
    "x",
    [
        gaussian(256, 256, 1),
        gaussian(300, 200, 2),
        gaussian(640, 160, 5),
        stacked(256, 8),
        brute.with_spectrum(192, 160, brute.spectra(160)["flat"], 3, torch.float32),
    ],
    ids=["gaussian", "rectangular", "aspect 4", "stacked", "flat"],
)
@pytest.mark.parametrize("flip", [False, True])
def test_split_polar(x, flip):
    made = ops.polar(x.T.contiguous() if flip else x, nuclear=True)
    assert made.route == "split" and made.rank == min(x.shape)
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    want, p = u @ vh, made.p.T if flip else made.p
    assert brute.error(p, want) < 2e-5  # condition 1e2 to 1e3; LAPACK's float32 factors have 4e-6
    n = min(x.shape)
    assert float((p.double().T @ p.double() - torch.eye(n)).norm()) / n**0.5 < 1e-6
    assert made.nuclear == pytest.approx(float(s.sum()), rel=1e-6)
    assert made.residual < 1e-6


@pytest.mark.parametrize("kind", NEVER)
def test_other_spectra_are_not_split(kind):
    x = brute.with_spectrum(200, 180, brute.spectra(180)[kind], 1, torch.float32)
    assert split_polar(x, 1e-5) is None
    assert ops.polar(x).route == "svd"
    assert ops.polar(x, route="split").route == "split, svd"


def test_rank_deficient_flat_spectra_are_not_split():
    # 170 equal values of 180: flat enough to try, and refused where the weak block shows zeros.
    x = brute.with_spectrum(200, 180, torch.ones(170), 1, torch.float32)
    assert split_polar(x, 1e-5) is None
    made = ops.polar(x)
    assert made.route == "svd" and made.rank == 170
    assert split_polar(torch.zeros(200, 180), 1e-5) is None


@pytest.mark.parametrize("shape", [(256, 256), (320, 260), (260, 320)])
@pytest.mark.parametrize("side", ["right", "left"])
def test_plain_subspace(shape, side, monkeypatch):
    used = []
    monkeypatch.setattr(_pairs, "plain_eigh", lambda x, want: used.append(1) or plain_eigh(x, want))
    x, k = gaussian(*shape, 4), min(shape) // 8
    found = ops.subspace(x, k, side=side, accuracy="subspace")
    assert used
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    exact = (vh[:k].T if side == "right" else u[:, :k]).double()
    basis = found.basis.double()
    assert float((basis @ basis.T - exact @ exact.T).norm()) / (2 * k) ** 0.5 < 5e-5  # no gap: ratio 0.99
    assert brute.error(found.ritz, s[:k].square()) < 1e-6
    assert found.residual < 1e-5
    assert found.gap == pytest.approx(float(s[k] / s[k - 1]), rel=1e-5)
    assert found.captured == pytest.approx(float(s[:k].square().sum() / s.square().sum()), rel=1e-6)


@pytest.mark.parametrize("kind", ["head", "ill"])
def test_a_head_is_left_to_others(kind):
    x = brute.with_spectrum(300, 256, brute.spectra(256)[kind], 1, torch.float32)
    k = {"head": 25, "ill": 120}[kind]
    found = ops.subspace(x, k, accuracy="subspace")
    _, _, v = brute.svd(x)
    basis = found.basis.double()
    assert float((basis @ basis.T - v[:, :k] @ v[:, :k].T).norm()) / (2 * k) ** 0.5 < 1e-5


@pytest.mark.parametrize("top", [1.5, 3.9])
@pytest.mark.parametrize("shape", [(600, 160), (160, 600), (200, 200)])
def test_polar_of_an_even_spectrum_multiplies_by_the_matrix_once(top, shape, monkeypatch):
    """From the Gram alone, corrected in its size: as exact as what corrects the result."""
    x = brute.with_spectrum(*shape, torch.linspace(top, 1, min(shape)).tolist(), 3, torch.float32)
    grams = []
    plain = split_gram.plain_gram
    monkeypatch.setattr(split_gram, "plain_gram", lambda *a, **k: grams.append(1) or plain(*a, **k))
    made = ops.polar(x, nuclear=True)
    assert made.route == "split" and len(grams) == 1
    assert brute.error(made.p, brute.polar(x)) <= 1e-6
    assert made.residual <= 1e-6
    assert made.nuclear == pytest.approx(float(torch.linalg.svdvals(x.double()).sum()), rel=1e-6)
