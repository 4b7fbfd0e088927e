"""Random methods: kept shares, unbiasedness, tilt of the keep probability with rank, and what a mask depends on."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import mergekernels as mk

N = 1 << 16


def kept(method: str, deltas: torch.Tensor, **params: Any) -> np.ndarray:
    """Which entries survive, without rescale."""
    params = {"weights": 1, "rescale": False, "backend": "reference", "name": "w", **params}
    got = mk.merge([deltas], method, base=torch.zeros_like(deltas), **params)
    return (got != 0).numpy()


def bound(p: float, n: int) -> float:
    """Five standard deviations of a share of n draws."""
    return 5 * math.sqrt(p * (1 - p) / n)


@pytest.mark.parametrize("density", [0.01, 0.3, 0.53, 0.99])
def test_dare_keeps_its_share(density: float) -> None:
    share = kept("dare_linear", torch.ones(N), density=density).mean()
    assert abs(share - density) < bound(density, N)


def test_masks_depend_on_seed_name_model_and_element_alone() -> None:
    """Other seeds, names and models draw independently: they agree in rho^2 + (1 - rho)^2 of the entries."""
    ones = torch.ones(N)
    first = kept("dare_linear", ones, density=0.3)
    for other in ({"seed": 1}, {"name": "v"}):
        agreement = (kept("dare_linear", ones, density=0.3, **other) == first).mean()
        assert abs(agreement - 0.58) < bound(0.58, N)
    both = mk.merge(
        [ones, 2 * ones],
        "dare_linear",
        base=0 * ones,
        weights=1,
        density=0.3,
        rescale=False,
        name="w",
        backend="reference",
    ).numpy()
    assert ((both % 2 == 1) == first).all()
    assert abs(((both >= 2) & first).mean() - 0.09) < bound(0.09, N)
    assert (kept("dare_linear", ones.view(256, 256), density=0.3).ravel() == first).all()
    # A larger density keeps all that a smaller one keeps; values do not matter.
    assert (kept("dare_linear", -3 * ones, density=0.6) >= first).all()


@pytest.mark.parametrize(
    ("method", "dialect"), [("dare_linear", "paper"), ("dare_linear", "peft"), ("della_linear", "paper")]
)
def test_inverse_probability_is_unbiased(method: str, dialect: str) -> None:
    """The mean over seeds of the merged delta is the delta."""
    rng = np.random.default_rng(0)
    delta = torch.from_numpy(rng.normal(size=(8, 128)).astype(np.float32))
    runs = 150
    total = np.zeros((8, 128))
    for seed in range(runs):
        total += mk.merge(
            [delta],
            method,
            base=torch.zeros_like(delta),
            weights=1,
            density=0.4,
            dialect=dialect,
            seed=seed,
            backend="reference",
            **({"epsilon": 0.2} if method == "della_linear" else {}),
        ).numpy()
    p = 0.4 if method == "dare_linear" else 0.2  # the smallest keep probability
    spread = np.abs(delta.numpy()) * math.sqrt((1 - p) / p / runs)
    error = (total / runs - delta.numpy()) / spread
    assert np.abs(error).max() < 5.5 and abs(error.mean()) < 5 / math.sqrt(error.size)


def test_l1_rescale_keeps_the_norm() -> None:
    rng = np.random.default_rng(1)
    delta = torch.from_numpy(rng.normal(size=N).astype(np.float32))
    for method in ("dare_linear", "della_linear"):
        got = mk.merge([delta], method, base=torch.zeros(N), weights=1, density=0.5, name="w", backend="reference")
        assert float(got.double().abs().sum()) == pytest.approx(float(delta.double().abs().sum()), rel=1e-6)


@pytest.mark.parametrize("dim", [0, 1])
def test_della_tilts_with_the_rank_in_its_row(dim: int) -> None:
    """From density - epsilon for the smallest to density + epsilon for the largest of each row, linearly."""
    rng = np.random.default_rng(2)
    delta = torch.from_numpy(rng.normal(size=(2048, 64)).astype(np.float32))
    delta = delta if dim == 1 else delta.T.contiguous()
    mask = kept("della_linear", delta, density=0.5, epsilon=0.3, rank_dim=dim)
    rank = np.argsort(np.argsort(np.abs(delta.numpy()), axis=dim), axis=dim)
    for r in range(64):
        p = 0.2 + 0.6 * r / 63
        assert abs(mask[rank == r].mean() - p) < bound(p, 2048)
    assert abs(mask.mean() - 0.5) < bound(0.5, mask.size)


def test_equal_magnitudes_rank_without_favour() -> None:
    """In a constant row every position is kept equally often."""
    mask = kept("della_linear", torch.ones(4096, 16), density=0.5, epsilon=0.4)
    for column in range(16):
        assert abs(mask[:, column].mean() - 0.5) < bound(0.5, 4096)


def test_hash_ties_favour_no_row() -> None:
    """Of equal magnitudes breadcrumbs drops as many in the first half as in the second."""
    delta = torch.ones(N)
    mask = kept("breadcrumbs", delta, density=0.5, gamma=0.1)
    assert mask.sum() == N // 2
    assert abs(mask[: N // 2].mean() - 0.5) < bound(0.5, N // 2)
    index = kept("breadcrumbs", delta, density=0.5, gamma=0.1, tie_policy="index")
    cut = int(0.1 * N)
    assert not index[:cut].any() and index[cut : cut + N // 2].all() and not index[cut + N // 2 :].any()
