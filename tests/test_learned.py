"""Learned coefficients and masks: gradients against torch's own derivative of the formula, bits across backends."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mergekernels as mk
from brute import philox_word
from mergekernels._backends.dispatch import load
from mergekernels.errors import ArgumentError
from mergekernels.ops import combine, concrete, seg_dot

BACKENDS = [name for name in ("reference", "cpu") if {"seg_dot", "concrete", "groups"} <= load(name).FEATURES]
SHAPE = (37, 301)  # three canonical blocks, the last one uneven


def family(dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = SHAPE, count: int = 3) -> tuple[Any, Any, Any]:
    """A base, models and a gradient."""
    rng = torch.Generator().manual_seed(0)
    base, gradient, *models = (torch.randn(shape, generator=rng, dtype=torch.float64) for _ in range(count + 2))
    return base.to(dtype), [(base + 0.3 * m).to(dtype) for m in models], gradient.to(dtype)


def words(name: str, stream: int, seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    """The Philox words of a tensor."""
    count = int(np.prod(shape))
    return torch.tensor([philox_word(seed, name, stream, g) for g in range(count)]).reshape(shape)


def groups_of(count: int, seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    """The group of every element."""
    return (words("x".join(map(str, shape)), 3, seed, shape) * count) >> 32


def uniform(name: str, seed: int, step: int, shape: tuple[int, ...]) -> torch.Tensor:
    """The uniform draws of a mask."""
    key = hashlib.sha256(seed.to_bytes(8, "little") + step.to_bytes(8, "little")).digest()[:8]
    word = words(name, 1, int.from_bytes(key, "little"), shape)
    return ((word >> 9).double() + 0.5) * 2.0**-23


def masked_by_hand(base: Any, models: Any, c: torch.Tensor, z: torch.Tensor, u: torch.Tensor, tau: float) -> Any:
    """Concrete's merge in plain torch."""
    m = torch.sigmoid((z + torch.log(u) - torch.log(1 - u)) / tau)
    m = m / m.mean()
    return base + sum(ct * m * (x - base) for ct, x in zip(c, models, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_coefficients_per_tensor(backend: str) -> None:
    base, models, gradient = family()
    c = torch.tensor([0.3, -0.7, 1.2], dtype=torch.float64, requires_grad=True)
    for x0 in (base, None):
        y = combine(models, c, base=x0, backend=backend)
        zero = torch.zeros_like(base) if x0 is None else base
        want = zero + sum(ct * (x - zero) for ct, x in zip(c, models, strict=True))
        assert torch.allclose(y, want, rtol=0, atol=1e-14)
        (got,) = torch.autograd.grad(y, c, gradient)
        (expected,) = torch.autograd.grad(want, c, gradient)
        assert torch.allclose(got, expected, rtol=1e-13)
        assert torch.equal(got, seg_dot(gradient, models, base=x0, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_coefficients_per_group(backend: str) -> None:
    base, models, gradient = family()
    count = 5
    group = groups_of(count, 9, SHAPE)
    c = torch.randn(3, count, dtype=torch.float64, requires_grad=True)
    y = combine(models, c, base=base, seed=9, backend=backend)
    want = base + sum(ct[group] * (x - base) for ct, x in zip(c, models, strict=True))
    assert torch.allclose(y, want, rtol=0, atol=1e-14)
    (got,) = torch.autograd.grad(y, c, gradient)
    (expected,) = torch.autograd.grad(want, c, gradient)
    assert torch.allclose(got, expected, rtol=1e-12, atol=1e-13)
    one = combine(models, c.detach()[:, :1], base=base, backend=backend)
    assert torch.equal(one, combine(models, c.detach()[:, 0], base=base, backend=backend))
    # The groups belong to the shape, not to the tensor.
    other = combine([m + 1 for m in models], c, base=base + 1, seed=9, backend=backend)
    assert torch.allclose(other - 1, y, rtol=0, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_relaxed_mask(backend: str) -> None:
    base, models, gradient = family()
    z = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    c = torch.tensor([0.3, -0.7, 1.2], dtype=torch.float64, requires_grad=True)
    settings = {"temperature": 0.6, "name": "layer.weight", "seed": 3, "step": 7}
    y = concrete(models, c, z, base=base, backend=backend, **settings)
    want = masked_by_hand(base, models, c, z, uniform("layer.weight", 3, 7, SHAPE), 0.6)
    assert torch.allclose(y, want, rtol=0, atol=1e-13)
    got = torch.autograd.grad(y, (c, z), gradient)
    expected = torch.autograd.grad(want, (c, z), gradient)
    assert torch.allclose(got[0], expected[0], rtol=1e-12, atol=1e-12)
    assert torch.allclose(got[1], expected[1], rtol=1e-9, atol=1e-13)
    assert not torch.equal(y, concrete(models, c, z, base=base, backend=backend, **(settings | {"step": 8})))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str) -> None:
    base, models, _ = family(shape=(4, 6), count=2)
    c = torch.tensor([0.3, -0.7], dtype=torch.float64, requires_grad=True)
    k = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    z = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda c: combine(models, c, base=base, backend=backend), c)
    assert torch.autograd.gradcheck(lambda k: combine(models, k, base=base, backend=backend), k)
    assert torch.autograd.gradcheck(lambda c, z: concrete(models, c, z, base=base, backend=backend), (c, z))
    # A clamp outside freezes what is saturated.
    y = combine(models, c.clamp(0, 1), base=base, backend=backend)
    assert torch.autograd.grad(y.sum(), c)[0][1] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [SHAPE, (5,), (4096,), (2, 4097)])
def test_same_bits_on_every_backend(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    base, models, gradient = family(dtype, shape)
    c = torch.tensor([0.3, -0.7, 1.2])
    k = torch.randn(3, 7, generator=torch.Generator().manual_seed(1))
    z = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    found = []
    for backend, threads in [(b, t) for b in BACKENDS for t in (1, 3)]:
        leaves = [x.clone().requires_grad_() for x in (c, k, c, z)]
        options: dict[str, Any] = {"base": base, "backend": backend, "threads": threads}
        outputs = [
            combine(models, leaves[0], **options),
            combine(models, leaves[1], seed=5, **options),
            concrete(models, leaves[2], leaves[3], name="w", **options),
        ]
        assert all(y.dtype == dtype for y in outputs)
        torch.autograd.backward(outputs, [gradient] * 3)
        dots = seg_dot(gradient, models, base=base, groups=7, backend=backend, threads=threads)
        found.append([*outputs, *(x.grad for x in leaves), dots])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert a is not None and b is not None
            assert a.view(torch.uint8).equal(b.view(torch.uint8))


def test_float32_sums_are_exact_to_rounding() -> None:
    base, models, gradient = family(torch.float32)
    exact = [(gradient.double() * (m - base).double()).sum() for m in models]
    got = seg_dot(gradient, models, base=base)
    assert got.dtype == torch.float64 and torch.allclose(got, torch.stack(exact), rtol=1e-13)


class Created(TorchDispatchMode):
    """Counts new tensors of a size."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.names = numel, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.numel() == self.numel and "alias" not in str(func):
            pointers = [a.data_ptr() for a in args if isinstance(a, torch.Tensor)]
            if result.data_ptr() not in pointers:
                self.names.append(str(func))
        return result


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the reference is the specification and has temporaries")
def test_no_temporaries_of_full_size() -> None:
    base, models, gradient = family(torch.float32, count=6)
    c = torch.full((6,), 0.3, requires_grad=True)
    z = torch.zeros(SHAPE, requires_grad=True)
    with Created(base.numel()) as made:
        y = combine(models, c, base=base, backend="cpu")
    assert len(made.names) == 1  # the result
    with Created(base.numel()) as made:
        torch.autograd.grad(y, c, gradient)
    assert not made.names
    with Created(base.numel()) as made:
        y = concrete(models, c, z, base=base, backend="cpu")
    assert len(made.names) == 1
    with Created(base.numel()) as made:
        torch.autograd.grad(y, (c, z), gradient)
    assert len(made.names) == 1  # the gradient of the logits


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_and_expanded(backend: str) -> None:
    base, models, gradient = family(shape=(40, 50))
    c = torch.tensor([0.3, -0.7, 1.2], dtype=torch.float64, requires_grad=True)
    turned = [m.t() for m in models]
    y = combine(turned, c, base=base.t(), backend=backend)
    assert torch.equal(y, combine(models, c, base=base, backend=backend).t())
    (got,) = torch.autograd.grad(y.sum(), c)
    assert torch.allclose(got, torch.stack([(m - base).sum() for m in models]), rtol=1e-10)
    assert torch.allclose(seg_dot(gradient.t(), turned, base=base.t()), seg_dot(gradient, models, base=base))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_of_zeros_is_the_base(backend: str) -> None:
    base, models, gradient = family()
    c = torch.ones(3, dtype=torch.float64, requires_grad=True)
    z = torch.full(SHAPE, -1e9, dtype=torch.float64, requires_grad=True)
    y = concrete(models, c, z, base=base, backend=backend)
    assert torch.equal(y, base)
    slopes = torch.autograd.grad(y, (c, z), gradient)
    assert not slopes[0].any() and not slopes[1].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_and_nan(backend: str) -> None:
    base, models, gradient = family(shape=(0, 3))
    c = torch.ones(3, dtype=torch.float64, requires_grad=True)
    z = torch.ones(0, 3, dtype=torch.float64, requires_grad=True)
    for y in (combine(models, c, base=base, backend=backend), concrete(models, c, z, base=base, backend=backend)):
        assert y.shape == (0, 3)
        assert not torch.autograd.grad(y, c, gradient)[0].any()
    base, models, gradient = family(shape=(5, 3))
    models[1][2, 2] = torch.nan
    y = combine(models, c, base=base, backend=backend)
    assert y.isnan().sum() == 1
    assert torch.autograd.grad(y, c, gradient)[0].isnan().tolist() == [False, True, False]


def test_training_finds_coefficients() -> None:
    base, models, _ = family()
    target = base + 0.8 * (models[0] - base) - 0.2 * (models[2] - base)
    c = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [c], max_iter=30, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = ((combine(models, c, base=base) - target) ** 2).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert torch.allclose(c, torch.tensor([0.8, 0.0, -0.2], dtype=torch.float64), atol=1e-6)


def test_inputs_changed_before_backward_are_noticed() -> None:
    base, models, gradient = family()
    c = torch.ones(3, dtype=torch.float64, requires_grad=True)
    y = combine(models, c, base=base)
    models[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y, c, gradient)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        y = combine(models, c, base=base)
        (slope,) = torch.autograd.grad(y, c, gradient.requires_grad_(), create_graph=True)
        slope.sum().backward()


def test_refusals() -> None:
    base, models, gradient = family(shape=(3, 4))
    c, z = torch.ones(3), torch.zeros(3, 4)
    live = [models[0], models[1], models[2].clone().requires_grad_()]
    cases: list[tuple[Any, str]] = [
        (lambda: combine(models, torch.ones(2), base=base), "coefficients"),
        (lambda: combine(models, torch.ones(3, 257), base=base), "at most 256 groups"),
        (lambda: combine(models, torch.ones(3, dtype=torch.int64), base=base), "coefficients"),
        (lambda: combine(models, [1, 1, 1], base=base), "coefficients"),
        (lambda: combine(models, c * torch.nan, base=base), "finite"),
        (lambda: combine(live, c, base=base), "requires a gradient"),
        (lambda: combine(models, c, base=base, seed=-1), "seed"),
        (lambda: concrete(models, torch.ones(3, 2), z, base=base), "coefficients"),
        (lambda: concrete(models, c, z[:2], base=base), "logits"),
        (lambda: concrete(models, c, z, base=base, temperature=0.0), "temperature"),
        (lambda: concrete(models, c, z, base=base, step=-1), "step"),
        (lambda: seg_dot(gradient[:2], models, base=base), "gradient"),
        (lambda: seg_dot(gradient, models, base=base, groups=0), "groups"),
        (lambda: seg_dot(gradient, models, base=base, groups=257), "groups"),
    ]
    for call, message in cases:
        with pytest.raises(mk.MergeError, match=message):
            call()


def test_tensors_without_plain_memory() -> None:
    base, models, gradient = family(torch.float32, shape=(3, 4))
    c, z = torch.ones(3), torch.zeros(3, 4)
    for strange in (lambda x: x.to("meta"), lambda x: x.to_sparse()):
        cases: list[tuple[Any, str]] = [
            (lambda: combine(models, strange(c), base=base), "coefficients"),  # noqa: B023
            (lambda: concrete(models, strange(c), z, base=base), "coefficients"),  # noqa: B023
            (lambda: concrete(models, c, strange(z), base=base), "logits"),  # noqa: B023
            (lambda: seg_dot(strange(gradient), models, base=base), "the gradient"),  # noqa: B023
        ]
        for call, what in cases:
            with pytest.raises(ArgumentError, match=f"{what} has no plain memory"):
                call()
    with pytest.raises(ArgumentError, match=r"inside a transform such as torch\.func\.grad"):
        torch.func.grad(lambda x: combine(models, x, base=base).sum())(c)
    with pytest.raises(ArgumentError, match="logits has a dtype that cannot be merged"):
        concrete(models, c, z.to(torch.float8_e5m2), base=base)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lazily_negated_tensors_have_their_values(backend: str) -> None:
    base, models, gradient = family(torch.float32, shape=(3, 4))
    c, z = torch.ones(3, requires_grad=True), torch.randn(3, 4)
    negated = [torch._neg_view(x) for x in (z, gradient)]  # type: ignore[attr-defined]
    found = []
    for logits, slope in (negated, [-z, -gradient]):
        y = concrete(models, c, logits, base=base, backend=backend)
        dots = seg_dot(slope, models, base=base, backend=backend)
        found.append([y.detach(), dots, *torch.autograd.grad(y, c, slope)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_float64_gradient_is_not_rounded(backend: str) -> None:
    base, models, _ = family(torch.float32)
    gradient = torch.full(SHAPE, 1 + 2.0**-40, dtype=torch.float64)
    exact = [(gradient * (m.double() - base.double())).sum() for m in models]
    got = seg_dot(gradient, models, base=base, backend=backend)
    assert torch.allclose(got, torch.stack(exact), rtol=1e-14, atol=0)
    c = torch.ones(3, dtype=torch.float64, requires_grad=True)
    y = combine(models, c, base=base, out_dtype=torch.float64, backend=backend)
    assert torch.equal(torch.autograd.grad(y, c, gradient)[0], got)
    huge = seg_dot(gradient * 1e300, models, base=base, backend=backend)
    assert huge.isfinite().all()


@pytest.mark.parametrize("temperature", [1e-300, 1e300])
def test_a_temperature_must_be_a_number_of_the_arithmetic(temperature: float) -> None:
    models, c, z = [torch.ones(4), torch.zeros(4)], torch.ones(2), torch.zeros(4)
    with pytest.raises(ArgumentError, match=r"temperature is (too small|beyond the range)"):
        concrete(models, c, z, temperature=temperature)
    y = concrete([m.double() for m in models], c, z, temperature=temperature)
    assert y.isfinite().all()


def test_numbers_and_gradients_that_cannot_be_computed_with() -> None:
    x = torch.ones(4)
    for shape in ((1,), (1, 2)):
        with pytest.raises(ArgumentError, match="coefficients is beyond the range of float32"):
            combine([x], torch.full(shape, 1e300, dtype=torch.float64))
    with pytest.raises(ArgumentError, match="coefficients is beyond the range of float32"):
        concrete([x], torch.full((1,), 1e300, dtype=torch.float64), x)
    with pytest.raises(ArgumentError, match=r"gradient is not usable; expected bfloat16, .*; got torch.int64"):
        seg_dot(x.long(), [x])
