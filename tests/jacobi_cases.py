"""Small matrices of every kind, and the tests that every build of the small decompositions must pass.

target : fixture with the device; the native module is the one that `_cuda_launches.native` gives.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from mergekernels._backends import cuda_small
from mergekernels.errors import ArgumentError
from mergekernels.tensors import F32, F64, DType

BOUND = {F64: 1e-13, F32: 3e-5}
SHAPES = [(1, 1), (2, 1), (1, 7), (2, 2), (3, 3), (5, 4), (4, 9), (16, 16), (17, 16), (31, 30), (32, 32)]
LARGE = [(33, 33), (128, 16), (128, 64), (48, 96), (65, 65)]
KINDS = ("flat", "gaps", "head", "ill", "deficient", "equal", "zero", "duplicate", "tiny", "huge", "sparse")


def spectrum(k: int, kind: str) -> torch.Tensor:
    """k falling values of a kind."""
    i = torch.arange(k, dtype=torch.float64)
    if kind == "gaps":
        return 10.0 ** -(i // 3)
    if kind == "head":
        return torch.where(i == 0, 1e4, 1.0 / (1 + i))
    if kind == "ill":
        return 10.0 ** (-12 * i / max(1, k - 1))
    if kind == "deficient":
        return torch.where(i < (k + 1) // 2, 1.0 / (1 + i), 0.0)
    if kind == "equal":
        return torch.where(i < (k + 1) // 2, 3.0, 0.5)
    return 1 + 0.01 * (k - i)


def orthonormal(p: int, k: int, seed: int) -> torch.Tensor:
    draw = torch.randn(p, k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(draw).Q


def matrix(p: int, s: int, kind: str, seed: int = 0) -> torch.Tensor:
    """A p x s matrix of a kind, float64."""
    k = min(p, s)
    if kind == "zero":
        return torch.zeros(p, s, dtype=torch.float64)
    a = orthonormal(p, k, 2 * seed) * spectrum(k, kind) @ orthonormal(s, k, 2 * seed + 1).t()
    if kind == "duplicate":
        a[:, s // 2 :] = a[:, :1]
        a[p // 2 :] = a[:1]
    if kind == "sparse":
        a[:, ::3] = 0
        a[::2] = 0
    # Squares of the entries underflow, or overflow.
    return a * {"tiny": 1e-200, "huge": 1e200}.get(kind, 1.0)


def symmetric(s: int, kind: str, seed: int = 0) -> torch.Tensor:
    """A symmetric matrix of a kind; every third value is negative."""
    if kind == "zero":
        return torch.zeros(s, s, dtype=torch.float64)
    values = spectrum(s, kind) * (1 - 2.0 * (torch.arange(s) % 3 == 2))
    q = orthonormal(s, s, seed)
    g = q * values @ q.t()
    if kind == "sparse":
        g[::2] = 0
        g[:, ::2] = 0
    return (g + g.t()) / 2 * {"tiny": 1e-200, "huge": 1e200}.get(kind, 1.0)


def rounded(m: torch.Tensor, compute: DType) -> torch.Tensor:
    """The matrix whose decomposition is expected: as it is in the compute dtype, within its range."""
    if compute is F64:
        return m
    largest = float(m.abs().max())
    return (m / (largest if largest > 1e30 else 1.0)).float().double()


def check_svd(m: torch.Tensor, found: tuple[torch.Tensor, torch.Tensor, torch.Tensor], bound: float) -> None:
    """Residual, orthogonality, order, and the values of LAPACK."""
    u, s, vh = (x.cpu().double() for x in found)
    scale = max(float(m.abs().max()), 1e-300)
    m, s = m / scale, s / scale
    k = min(m.shape)
    assert u.shape == (m.shape[0], k) and s.shape == (k,) and vh.shape == (k, m.shape[1])
    norm = float(m.norm())
    assert float((u * s @ vh - m).norm()) <= bound * norm
    eye = torch.eye(k, dtype=torch.float64)
    assert float((u.t() @ u - eye).norm()) <= bound * k**0.5
    assert float((vh @ vh.t() - eye).norm()) <= bound * k**0.5
    assert bool((s[:-1] >= s[1:]).all()) and bool((s >= 0).all())
    assert float((s - torch.linalg.svdvals(m)).abs().max()) <= bound * norm


def check_eigh(g: torch.Tensor, found: tuple[torch.Tensor, torch.Tensor], bound: float) -> None:
    vectors, values = (x.cpu().double() for x in found)
    scale = max(float(g.abs().max()), 1e-300)
    g, values = g / scale, values / scale
    norm = float(g.norm())
    assert float((vectors * values @ vectors.t() - g).norm()) <= bound * norm
    eye = torch.eye(len(values), dtype=torch.float64)
    assert float((vectors.t() @ vectors - eye).norm()) <= bound * len(values) ** 0.5
    assert bool((values[:-1] >= values[1:]).all())
    assert float((values - torch.linalg.eigvalsh(g).flip(0)).abs().max()) <= bound * norm


def converged(found: cuda_small.Convergence, compute: DType) -> bool:
    eps = 2.0**-52 if compute is F64 else 2.0**-23
    return 1 <= found.sweeps <= cuda_small.SWEEPS and 0 <= found.off <= 8 * eps


@pytest.mark.parametrize("compute", [F64, F32], ids=str)
def test_svd_of_every_kind_and_shape(target: str, compute: DType) -> None:
    """One batch of unequal shapes; float32 keeps no values of 1e-200."""
    kinds = [k for k in KINDS if compute is F64 or k != "tiny"]
    cases = [(p, s, kind) for (p, s), kind in itertools.product(SHAPES, kinds)]
    cases += [(p, s, kinds[(3 * i + j) % len(kinds)]) for i, (p, s) in enumerate(LARGE) for j in range(3)]
    inputs = [rounded(matrix(p, s, kind, i), compute) for i, (p, s, kind) in enumerate(cases)]
    found = cuda_small.small_svd_batch([m.to(target) for m in inputs], compute=compute)
    for case, m, (u, s, vh, info) in zip(cases, inputs, found, strict=True):
        assert converged(info, compute), (case, info)
        assert u is not None and vh is not None
        check_svd(m, (u, s, vh), BOUND[compute])


@pytest.mark.parametrize("compute", [F64, F32], ids=str)
def test_eigh_of_every_kind_and_shape(target: str, compute: DType) -> None:
    kinds = [k for k in KINDS if k != "duplicate" and (compute is F64 or k != "tiny")]
    cases = list(itertools.product((1, 2, 3, 4, 7, 16, 31, 32), kinds))
    cases += [(s, kinds[(3 * i + j) % len(kinds)]) for i, s in enumerate((33, 64, 65, 96)) for j in range(3)]
    inputs = [rounded(symmetric(s, kind, i), compute) for i, (s, kind) in enumerate(cases)]
    found = cuda_small.small_eigh_batch([g.to(target) for g in inputs], compute=compute)
    for case, g, (vectors, values, info) in zip(cases, inputs, found, strict=True):
        assert converged(info, compute), (case, info)
        check_eigh(g, (vectors, values), BOUND[compute])


def test_largest_matrices_hold_their_vectors_in_global_memory(target: str) -> None:
    """128 x 128 where the vectors have no room on the chip, square and both ways."""
    m, g = matrix(128, 128, "ill", 1), symmetric(128, "gaps", 2)
    ((u, s, vh, info),) = cuda_small.small_svd_batch([m.to(target)])
    assert u is not None and vh is not None and converged(info, F64)
    check_svd(m, (u, s, vh), 1e-13)
    ((vectors, values, found),) = cuda_small.small_eigh_batch([g.to(target)])
    assert converged(found, F64)
    check_eigh(g, (vectors, values), 1e-13)


def test_bits_do_not_depend_on_the_batch_or_the_strides(target: str) -> None:
    """Alone, among others, and as a transposed or gappy view; values alone are those with vectors."""
    shapes = [(20, 12), (12, 20), (70, 40), (32, 32), (3, 2)]
    inputs = [matrix(p, s, "flat", p).to(target) for p, s in shapes]
    together = cuda_small.small_svd_batch(inputs)
    for m, (u, s, vh, _) in zip(inputs, together, strict=True):
        gaps = torch.zeros(2 * m.shape[0], 3 * m.shape[1], dtype=m.dtype, device=m.device)[::2, ::3]
        gaps.copy_(m)
        for other in (m, m.t().contiguous().t(), gaps):
            ((u1, s1, vh1, _),) = cuda_small.small_svd_batch([other])
            assert u is not None and vh is not None and u1 is not None and vh1 is not None
            assert torch.equal(u, u1) and torch.equal(s, s1) and torch.equal(vh, vh1)
        ((none, alone, nothing, _),) = cuda_small.small_svd_batch([m], vectors=False)
        assert none is None and nothing is None and torch.equal(alone, s)
    squares = [symmetric(s, "flat", s).to(target) for s in (5, 40, 17)]
    both = cuda_small.small_eigh_batch(squares)
    for g, (vectors, values, _) in zip(squares, both, strict=True):
        # Only the lower triangle is read.
        ((v1, w1, _),) = cuda_small.small_eigh_batch([g.tril() + torch.triu(torch.full_like(g, 7.0), 1)])
        assert torch.equal(vectors, v1) and torch.equal(values, w1)


def test_scaling_by_powers_of_two_changes_no_bits(target: str) -> None:
    m = matrix(24, 17, "gaps").to(target)
    (u, s, vh, info), (u1, s1, vh1, info1) = cuda_small.small_svd_batch([m, m * 2.0**-700])
    assert u is not None and vh is not None and u1 is not None and vh1 is not None
    assert torch.equal(u, u1) and torch.equal(vh, vh1) and torch.equal(s * 2.0**-700, s1) and info == info1


def test_diagonal_input_needs_one_sweep_and_stays(target: str) -> None:
    """Exact values: nothing is rotated, the columns are put in order."""
    d = torch.tensor([0.5, 4.0, 0.0, 2.0], dtype=torch.float64)
    ((u, s, vh, info),) = cuda_small.small_svd_batch([torch.diag(d).to(target)])
    assert info == (1, 0.0) and s.tolist() == [4.0, 2.0, 0.5, 0.0]
    assert u is not None and vh is not None
    assert vh.abs().argmax(1).tolist() == [1, 3, 0, 2] and u.abs().argmax(0).tolist() == [1, 3, 0, 2]
    ((vectors, values, found),) = cuda_small.small_eigh_batch([torch.diag(-d).to(target)])
    assert found == (1, 0.0) and values.tolist() == [0.0, -0.5, -2.0, -4.0]
    assert vectors.abs().argmax(0).tolist() == [2, 0, 3, 1]


def test_high_relative_accuracy_of_scaled_columns(target: str) -> None:
    """What one-sided Jacobi has over bidiagonalisation: columns of any scale, each value to its own precision."""
    scales = 2.0 ** -torch.arange(0, 80, 10, dtype=torch.float64)
    q = orthonormal(20, 8, 3)
    ((_, s, _, _),) = cuda_small.small_svd_batch([(q * scales).to(target)])
    assert float((s.cpu() / scales - 1).abs().max()) <= 1e-14


def test_not_finite_input_is_reported(target: str) -> None:
    bad, good = matrix(6, 4, "flat"), matrix(6, 4, "flat")
    for value in (float("nan"), float("inf"), -float("inf")):
        bad[5, 3] = value
        found = cuda_small.small_svd_batch([good.to(target), bad.to(target)])
        assert found[0][3].sweeps > 0 and found[1][3].sweeps == -1
        square = symmetric(5, "flat")
        square[4, 0] = value
        assert cuda_small.small_eigh_batch([square.to(target)])[0][2].sweeps == -1


def test_what_does_not_fit_is_refused(target: str) -> None:
    device = 0
    assert (
        cuda_small.fits(128, 64, device) and not cuda_small.fits(129, 2, device) and not cuda_small.fits(0, 4, device)
    )
    for wrong in (torch.zeros(129, 4), torch.zeros(3, 0)):
        with pytest.raises(ArgumentError, match="matrix 1 cannot"):
            cuda_small.small_svd_batch([torch.ones(2, 2).to(target), wrong.to(target)])
    with pytest.raises(ArgumentError, match="matrix 0 cannot"):
        cuda_small.small_eigh_batch([torch.ones(2, 3).to(target)])
    assert cuda_small.small_svd_batch([]) == [] and cuda_small.small_eigh_batch([]) == []
