"""Methods over stacks: many modules together give what each gives alone, whatever the order of the adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from mergekernels import MergeError, factorise_adapters, merge_adapters
from mergekernels._methods.matrix import Merged
from mergekernels._methods.matrix_table import get_matrix
from mergekernels.adapters import job as job_module
from mergekernels.ops import cluster, cp_als
from stacks import model, random_stack, relative

SHAPES = {"l.0.q": (20, 15), "l.1.q": (20, 15), "l.2.q": (20, 15), "l.0.k": (12, 15), "l.1.k": (12, 15)}


def adapters(count: int = 5) -> list[Any]:
    """Adapters of ranks 3 and 4; the last lacks a module, and another is zero in one."""
    g = torch.Generator().manual_seed(0)
    found: list[Any] = []
    for t in range(count):
        r, tensors = 3 + t % 2, {}
        for name, (m, n) in SHAPES.items():
            if (t, name) == (count - 1, "l.1.q"):
                continue
            tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(r, n, generator=g)
            b = torch.randn(m, r, generator=g)
            tensors[f"base_model.model.{name}.lora_B.weight"] = 0.0 * b if (t, name) == (1, "l.0.k") else b
        found.append((tensors, {"r": r, "lora_alpha": 2 * r, "peft_type": "LORA", "target_modules": ["q", "k"]}))
    return found


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("tc_lora", {"n_starts": 2, "max_iter": 30}),
        ("tc_lora", {"n_starts": 2, "max_iter": 30, "dialect": "code", "cp_rank": 2}),
        ("tc_lora", {"n_starts": 2, "max_iter": 30, "normalize": "fro", "cp_rank": 2}),
        ("lora_lego", {}),
        ("lora_lego", {"features": "unit", "sign": "adaptive", "k": 2}),
    ],
)
def test_modules_together_are_modules_alone(
    monkeypatch: pytest.MonkeyPatch, method: str, options: dict[str, Any]
) -> None:
    given = adapters()
    if "dialect" in options:
        given = given[::2][:-1]  # of equal ranks
    calls: list[int] = []
    kind = type(get_matrix(method, "adapters"))
    whole = kind.merge_together

    def counted(self: Any, specs: Any, deltas: Any) -> list[Merged]:
        calls.append(len(specs))
        return whole(self, specs, deltas)

    monkeypatch.setattr(kind, "merge_together", counted)
    found = []
    for size in (128 << 20, 4 * 35 * 6 * 2, 1):  # all together, some, each alone
        monkeypatch.setattr(job_module, "_BATCH_BYTES", size)
        calls.append(0)
        found.append(merge_adapters(given, method, **options))
    assert [calls.count(0), sum(calls)] == [3, 15] and calls[:3] == [0, 5, 0] and calls[-6:] == [0, 1, 1, 1, 1, 1]
    assert len(calls) > 3 + 5 + 2  # several batches in the second
    for name in SHAPES:
        for other in found[1:]:
            assert relative(other.delta(name), found[0].delta(name)) < 1e-5
            one, two = (x.report.modules[name] for x in (other, found[0]))
            assert one.rank == two.rank and one.warnings == two.warnings and one.details.keys() == two.details.keys()
            for key in {"a_fit", "fit", "inertia"} & one.details.keys():
                assert one.details[key] == pytest.approx(two.details[key], abs=1e-7)


def test_a_failure_in_a_batch_names_its_module() -> None:
    given = adapters()
    with pytest.raises(MergeError, match=r"no convergence in 2 sweeps.*\n?.*l\.\d\.[qk]|l\.\d\.[qk].*no convergence"):
        merge_adapters(given, "tc_lora", max_iter=2, tol=0.0, strict=True)
    given[3][0]["base_model.model.l.2.q.lora_A.weight"][0, 0] = float("nan")
    with pytest.raises(MergeError, match=r"l\.2\.q"):
        merge_adapters(given, "tc_lora")
    with pytest.raises(MergeError, match=r"l\.2\.q"):
        merge_adapters(given, "lora_lego")


def permuted(items: Sequence[Any]) -> list[Any]:
    return [items[t] for t in (3, 0, 4, 2, 1)]


@pytest.mark.parametrize("method", ["tc_lora", "lora_lego", "compress_then_merge"])
def test_the_order_of_adapters_does_not_matter(method: str) -> None:
    """Random stacks, whose fit depends on the start: 2 % between orders where starts are drawn by position."""
    given = adapters()
    want, found = (merge_adapters(x, method, seed=2, max_iter=20) for x in (given, permuted(given)))
    for name in SHAPES:
        assert relative(found.delta(name), want.delta(name)) < 2e-6


@pytest.mark.parametrize("init", ["auto", "random", "gevd"])
def test_the_order_of_tasks_does_not_matter(init: str) -> None:
    stack = random_stack((3, 2, 4, 3, 2), 20, 15)
    weights = [1.0, 2.0, 0.5, 3.0, 1.5]
    options: dict[str, Any] = {"init": init, "n_starts": 3, "max_iter": 40}
    want = cp_als(stack, 5, weights=weights, **options)
    found = cp_als(permuted(stack), 5, weights=permuted(weights), **options)
    assert found.history == want.history
    assert list(found.diagnostics["task_errors"]) == permuted(want.diagnostics["task_errors"])
    assert torch.equal(found.factors[0], torch.stack(permuted(want.factors[0])))
    assert relative(model(found.factors), torch.stack(permuted(model(want.factors)))) == 0.0


def test_the_order_of_factorised_adapters_does_not_matter() -> None:
    shared = [factorise_adapters(given, 4, max_iter=20) for given in (adapters(), permuted(adapters()))]
    for name in SHAPES:
        assert shared[0].fit[name] == pytest.approx(shared[1].fit[name], abs=1e-9)


@pytest.mark.parametrize("sign", ["none", "adaptive"])
def test_the_order_of_points_does_not_matter(sign: str) -> None:
    x = torch.randn(60, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(2))
    want, found = cluster(x, 6, n_starts=2, sign=sign), cluster(x[order], 6, n_starts=2, sign=sign)
    assert torch.equal(found.labels, want.labels[order]) and torch.equal(found.signs, want.signs[order])
    assert found.inertia == pytest.approx(want.inertia, rel=1e-12)
