"""What factorisations of adapters do with input that is poor, odd or wrong: the op, and tc_lora over it."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from mergekernels import MergeError, factorise_adapters, merge_adapters
from mergekernels.ops import cp_als, tucker
from stacks import Stack, dense, model, random_stack, relative

FAST: dict[str, Any] = {"n_starts": 2, "max_iter": 60}


def adapter(pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> Any:
    r = next(iter(pairs.values()))[1].shape[0]
    tensors = {}
    for name, (b, a) in pairs.items():
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.float()
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.float()
    return tensors, {"r": r, "lora_alpha": r, "peft_type": "LORA", "target_modules": sorted(pairs)}


def adapters(stack: Stack, module: str = "l.q") -> list[Any]:
    return [adapter({module: pair}) for pair in stack]


def test_rank_zero() -> None:
    stack = random_stack((2, 2), 9, 8)
    with pytest.raises(MergeError, match="rank is not usable"):
        cp_als(stack, 0)
    with pytest.raises(MergeError, match="cp_rank"):
        merge_adapters(adapters(stack), "tc_lora", cp_rank=0)


def test_rank_above_what_can_be_identified(caplog: pytest.LogCaptureFixture) -> None:
    """Cores of 4 x 3: Kruskal's bound is (4 + 3 + 3 - 2) / 2 = 4."""
    stack = random_stack((3, 3, 3), 4, 3)
    assert not any("identify" in w for w in cp_als(stack, 4, max_iter=300).diagnostics["warnings"])
    with caplog.at_level(logging.WARNING, "mergekernels"):
        found = cp_als(stack, 5, max_iter=300)
    assert "rank 5 is more than the 4 that 3 tasks in cores of 4 x 3 identify" in caplog.text
    assert "the terms need not be unique; what they add up to" in caplog.text
    assert found.fit == pytest.approx(1.0 - relative(model(found.factors), dense(stack)), abs=1e-7)
    with pytest.raises(MergeError, match="identify"):
        cp_als(stack, 5, strict=True, max_iter=3000)
    whole = merge_adapters(adapters(stack), "tc_lora", cp_rank=5, **FAST)
    assert any("identify" in w for w in whole.report.warnings)
    more = merge_adapters(adapters(stack), "tc_lora", cp_rank=40, **FAST)
    assert any("rank 40 is more than the 9" in w for w in more.report.warnings)


def test_one_adapter() -> None:
    stack = random_stack((4,), 20, 15)
    assert relative(merge_adapters(adapters(stack), "tc_lora").delta("l.q").double(), dense(stack)[0]) < 1e-5
    assert factorise_adapters(adapters(stack)).fit["l.q"] > 1.0 - 1e-5


def test_identical_adapters() -> None:
    stack = random_stack((4,), 20, 15) * 5
    for method in ("tc_lora", "lora_lego", "compress_then_merge", "tucker_merge"):
        options = {"weights": 0.2} if "merge" in method else {}
        found = merge_adapters(adapters(stack), method, **options).delta("l.q").double()
        assert relative(found, dense(stack)[0]) < (0.3 if method == "tucker_merge" else 1e-5)


def test_zero_adapters() -> None:
    stack = random_stack((3, 3, 3), 20, 15)
    stack[1] = (0.0 * stack[1][0], stack[1][1])
    found = merge_adapters(adapters(stack), "tc_lora", cp_rank=6, **FAST)
    parts = factorise_adapters(adapters(stack), 6, **FAST)
    assert float(parts.task(1).delta("l.q").abs().max()) < 1e-5
    assert relative(found.delta("l.q").double(), dense(stack).mean(0)) < 1e-4
    nothing = merge_adapters(adapters([(0.0 * b, a) for b, a in stack]), "tc_lora")
    assert float(nothing.delta("l.q").abs().max()) == 0.0
    with pytest.raises(MergeError):
        merge_adapters([], "tc_lora")


def test_mixed_module_sets() -> None:
    """A module that an adapter lacks counts as zero, and the report says so."""
    first, second = random_stack((3, 3), 20, 15), random_stack((3, 3), 20, 15, seed=1)
    given = [adapter({"l.q": first[0], "l.k": second[0]}), adapter({"l.q": first[1]})]
    found = merge_adapters(given, "tc_lora", cp_rank=6, n_starts=2)
    assert relative(found.delta("l.k").double(), 0.5 * dense(second)[0]) < 1e-5
    assert relative(found.delta("l.q").double(), dense(first).mean(0)) < 1e-3
    assert any("l.k" in w for w in found.report.warnings)


def test_nan() -> None:
    stack = random_stack((2, 2), 9, 8)
    stack[1][0][3, 1] = float("nan")
    for run in (lambda: cp_als(stack, 2), lambda: tucker(stack, 2)):
        with pytest.raises(MergeError, match=r"B of stack\[1\]"):
            run()
    for method in ("tc_lora", "lora_lego", "compress_then_merge", "tucker_merge"):
        with pytest.raises(MergeError, match=r"l\.q"):
            merge_adapters(adapters(stack), method)


def test_no_convergence(caplog: pytest.LogCaptureFixture) -> None:
    stack = random_stack((3, 3, 3), 20, 15)
    with caplog.at_level(logging.WARNING, "mergekernels"):
        found = cp_als(stack, 4, max_iter=3, tol=0.0)
    assert "no convergence in 3 sweeps" in caplog.text and f"{found.history[-1]:.6g}" in caplog.text
    assert len(found.history) == 3 and not found.diagnostics["converged"]
    assert found.diagnostics["last_change"] == pytest.approx(found.history[1] - found.history[2])
    with pytest.raises(MergeError, match="no convergence in 3 sweeps"):
        cp_als(stack, 4, max_iter=3, tol=0.0, strict=True)
    whole = merge_adapters(adapters(stack), "tc_lora", max_iter=3, tol=0.0)
    assert any("no convergence in 3 sweeps" in w for w in whole.report.warnings)
    with pytest.raises(MergeError, match="no convergence in 3 sweeps"):
        merge_adapters(adapters(stack), "tc_lora", max_iter=3, tol=0.0, strict=True)
