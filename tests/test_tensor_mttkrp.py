"""mttkrp against the einsum of the dense tensor."""

from __future__ import annotations

import pytest
import torch

from mergekernels import MergeError
from mergekernels.ops import Sharded, mttkrp
from stacks import dense, random_stack, relative

EQUATIONS = ("tij,ik,jk->tk", "tij,tk,jk->ik", "tij,tk,ik->jk")


def factors_of(tasks: int, m: int, n: int, c: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    return [torch.randn(size, c, generator=g, dtype=torch.float64) for size in (tasks, m, n)]


@pytest.mark.parametrize("mode", [0, 1, 2])
@pytest.mark.parametrize("ranks", [(4, 4, 4), (1, 5, 2, 3), (3,), (2, 0, 3)])
def test_every_mode_is_the_dense_product(mode: int, ranks: tuple[int, ...]) -> None:
    stack = random_stack(ranks, 23, 17)
    factors = factors_of(len(ranks), 23, 17, 6)
    others = [f for k, f in enumerate(factors) if k != mode]
    want = torch.einsum(EQUATIONS[mode], dense(stack), *others)
    given: list[torch.Tensor | None] = list(factors)
    given[mode] = None
    found = mttkrp(stack, given, mode)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12 * float(want.abs().max()))


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_sixteen_bit_factors_are_read_exactly_and_shards_do_not_show(mode: int) -> None:
    stack = random_stack((3, 4), 40, 30, dtype=torch.bfloat16)
    factors = factors_of(2, 40, 30, 5)
    whole = mttkrp(stack, factors, mode)
    others = [f for k, f in enumerate(factors) if k != mode]
    assert relative(whole, torch.einsum(EQUATIONS[mode], dense(stack), *others)) < 1e-12
    cut = [(Sharded(b.split([7, 0, 33]), 0), Sharded(a.split([20, 10], 1), 1)) for b, a in stack]
    assert relative(mttkrp(cut, factors, mode), whole) < 1e-13


def test_modules_are_done_one_by_one() -> None:
    stacks = [random_stack((2, 3), 9, 8, seed=1), random_stack((4,), 5, 6, seed=2)]
    factors = [factors_of(2, 9, 8, 3), factors_of(1, 5, 6, 2)]
    found = mttkrp(stacks, factors, 1)
    assert [tuple(x.shape) for x in found] == [(9, 3), (5, 2)]
    torch.testing.assert_close(found[1], mttkrp(stacks[1], factors[1], 1), rtol=0, atol=0)


def test_bad_input_is_named() -> None:
    stack = random_stack((2, 3), 9, 8)
    factors = factors_of(2, 9, 8, 3)
    with pytest.raises(MergeError, match="factor V does not fit"):
        mttkrp(stack, [factors[0], factors[1], factors[1]], 1)
    with pytest.raises(MergeError, match="mode is not usable"):
        mttkrp(stack, factors, 3)
    for few in (factors[:2], factors[0]):
        with pytest.raises(MergeError, match=r"factors are not usable; expected \[C, U, V\]"):
            mttkrp(stack, few, 2)
    with pytest.raises(MergeError, match="factor C is complex"):
        mttkrp(stack, [factors[0].to(torch.complex64), *factors[1:]], 2)
    with pytest.raises(MergeError, match="B and A do not fit together"):
        mttkrp([(stack[0][0], stack[1][1])], factors, 0)
    with pytest.raises(MergeError, match="differ in size"):
        mttkrp([stack[0], (torch.ones(4, 1), torch.ones(1, 8))], factors, 0)
    bad = stack[0][0].clone()
    bad[1, 1] = float("nan")
    with pytest.raises(MergeError, match=r"B of stack\[0\] holds NaN"):
        mttkrp([(bad, stack[0][1]), stack[1]], factors, 0)
    with pytest.raises(MergeError, match="cut the ranks"):
        mttkrp([(Sharded(stack[0][0].split(1, 1), 1), stack[0][1]), stack[1]], factors, 0)
