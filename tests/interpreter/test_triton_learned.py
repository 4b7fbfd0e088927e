"""The passes of learned coefficients and masks under Triton's interpreter, bit for bit as by the reference."""

from __future__ import annotations

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton's interpreter is asked for before start: TRITON_INTERPRET=1", allow_module_level=True)

import torch

from mergekernels.ops import concrete, seg_dot


def raw(x: torch.Tensor) -> torch.Tensor:
    return x.detach().contiguous().view(torch.uint8)


@pytest.mark.parametrize(
    ("dtype", "shape"), [(torch.bfloat16, (3, 1501)), (torch.float32, (4096,)), (torch.float64, (5,))], ids=str
)
def test_same_bits_as_the_reference(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    rng = torch.Generator().manual_seed(0)
    base, gradient, logits, *steps = (torch.randn(shape, generator=rng) for _ in range(5))
    models = [(base + 0.3 * x).to(dtype) for x in steps]
    base, gradient = base.to(dtype), gradient.to(dtype)
    found = [
        seg_dot(gradient, models, base=base, groups=3, seed=2**64 - 5, backend=backend)
        for backend in ("reference", "triton")
    ]
    assert raw(found[0]).equal(raw(found[1]))
    results = []
    for backend in ("reference", "triton"):
        c = torch.tensor([0.3, -0.7], requires_grad=True)
        z = logits.clone().requires_grad_()
        y = concrete(models, c, z, base=base, backend=backend, name="w", seed=2**63)
        y.backward(gradient)
        assert c.grad is not None and z.grad is not None
        results.append([y, c.grad, z.grad])
    for a, b in zip(*results, strict=True):
        assert raw(a).equal(raw(b))


def test_zero_mask_and_no_base() -> None:
    models = [torch.arange(6.0), torch.ones(6)]
    z = torch.full((6,), -1e9)
    assert not concrete(models, torch.ones(2), z, backend="triton").any()
    got = seg_dot(models[0], models, backend="triton")
    assert got.tolist() == [55.0, 15.0]
