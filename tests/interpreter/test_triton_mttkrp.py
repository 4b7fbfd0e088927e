"""The kernels of mttkrp under Triton's interpreter, against float64 products."""

from __future__ import annotations

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton's interpreter is asked for before start: TRITON_INTERPRET=1", allow_module_level=True)

import torch

from mergekernels._backends import _triton_mttkrp
from mergekernels.ops import mttkrp
from stacks import dense, random_stack

RANKS = (3, 0, 70, 1, 16)


def numbers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (300, 16), (129, 137)])
def test_outer(rows: int, width: int) -> None:
    """Within (R + 2) eps of the sums of magnitudes."""
    total = sum(RANKS)
    x, p, c = numbers(rows, total, seed=1), numbers(total, width, seed=2), numbers(len(RANKS), width, seed=3)
    owner = torch.repeat_interleave(torch.arange(len(RANKS)), torch.tensor(RANKS))
    right = p.double() * c.double()[owner]
    bound = (total + 2) * 2.0**-24 * (x.double().abs() @ right.abs())
    found = _triton_mttkrp.outer(x, p, c, RANKS)
    assert bool(((found.double() - x.double() @ right).abs() <= bound).all())


@pytest.mark.parametrize("width", [1, 16, 37])
def test_task_sums(width: int) -> None:
    """Products of float32 are exact in float64; a task of rank 0 gives zeros."""
    total = sum(RANKS)
    p, s = numbers(total, width, seed=1), numbers(total, width, seed=2)
    found = _triton_mttkrp.task_sums(p, s, RANKS)
    want = torch.stack([x.sum(0) for x in (p.double() * s.double()).split(RANKS)])
    torch.testing.assert_close(found, want, rtol=1e-13, atol=1e-13)
    assert float(found[1].abs().max()) == 0.0


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_the_op_takes_the_kernels(mode: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton_mttkrp, "serves", lambda x: True)
    stack = random_stack((4, 3, 5), 40, 30, dtype=torch.float32)
    factors = [numbers(size, 6, seed=size) for size in (3, 40, 30)]
    equation = ("tij,ik,jk->tk", "tij,tk,jk->ik", "tij,tk,ik->jk")[mode]
    others = [f.double() for k, f in enumerate(factors) if k != mode]
    want = torch.einsum(equation, dense(stack), *others)
    found = mttkrp(stack, factors, mode)
    assert found.dtype == torch.float64
    assert 0.0 < float((found - want).norm() / want.norm()) < 1e-6
