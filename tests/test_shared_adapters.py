"""factorise_adapters: its parts rebuild tasks and merges; cluster_texts: assignments and routes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from mergekernels import MergeError, cluster_texts, factorise_adapters, merge_adapters

MODULES = ("l.0.q", "l.1.q", "l.1.k")


def adapters(count: int, r: int, *, shared: bool = False) -> list[Any]:
    """Random adapters, or (shared) ones whose updates are combinations of r common terms."""
    g = torch.Generator().manual_seed(0)
    common = {m: (torch.randn(r, 15, generator=g), torch.randn(20, r, generator=g)) for m in MODULES}
    found: list[Any] = []
    for _ in range(count):
        tensors = {}
        for m in MODULES:
            a, b = common[m]
            if shared:
                b = b * torch.randn(r, generator=g)
            else:
                a, b = torch.randn(r, 15, generator=g), torch.randn(20, r, generator=g)
            tensors[f"base_model.model.{m}.lora_A.weight"] = a
            tensors[f"base_model.model.{m}.lora_B.weight"] = b
        found.append((tensors, {"r": r, "lora_alpha": 2 * r, "peft_type": "LORA", "target_modules": ["q", "k"]}))
    return found


def delta(adapter: Any, module: str) -> torch.Tensor:
    tensors, config = adapter
    b, a = (tensors[f"base_model.model.{module}.lora_{x}.weight"].double() for x in "BA")
    return config["lora_alpha"] / config["r"] * (b @ a)


def close(x: torch.Tensor, y: torch.Tensor, bound: float) -> bool:
    return float((x.double() - y.double()).norm()) <= bound * float(y.double().norm())


def test_tasks_and_merges_of_adapters_that_share_terms() -> None:
    """An exact stack: every task, and every weighted mix, comes back."""
    given = adapters(5, 3, shared=True)
    shared = factorise_adapters(given)
    assert set(shared.terms) == set(MODULES) and min(shared.fit.values()) > 1.0 - 1e-5
    weights = [0.5, -1.0, 0.0, 2.0, 1.0]
    mixed, third = shared.merge(weights), shared.task(2)
    for m in MODULES:
        assert close(third.delta(m), delta(given[2], m), 1e-4)
        want = sum(w * delta(x, m) for w, x in zip(weights, given, strict=True))
        assert close(mixed.delta(m), want, 1e-4)  # type: ignore[arg-type]
    assert third.delta(MODULES[0]).shape == (20, 15)


def test_merges_are_those_of_tc_lora() -> None:
    given = adapters(4, 3)
    shared = factorise_adapters(given, 5, n_starts=2, seed=4)
    for options in ({}, {"weights": [1.0, 2.0, 0.0, -1.0]}, {"shared_min": 0.5}):
        want = merge_adapters(given, "tc_lora", cp_rank=5, n_starts=2, seed=4, **options)  # type: ignore[arg-type]
        found = shared.merge(**options)  # type: ignore[arg-type]
        for m in MODULES:
            assert close(found.delta(m), want.delta(m), 1e-5)
    cut = shared.merge(rank=2)
    assert all(r.rank == 2 for r in cut.report.modules.values())
    with pytest.raises(MergeError, match="no such adapter"):
        shared.task(4)
    with pytest.raises(MergeError, match="shared_min"):
        shared.merge(shared_min=2.0)


def test_warnings_of_the_fit_are_said_with_the_module() -> None:
    given = adapters(4, 3)
    want = "l.1.k: rank 100 is more than the 12 that the stack holds: 12 are used, an exact model"
    for made in (merge_adapters(given, "tc_lora", cp_rank=100), factorise_adapters(given, 100).merge()):
        assert want in made.report.warnings


def test_what_the_fit_does_not_take_is_refused() -> None:
    given = adapters(2, 2)
    for options in ({"weights": [1.0, 2.0]}, {"shared_min": 0.5}):
        with pytest.raises(MergeError, match=f"{next(iter(options))}.*expected an argument of merge"):
            factorise_adapters(given, **options)  # type: ignore[arg-type]
    with pytest.raises(MergeError, match="rank and cp_rank are both given"):
        factorise_adapters(given, 2, cp_rank=3)


def blobs(sizes: Sequence[int], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    centres = torch.randn(len(sizes), width, generator=g) * 4.0
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return centres[labels] + 0.3 * torch.randn(len(labels), width, generator=g), labels


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_texts_are_grouped_and_routed(metric: Any) -> None:
    x, labels = blobs((12, 30, 7), 16)
    found = cluster_texts(x, 3, metric=metric)
    assert sorted(found.sizes) == [7, 12, 30]
    for group in range(3):
        assert found.assignments[labels == group].unique().numel() == 1
    near, weights = found.route(x + 0.01)
    assert torch.equal(near, found.assignments)
    torch.testing.assert_close(weights.sum(1), torch.ones(len(x)))
    assert torch.equal(weights.argmax(1), near)
    if metric == "cosine":
        assert torch.equal(found.route(100.0 * x)[0], near)
    sharp = found.route(x[:1], temperature=1e-3)[1]
    assert float(sharp.max()) > 0.999


def test_bad_embeddings_are_refused() -> None:
    x, _ = blobs((5, 5), 4)
    for wrong, words in ((x[0], "not a matrix"), (x * float("nan"), "NaN"), (torch.zeros(3, 4), "text 0 is zero")):
        with pytest.raises(MergeError, match=words):
            cluster_texts(wrong, 2)
    with pytest.raises(MergeError, match="k is not usable"):
        cluster_texts(x, 11)
    with pytest.raises(MergeError, match="metric is not usable"):
        cluster_texts(x, 2, metric="l1")  # type: ignore[arg-type]
    found = cluster_texts(x, 2)
    with pytest.raises(MergeError, match="another width"):
        found.route(x[:, :2])
    for temperature in (0.0, 1e-308):
        with pytest.raises(MergeError, match="temperature"):
            found.route(x, temperature=temperature)
    for what, words in ((x.to(torch.complex64), "complex"), ("text", "not numbers"), ([[1.0], [1.0, 2.0]], "not num")):
        with pytest.raises(MergeError, match=words):
            cluster_texts(what, 2)
    assert not cluster_texts(x.clone().requires_grad_(), 2).centroids.requires_grad
