"""cp_als: against dense alternating least squares, planted factors, its invariants and its refusals."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from mergekernels import MergeError
from mergekernels.ops import CP, Sharded, cp_als
from stacks import dense, model, planted_stack, random_stack, relative


def dense_sweeps(x: torch.Tensor, factors: list[torch.Tensor], sweeps: int) -> list[float]:
    """Plain alternating least squares on the dense tensor; err / ||X|| after every sweep."""
    c, u, v = (f.clone() for f in factors)
    errors = []
    for _ in range(sweeps):
        c = torch.linalg.solve((u.T @ u) * (v.T @ v), torch.einsum("tij,ik,jk->tk", x, u, v).T).T
        u = torch.linalg.solve((c.T @ c) * (v.T @ v), torch.einsum("tij,tk,jk->ik", x, c, v).T).T
        v = torch.linalg.solve((c.T @ c) * (u.T @ u), torch.einsum("tij,tk,ik->jk", x, c, u).T).T
        errors.append(relative(model([c, u, v]), x))
    return errors


def error_of(result: CP, stack: Any) -> float:
    """The true relative error of a result."""
    return relative(model(result.factors), dense(stack))


@pytest.mark.parametrize(("ranks", "m", "n"), [((4, 4, 4), 40, 30), ((1, 5, 2), 30, 40), ((6, 6, 6), 15, 40)])
def test_sweeps_are_those_of_dense_least_squares(ranks: tuple[int, ...], m: int, n: int) -> None:
    """From the same start inside the span, with and without a smaller core."""
    stack = random_stack(ranks, m, n)
    g = torch.Generator().manual_seed(3)
    u = torch.cat([b for b, _ in stack], 1) @ torch.randn(sum(ranks), 5, generator=g, dtype=torch.float64)
    v = torch.cat([a.T for _, a in stack], 1) @ torch.randn(sum(ranks), 5, generator=g, dtype=torch.float64)
    c = torch.randn(len(ranks), 5, generator=g, dtype=torch.float64)
    want = dense_sweeps(dense(stack), [c, u, v], 8)
    for sweeps in (1, 2, 8):
        result = cp_als(stack, 5, init=(None, [c, u, v]), max_iter=sweeps, tol=0.0, prox=0.0)
        assert list(result.history) == pytest.approx(want[:sweeps], abs=1e-9)
        assert error_of(result, stack) == pytest.approx(want[sweeps - 1], abs=1e-9)


@pytest.mark.parametrize("init", ["auto", "hosvd", "gevd", "random"])
@pytest.mark.parametrize("normalize", [None, "fro"])
def test_history_is_true_and_never_rises(init: str, normalize: str | None) -> None:
    stack = random_stack((4, 3, 5, 2), 40, 30)
    weights = [1.0, 2.0, 0.5, 1.0]
    result = cp_als(stack, 6, init=init, n_starts=3, normalize=normalize, weights=weights, max_iter=60)
    x, y = dense(stack), model(result.factors)
    scale = torch.tensor(weights, dtype=torch.float64).sqrt()
    if normalize:
        scale = scale / x.flatten(1).norm(dim=1)
    scale = scale[:, None, None]
    assert result.history[-1] == pytest.approx(relative(y * scale, x * scale), abs=1e-9)
    assert result.fit == pytest.approx(1.0 - result.history[-1])
    assert all(later <= before + 1e-12 for before, later in zip(result.history, result.history[1:], strict=False))
    own = (x - y).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1)
    assert list(result.diagnostics["task_errors"]) == pytest.approx(own.tolist(), abs=1e-9)
    assert result.history[-1] == pytest.approx(min(s for s in result.diagnostics["starts"]), abs=1e-12)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_planted_terms_are_recovered(rank: int) -> None:
    stack, _ = planted_stack(7, 30, 25, rank)
    result = cp_als(stack, rank)
    assert error_of(result, stack) < 1e-6
    assert error_of(cp_als(stack, rank, init="gevd", n_starts=1), stack) < 1e-7


def test_canonical_form() -> None:
    """Unit columns, falling weights, positive largest entries; weights of one; it unpacks."""
    stack = random_stack((4, 3, 5), 40, 30, dtype=torch.float32)
    result = cp_als(stack, 4)
    weights, (c, u, v) = result
    assert c.dtype == u.dtype == torch.float32 and weights.tolist() == [1.0] * 4
    for x in (u, v):
        assert x.norm(dim=0).tolist() == pytest.approx([1.0] * 4, abs=1e-6)
        assert (x.gather(0, x.abs().argmax(0)[None]) > 0).all()
    size = (c * c).sum(0)
    assert (size[:-1] >= size[1:]).all()


def test_one_task_is_the_singular_value_decomposition() -> None:
    stack = random_stack((8,), 30, 20)
    values = torch.linalg.svdvals(dense(stack)[0])
    assert 1.0 - cp_als(stack, 3).fit == pytest.approx(float(values[3:].norm() / values.norm()), abs=1e-8)


def test_copies_and_full_rank_are_exact() -> None:
    one = random_stack((3,), 30, 20)[0]
    assert error_of(cp_als([one] * 4, 3), [one] * 4) < 1e-6
    stack = random_stack((2, 2, 2), 30, 20)
    assert error_of(cp_als(stack, 6, max_iter=400), stack) < 1e-3


def test_result_follows_rotations_and_ignores_how_products_are_factored() -> None:
    stack = random_stack((3, 3, 4), 20, 15)
    q, _ = torch.linalg.qr(random_stack((20,), 20, 5)[0][0])
    p, _ = torch.linalg.qr(random_stack((15,), 15, 5)[0][0])
    g = [
        torch.randn(b.shape[1], b.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(t))
        for t, (b, _) in enumerate(stack)
    ]
    other = [(q @ b @ x, torch.linalg.solve(x, a) @ p.T) for (b, a), x in zip(stack, g, strict=True)]
    options: dict[str, Any] = {"init": "hosvd", "n_starts": 1, "max_iter": 40, "tol": 0.0}
    want = model(cp_als(stack, 3, **options).factors)
    found = model(cp_als(other, 3, **options).factors)
    assert relative(found, q @ want @ p.T) < 1e-6
    order = [2, 0, 1]
    turned = model(cp_als([stack[t] for t in order], 3, **options).factors)
    assert relative(turned, want[order]) < 1e-6


def test_shards_and_batches_do_not_show() -> None:
    stack = random_stack((3, 3, 4), 40, 30, dtype=torch.float32)
    others = [random_stack((3, 3, 4), 40, 30, seed=s, dtype=torch.float32) for s in (1, 2)]
    alone = cp_als(stack, 4)
    cut = [(Sharded(b.split([30, 10]), 0), Sharded(a.split([5, 25], 1), 1)) for b, a in stack]
    sharded = cp_als(cut, 4)
    assert isinstance(sharded.factors[1], Sharded) and sharded.factors[1].sizes == [30, 10]
    whole = [sharded.factors[0], sharded.factors[1].dense(), sharded.factors[2].dense()]
    assert relative(model(whole), model(alone.factors)) < 1e-6
    batch = cp_als([stack, *others], 4)
    assert relative(model(batch[0].factors), model(alone.factors)) < 1e-6
    for result, module in zip(batch, (stack, *others), strict=True):
        assert error_of(result, module) == pytest.approx(1.0 - result.fit, abs=1e-6)


def test_degenerate_stack_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    """a a b + a b a + b a a has rank 3, but two terms that grow and cancel come as near as one likes."""
    g = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(8, 2, generator=g, dtype=torch.float64))[0]
    a, b = basis[:, 0], basis[:, 1]
    x = sum(torch.einsum("t,i,j->tij", *f) for f in ((a, a, b), (a, b, a), (b, a, a)))
    stack = [(torch.eye(8, dtype=torch.float64), x[t]) for t in range(8)]  # type: ignore[index]
    near = a + 0.1 * b
    start = [torch.stack([10.0 * near, -10.0 * a], 1), torch.stack([near, a], 1), torch.stack([near, a], 1)]
    with caplog.at_level(logging.WARNING, "mergekernels"):
        result = cp_als(stack, 2, init=(None, start), max_iter=4, tol=0.0)
    assert result.diagnostics["theta"] < -0.95 and result.diagnostics["growth"] > 5.0
    assert "degenerate: two terms nearly cancel" in caplog.text
    cured = cp_als(stack, 2, init=(None, start), max_iter=60, tol=0.0).diagnostics
    assert cured["ridge"] > 0.0 and cured["growth"] < result.diagnostics["growth"]
    with pytest.raises(MergeError, match="no convergence"):
        cp_als(stack, 2, max_iter=3, tol=0.0, strict=True)


def test_zero_tasks_and_zero_stacks() -> None:
    stack = random_stack((3, 3), 20, 15)
    empty = (torch.zeros(20, 0, dtype=torch.float64), torch.zeros(0, 15, dtype=torch.float64))
    result = cp_als([stack[0], empty, stack[1]], 3)
    assert float(result.factors[0][1].abs().max()) < 1e-6
    nothing = cp_als([(torch.zeros(20, 2), torch.zeros(2, 15))] * 2, 3)
    assert nothing.fit == 1.0 and float(model(nothing.factors).abs().max()) == 0.0
    assert cp_als([empty, empty], 2).fit == 1.0


def test_rank_above_the_stack_is_reduced(caplog: pytest.LogCaptureFixture) -> None:
    stack = random_stack((1, 2), 20, 15)
    with caplog.at_level(logging.WARNING, "mergekernels"):
        result = cp_als(stack, 10, max_iter=300)
    assert result.diagnostics["rank"] == 3 and "rank 10 is more than the 3" in caplog.text
    with pytest.raises(MergeError, match="rank 10 is more"):
        cp_als(stack, 10, strict=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, "rank is not usable"),
        ({"n_starts": 0}, "n_starts is not usable"),
        ({"tol": -1.0}, "tol is not usable"),
        ({"normalize": "l1"}, "normalize is not usable"),
        ({"init": "svd"}, "init is not usable"),
        ({"weights": [1.0, 0.0]}, "weights are not usable"),
        ({"init": (None, [torch.ones(2, 2)] * 3)}, "explicit factors do not fit"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], words: str) -> None:
    rank = options.pop("rank", 2)
    with pytest.raises(MergeError, match=words):
        cp_als(random_stack((2, 2), 9, 8), rank, **options)


def test_no_stack_is_refused() -> None:
    for wrong in ([], 3, [[]], torch.ones(3, 3)):
        with pytest.raises(MergeError):
            cp_als(wrong, 2)
