"""tucker: orthogonality, true errors, bounds, exact cases, equivariance."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from mergekernels import MergeError
from mergekernels.ops import Sharded, Tucker, tucker
from stacks import dense, random_stack, relative


def rebuilt(result: Tucker) -> torch.Tensor:
    u, v = (x.dense().double() if isinstance(x, Sharded) else x.double() for x in (result.u, result.v))
    return u @ result.cores @ v.T


@pytest.mark.parametrize("weights", [None, [1.0, 0.0, 3.0, 0.5]])
@pytest.mark.parametrize(("p", "p2"), [(5, None), (3, 6)])
def test_error_is_true_falls_and_lies_in_its_bounds(weights: Any, p: int, p2: int | None) -> None:
    stack = random_stack((4, 3, 5, 2), 30, 25)
    result = tucker(stack, p, p2, weights=weights)
    x = dense(stack)
    w = torch.tensor(weights or [1.0] * 4, dtype=torch.float64)[:, None, None].sqrt()
    assert result.error == pytest.approx(relative(rebuilt(result) * w, x * w), abs=1e-10)
    assert all(later <= before + 1e-13 for before, later in zip(result.history, result.history[1:], strict=False))
    low, high = result.bounds
    assert low - 1e-12 <= result.error <= high + 1e-12
    own = (x - rebuilt(result)).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1)
    assert list(result.task_errors) == pytest.approx(own.tolist(), abs=1e-9)
    for basis, size in ((result.u, p), (result.v, p2 or p)):
        assert relative(basis.T @ basis, torch.eye(size, dtype=torch.float64)) < 1e-12
    for gram in ((result.cores @ result.cores.mT).sum(0), (result.cores.mT @ result.cores).sum(0)):
        assert float((gram - gram.diagonal().diag()).abs().max()) < 1e-9 * float(gram.max())
        assert (gram.diagonal()[:-1] >= gram.diagonal()[1:] - 1e-9).all()


def test_cores_are_projections_and_the_fixed_point_is_stationary() -> None:
    """Each basis holds the leading left vectors of the stack projected on the other."""
    stack = random_stack((4, 3, 5), 20, 25)
    result = tucker(stack, 4, tol=0.0, max_iter=400)
    x = dense(stack)
    torch.testing.assert_close(result.cores, result.u.T @ x @ result.v, rtol=0, atol=1e-10)
    best = torch.linalg.svd(torch.cat(list(x @ result.v), 1))[0][:, :4]
    assert torch.linalg.svdvals(best.T @ result.u).min() > 1.0 - 1e-8


@pytest.mark.parametrize("equal", [True, False])
def test_the_smaller_gram_gives_the_same(equal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bases of 3 columns for 4 tasks: Y has 12, and no matrix of the stack's 40 rows is decomposed in a sweep."""
    stack = random_stack((35, 35, 35, 35) if equal else (35, 20, 1, 40), 40, 30)
    weights = [1.0, 0.0, 3.0, 0.5]
    sides: list[int] = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda g: sides.append(len(g)) or eigh(g))
    result = tucker(stack, 3, weights=weights, max_iter=30, tol=0.0)
    assert len(result.history) == 30 and sides == [40, 30, *[12] * 60, 3, 3]
    monkeypatch.setattr(importlib.import_module("mergekernels.ops.tensor.tucker"), "_is_tall", lambda *sizes: False)
    other = tucker(stack, 3, weights=weights, max_iter=30, tol=0.0)
    assert sides[64:] == [40, 30] * 31 + [3, 3]
    assert relative(rebuilt(result), rebuilt(other)) < 1e-6
    assert result.history == pytest.approx(other.history, rel=1e-10)
    w = torch.tensor(weights, dtype=torch.float64)[:, None, None].sqrt()
    assert result.history[-1] == pytest.approx(relative(rebuilt(result) * w, dense(stack) * w), rel=1e-10)


def test_full_size_is_lossless_and_duplicates_share_a_core() -> None:
    stack = random_stack((4, 3), 20, 25)
    result = tucker(stack, 100)
    assert result.u.shape == (20, 7) and relative(rebuilt(result), dense(stack)) < 1e-12
    same = tucker([stack[0], stack[0]], 4)
    torch.testing.assert_close(same.cores[0], same.cores[1], rtol=0, atol=1e-12)
    assert relative(rebuilt(same), dense([stack[0], stack[0]])) < 1e-12


def test_energy_chooses_the_size() -> None:
    stack = random_stack((4, 3, 5), 20, 25)
    values = torch.linalg.svdvals(torch.cat(list(dense(stack)), 1)).square()
    share = values.cumsum(0) / values.sum()
    for energy in (0.3, 0.9):
        assert tucker(stack, energy).u.shape[1] == int((share < energy).sum()) + 1


def test_rotations_shards_and_batches() -> None:
    stack = random_stack((3, 4), 20, 15, dtype=torch.float32)
    q, _ = torch.linalg.qr(torch.randn(20, 20, generator=torch.Generator().manual_seed(1)))
    result = tucker(stack, 3)
    turned = tucker([(q @ b, a) for b, a in stack], 3)
    assert relative(rebuilt(turned), q.double() @ rebuilt(result)) < 1e-4
    cut = [(Sharded(b.split([13, 7]), 0), Sharded(a.split([5, 10], 1), 1)) for b, a in stack]
    sharded = tucker(cut, 3)
    assert isinstance(sharded.u, Sharded) and relative(rebuilt(sharded), rebuilt(result)) < 1e-5
    both = tucker([stack, random_stack((2, 2, 2), 9, 8, dtype=torch.float32)], 3)
    assert len(both) == 2 and relative(rebuilt(both[0]), rebuilt(result)) < 1e-5


def test_zero_tasks_and_bad_input() -> None:
    empty = (torch.zeros(20, 2, dtype=torch.float64), torch.zeros(2, 15, dtype=torch.float64))
    result = tucker([empty, random_stack((3,), 20, 15)[0]], 2)
    assert result.task_errors[0] == 0.0 and float(result.cores[0].abs().max()) == 0.0
    assert tucker([empty, empty], 2).error == 0.0
    stack = random_stack((3, 4), 20, 15)
    for p, options, words in (
        (0, {}, "p is not usable"),
        (1.5, {}, "p is not usable"),
        (True, {}, "p is not usable"),
        (2, {"weights": [1.0]}, "weights are not usable"),
        (2, {"weights": [1.0, -1.0]}, "weights are not usable"),
    ):
        with pytest.raises(MergeError, match=words):
            tucker(stack, p, **options)  # type: ignore[arg-type]
