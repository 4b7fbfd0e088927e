"""Tensor ops on extreme scales, dense updates, unusable starts, and stacks of many adapters."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mergekernels import MergeError
from mergekernels.ops import Sharded, cluster, cp_als, mttkrp, tucker
from mergekernels.ops.tensor import cluster as cluster_module
from mergekernels.ops.tensor._starts import _bases
from mergekernels.ops.tensor._sweeps import Batch
from mergekernels.ops.tensor.stack import cores_of, stacks_of
from mergekernels.ops.tensor.tasks import Tasks
from stacks import dense, model, random_stack, relative


@pytest.mark.parametrize(("m", "n"), [(0, 5), (5, 0), (0, 0)])
def test_updates_without_rows_or_columns(m: int, n: int) -> None:
    stack = random_stack((2, 3), m, n)
    found = cp_als(stack, 2)
    assert [tuple(f.shape) for f in found.factors] == [(2, 2), (m, 2), (n, 2)] and found.fit == 1.0
    frame = tucker(stack, 2)
    assert (len(frame.u), len(frame.v), frame.error) == (m, n, 0.0)


@pytest.mark.parametrize("power", [-130, -20, 20, 130])
def test_scale_changes_nothing_but_the_scale(power: int) -> None:
    """1e-130 on both factors: every square of the updates is outside float64."""
    stack = random_stack((3, 2, 3), 15, 12)
    factor = 10.0**power
    scaled = [(b * factor, a * factor) for b, a in stack]
    options: dict[str, Any] = {"n_starts": 1, "max_iter": 15, "tol": 0.0}
    want, found = cp_als(stack, 3, **options), cp_als(scaled, 3, **options)
    assert found.fit == pytest.approx(want.fit, abs=1e-9)
    back = [found.factors[0] / factor / factor, *found.factors[1:]]
    assert relative(model(back), model(want.factors)) < 1e-6
    one, other = tucker(stack, 2), tucker(scaled, 2)
    assert other.error == pytest.approx(one.error, abs=1e-9)
    assert relative(other.cores / factor / factor, one.cores) < 1e-6


def test_factors_of_one_product_may_differ_in_scale_from_task_to_task() -> None:
    stack = random_stack((3, 2, 3), 15, 12)
    other = [(b * s, a / s) for (b, a), s in zip(stack, (1e-60, 1.0, 1e70), strict=True)]
    options: dict[str, Any] = {"n_starts": 1, "max_iter": 15, "tol": 0.0}
    assert relative(model(cp_als(other, 3, **options).factors), model(cp_als(stack, 3, **options).factors)) < 1e-6


def test_terms_outside_the_results_dtype_are_an_error() -> None:
    for factor in (1e-20, 1e20):
        stack = [(b * factor, a * factor) for b, a in random_stack((2, 2), 9, 8, dtype=torch.float32)]
        with pytest.raises(MergeError, match="leave the range of float32"):
            cp_als(stack, 2, n_starts=1)


def test_dense_updates_are_factors_with_an_identity() -> None:
    x = dense(random_stack((3, 2, 3), 15, 12))
    options: dict[str, Any] = {"n_starts": 1, "max_iter": 20, "tol": 0.0}
    want = cp_als(random_stack((3, 2, 3), 15, 12), 3, **options)
    for stack in (x, list(x), [x[0], *random_stack((3, 2, 3), 15, 12)[1:]]):
        found = cp_als(stack, 3, **options)
        assert relative(model(found.factors), model(want.factors)) < 1e-6
    turned = cp_als([(a.mT, b.mT) for b, a in random_stack((3, 2, 3), 15, 12)], 3, **options)
    assert relative(model(cp_als(x.mT.contiguous(), 3, **options).factors), model(turned.factors)) < 1e-6
    rows = cp_als([Sharded(y.split([4, 11], 0), 0) for y in x], 3, **options)
    assert rows.factors[1].sizes == [4, 11] and rows.fit == pytest.approx(want.fit, abs=1e-9)
    batch = cp_als([x, x.clone()], 3, **options)
    assert [r.fit for r in batch] == pytest.approx([want.fit] * 2, abs=1e-9)
    assert relative(tucker(x, 12).cores.norm(), x.norm()) < 1e-12


def test_what_could_be_two_things_is_refused() -> None:
    square = torch.ones(4, 4)
    with pytest.raises(MergeError, match="a pair of factors or two updates"):
        cp_als([[square, square], [square, square]], 1)
    with pytest.raises(MergeError, match="not an update"):
        cp_als([(square, square), torch.ones(3)], 1)


@pytest.mark.parametrize(
    ("init", "words"),
    [
        (None, "init is not usable"),
        ((None,), "init is not usable"),
        ((None, [torch.full((2, 2), float("nan")), torch.ones(9, 2), torch.ones(8, 2)]), "hold NaN or Inf"),
        ((None, [torch.ones(2, 3), torch.ones(9, 3), torch.ones(8, 3)]), "2 columns"),
        ((torch.ones(3), [torch.ones(2, 2), torch.ones(9, 2), torch.ones(8, 2)]), "explicit weights do not fit"),
    ],
)
def test_unusable_starts_are_refused(init: Any, words: str) -> None:
    with pytest.raises(MergeError, match=words):
        cp_als(random_stack((2, 2), 9, 8), 2, init=init)


def test_other_unusable_options() -> None:
    stack = random_stack((2, 2), 9, 8)
    for options in ({"weights": "ab"}, {"weights": [1.0, None]}, {"seed": -1}, {"seed": "x"}):
        with pytest.raises(MergeError, match="not usable"):
            cp_als(stack, 2, **options)
    with pytest.raises(MergeError, match="tol is not usable"):
        tucker(stack, 2, tol=-1.0)
    with pytest.raises(MergeError, match="factor U holds NaN"):
        mttkrp(stack, [torch.ones(2, 2), torch.full((9, 2), float("nan")), None], 2)
    with pytest.raises(MergeError, match="differ in columns"):
        mttkrp(stack, [None, torch.ones(9, 2), torch.ones(8, 3)], 0)


def test_starts_that_break_down_lose(monkeypatch: pytest.MonkeyPatch) -> None:
    """One start of NaN among several does not win; all of them are an error, not a result."""
    from mergekernels.ops.tensor import cp

    def broken(batch: Batch, rank: int, seed: int, modules: list[int], start: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = len(modules), batch.b.shape[1], rank
        return torch.full(shape, float("nan")).double(), torch.full((*shape[:1], batch.a.shape[1], rank), 1.0).double()

    stack = random_stack((3, 3), 12, 10)
    want = cp_als(stack, 3, init="hosvd", n_starts=1)
    monkeypatch.setattr(cp, "gevd", broken)
    found = cp_als(stack, 3, n_starts=2)
    assert found.fit == pytest.approx(want.fit, abs=1e-9) and found.diagnostics["start"] == 0
    with pytest.raises(MergeError, match="broke down"):
        cp_als(stack, 3, init="gevd", n_starts=1)


@pytest.mark.parametrize("ranks", [(3, 3, 3, 3), (2, 0, 4, 1), (0, 0)])
def test_sums_and_products_within_tasks(ranks: tuple[int, ...]) -> None:
    tasks, size = Tasks(ranks), sum(ranks)
    g = torch.Generator().manual_seed(0)
    x, y, z = (torch.randn(2, n, size, generator=g, dtype=torch.float64) for n in (5, 6, 7))
    owner = torch.repeat_interleave(torch.arange(len(ranks)), torch.tensor(ranks))
    same = (owner[:, None] == owner).double()
    weights = torch.arange(1.0, len(ranks) + 1.0).double()
    torch.testing.assert_close(tasks.within(x, y, weights), x @ ((y.mT @ y) * same * weights[owner]))
    indicator = (torch.arange(len(ranks))[:, None] == owner).double()
    torch.testing.assert_close(tasks.total(z.mT), indicator @ z.mT)
    assert torch.equal(tasks.spread(weights), weights[owner])
    c = torch.randn(2, len(ranks), 3, generator=g)
    assert torch.equal(tasks.rows(c), c[:, owner])


@pytest.mark.parametrize("mixed", [False, True])
def test_memory_of_many_adapters_is_linear(mixed: bool) -> None:
    """No array grows with the square of the stacked ranks: torch's own allocations, by the largest tensor made."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for x in result if isinstance(result, (list, tuple)) else [result]:
                if isinstance(x, torch.Tensor):
                    Largest.elements = max(Largest.elements, x.untyped_storage().nbytes() // 8)
            return result

    count = 300
    stack = random_stack([4 + (t % 2 if mixed else 0) for t in range(count)], 20, 16)
    columns = sum(b.shape[1] for b, _ in stack)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a dispatch mode sees its own thread only
    try:
        with Largest():
            cp_als(stack, 3, n_starts=3, max_iter=3)
            tucker(stack, 3, max_iter=3)
    finally:
        torch.set_num_threads(threads)
    assert Largest.elements >= columns * 20
    assert Largest.elements < 2.0 * columns * 20 * 3 < columns**2 / 8


def test_large_cores_start_from_rounds_on_few_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    from mergekernels.ops.tensor import _starts

    stack = random_stack((6,) * 12, 60, 50)
    decay = torch.logspace(0, -4, 6, dtype=torch.float64)
    core = cores_of(stacks_of([(b * decay, a) for b, a in stack]))[0]
    batch = Batch(core.b[None], core.a[None], core.tasks, core.norm2.sum()[None])
    exact = _bases(batch, 4, 0)
    monkeypatch.setattr(_starts, "_EXACT", 8)
    for x, y in zip(_bases(batch, 4, 0), exact, strict=True):
        half = batch.tasks.within(batch.b, batch.a) if x.shape[1] == core.b.shape[0] else None
        assert float((x.mT @ x - torch.eye(4, dtype=x.dtype)).abs().max()) < 1e-12
        if half is not None:
            energies = [float(((z.mT @ half) * (z.mT @ batch.b)).sum()) for z in (x, y)]
            assert 0.98 * energies[1] < energies[0] <= energies[1] * (1.0 + 1e-9)


def test_clusters_survive_a_common_offset() -> None:
    x = torch.randn(40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    want, found = cluster(x, 4), cluster(x + 1e8, 4)
    assert found.inertia == pytest.approx(want.inertia, rel=1e-6) and torch.equal(found.labels, want.labels)
    with pytest.raises(MergeError, match="leave the range of float64"):
        cluster(x * 1e200, 2)


@pytest.mark.parametrize("sign", ["none", "adaptive"])
def test_the_forms_of_cluster_agree(monkeypatch: pytest.MonkeyPatch, sign: str) -> None:
    """On a Gram or on the points, all starts together or few at a time."""
    x = torch.randn(60, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    want = cluster(x, 5, n_starts=7, sign=sign)
    monkeypatch.setattr(cluster_module, "_BYTES", 8 * 60 * 5 * 2)
    parts = cluster(x, 5, n_starts=7, sign=sign)
    monkeypatch.setattr(cluster_module, "_GRAM_ROWS", 10)
    direct = cluster(x, 5, n_starts=7, sign=sign)
    for found in (parts, direct):
        assert torch.equal(found.labels, want.labels) and found.start == want.start
        assert found.inertia == pytest.approx(want.inertia, rel=1e-12)
