"""cluster: exhaustive search on tiny cases, falling inertia, signs, empty clusters."""

from __future__ import annotations

import itertools

import pytest
import torch

from mergekernels import MergeError
from mergekernels.ops import Clusters, cluster


def points(count: int, size: int, seed: int) -> torch.Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inertia_of(x: torch.Tensor, labels: torch.Tensor) -> float:
    total = 0.0
    for c in labels.unique().tolist():
        own = x[labels == c]
        total += float((own - own.mean(0)).square().sum())
    return total


@pytest.mark.parametrize("seed", range(6))
def test_tiny_cases_are_optimal(seed: int) -> None:
    x, k = points(7, 2, seed), 2 + seed % 2
    best = min(
        inertia_of(x, torch.tensor(labels)) for labels in itertools.product(range(k), repeat=7) if len(set(labels)) == k
    )
    assert cluster(x, k, n_starts=20).inertia == pytest.approx(best, rel=1e-10)


def test_inertia_is_true_falls_and_labels_are_nearest() -> None:
    x = points(80, 10, 1)
    found = cluster(x, 7)
    assert found.converged and sum(found.sizes) == 80 and min(found.sizes) > 0
    assert found.inertia == pytest.approx(inertia_of(x, found.labels), rel=1e-10)
    assert all(later <= before + 1e-9 for before, later in zip(found.history, found.history[1:], strict=False))
    centres = torch.stack([x[found.labels == c].mean(0) for c in range(7)])
    assert torch.equal(torch.cdist(x, centres).argmin(1), found.labels)


@pytest.mark.parametrize("adaptive", [False, True])
def test_no_move_of_a_single_point_lowers_the_inertia(adaptive: bool) -> None:
    """Lloyd's steps alone stop above this."""
    x = points(60, 12, 1)
    found = cluster(x, 6, n_starts=3, sign="adaptive" if adaptive else "none")
    signed = x * found.signs[:, None]
    assert found.inertia == pytest.approx(inertia_of(signed, found.labels), rel=1e-10)
    for i, own in enumerate(found.labels.tolist()):
        if found.sizes[own] == 1:
            continue
        for c in range(6):
            for sign in (1.0, -1.0) if adaptive else (1.0,):
                labels, other = found.labels.clone(), signed.clone()
                labels[i], other[i] = c, other[i] * sign
                assert inertia_of(other, labels) >= found.inertia * (1.0 - 1e-9)


def test_separated_groups_are_found_whatever_the_signs() -> None:
    centres = 20.0 * points(5, 8, 2)
    x = centres.repeat_interleave(6, 0) + points(30, 8, 3)
    plain = cluster(x, 5)
    assert sorted(plain.sizes) == [6] * 5
    signs = torch.where(points(30, 1, 4) < 0, -1.0, 1.0).double()
    found = cluster(x * signs, 5, sign="adaptive")
    assert sorted(found.sizes) == [6] * 5 and found.inertia == pytest.approx(plain.inertia, rel=1e-9)
    within = found.signs * signs[:, 0]
    for c in range(5):
        assert within[found.labels == c].abs().sum() == within[found.labels == c].sum().abs()
    assert cluster(x * signs, 5).inertia > 2.0 * found.inertia


def test_more_clusters_than_distinct_points_leave_none_empty() -> None:
    x = points(3, 4, 5).repeat(4, 1)
    found = cluster(x, 5)
    assert min(found.sizes) >= 1 and sum(found.sizes) == 12 and found.inertia == pytest.approx(0.0, abs=1e-9)
    assert cluster(points(6, 2, 1), 6).inertia == pytest.approx(0.0, abs=1e-12)
    assert cluster(torch.zeros(4, 3), 2).sizes in ((1, 3), (2, 2), (3, 1))


def test_seeds_order_and_batches() -> None:
    x = points(40, 6, 6)
    again: Clusters = cluster(x, 4, seed=3)
    assert torch.equal(again.labels, cluster(x, 4, seed=3).labels)
    both = cluster([x, points(9, 2, 1)], 4, seed=3)
    assert torch.equal(both[0].labels, again.labels) and both[1].labels.shape == (9,)
    turned = torch.linalg.qr(points(6, 6, 9))[0]
    assert cluster(x @ turned, 4, seed=3).inertia == pytest.approx(again.inertia, rel=1e-9)


def test_bad_input_is_refused() -> None:
    x = points(5, 2, 0)
    with pytest.raises(MergeError, match="more clusters than points"):
        cluster(x, 6)
    with pytest.raises(MergeError, match="k is not usable"):
        cluster(x, 0)
    with pytest.raises(MergeError, match="sign is not usable"):
        cluster(x, 2, sign="yes")
    with pytest.raises(MergeError, match="not a matrix"):
        cluster([x[0]], 1)
    x[0, 0] = float("inf")
    with pytest.raises(MergeError, match="NaN or Inf"):
        cluster(x, 2)
