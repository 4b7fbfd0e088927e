"""The sides of products of factors from their Grams: when they serve, and what is made of them."""

from __future__ import annotations

import pytest
import torch

import mergekernels as mk
import spectral_brute as brute
from mergekernels import ops
from mergekernels.adapters.model import Factors
from mergekernels.ops.spectral.factor_sides import both_sides, departure, product_of, side_of
from spectral_cases import merged

F64 = torch.float64


def normal(m: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def leaning(d: int, c: int, condition: float, seed: int = 0) -> torch.Tensor:
    """Columns of about one norm, that depend on each other: singular values from 1 to 1 / condition."""
    u = torch.linalg.qr(normal(d, c, seed).double())[0]
    v = torch.linalg.qr(normal(c, c, seed + 1).double())[0]
    return ((u * torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), c, dtype=F64)) @ v.T).float()


@pytest.mark.parametrize("condition", [1.5, 20.0, 200.0, 1500.0])
@pytest.mark.parametrize("turned", [False, True])
def test_side(condition, turned):
    x = leaning(300, 24, condition)
    x = x.T.contiguous().T if turned else x
    scale = torch.exp2(torch.arange(24) % 7 - 3.0)
    side = side_of(x * scale)
    values = torch.linalg.svdvals(x.double() * scale / side.scale)
    true = float(values[0] / values[-1])
    assert true <= side.condition <= 24 * true
    assert brute.error(side.r.T @ side.r, side.gram) < 1e-13
    exact = (x * scale / side.scale).double()
    assert brute.error(side.gram, exact.T @ exact) < (3e-7 if side.condition <= 6 else 1e-13)
    q = side.times(torch.linalg.inv(side.r))
    assert q.dtype == torch.float32
    off = torch.linalg.matrix_norm(q.double().T @ q.double() - torch.eye(24, dtype=F64)) / 24**0.5
    assert float(off) < 2e-6  # 30 times the rounding of float32
    assert torch.allclose(side.rows(torch.linalg.inv(side.r)), q.T, rtol=0, atol=1e-6)


def test_what_a_gram_does_not_serve():
    x = normal(100, 8)
    assert side_of(x) is not None
    for spoiled in (x[:, [0, 1, 1]], x * torch.tensor([1.0] * 7 + [0.0]), x[:5], x.double(), x[:, :0]):
        assert side_of(spoiled) is None
    for bad in (float("nan"), float("inf"), 1e30):
        y = x.clone()
        y[3, 2] = bad
        assert side_of(y) is None
    assert side_of(x * 1e-20) is None
    assert side_of(leaning(100, 8, 1e5)) is None


@pytest.mark.parametrize("conditions", [(1.5, 1.5), (20, 40), (200, 1000)])
@pytest.mark.parametrize("spread", [1.0, 1e4])
def test_product(conditions, spread):
    b, a = leaning(200, 16, conditions[0]), leaning(150, 16, conditions[1], 5).T.contiguous()
    b = b * torch.logspace(0, -torch.log10(torch.tensor(spread)).item(), 16)
    sides = both_sides(Factors(b, a))
    found = product_of(*sides)
    want = torch.linalg.svdvals(b.double() @ a.double())[:16]
    error = ((found.s - want).abs() / want).max()
    assert float(error) < 1e-6  # of every value, also of the least
    u, v = sides[0].times(found.left).double(), sides[1].rows(found.right).double()
    assert brute.error((u * found.s) @ v, b.double() @ a.double()) < 2e-6
    for basis in (u, v.T):
        assert float(torch.linalg.matrix_norm(basis.T @ basis - torch.eye(16, dtype=F64))) / 4 < 3e-6


def test_departure_is_the_frobenius_norm():
    b, a = normal(90, 12) / 9, normal(12, 80, 1) / 8
    z = (b.double().T @ b.double()) @ (a.double() @ a.double().T)
    exact = float(torch.linalg.matrix_norm(z - torch.eye(12, dtype=F64)))
    assert departure(b, a) == pytest.approx(exact, rel=0.5)


@pytest.mark.parametrize("alike", [1.0, 1e-1, 1e-3, 1e-6])
def test_methods_do_not_depend_on_the_way(alike):
    """Adapters that share more and more: from sides in float32 to the routes for dependent factors."""
    b, a = normal(120, 6), normal(6, 90, 1)
    # Singular values as far apart as their vectors need.
    fall = 0.7 ** torch.arange(6)
    factors = [
        Factors((b + alike * normal(120, 6, 10 + t)) * fall, a + alike * normal(6, 90, 20 + t)) for t in range(3)
    ]
    exact = [f.b.double() @ f.a.double() for f in factors]
    direct = both_sides(ops.stack(factors)) is not None
    assert direct == (alike >= 1e-3)
    for method, want in (("tsv_m", brute.tsv_m(exact)), ("iso_c", brute.iso_c(exact))):
        if alike == 1e-6 or (method == "iso_c" and alike < 1e-1):
            continue  # what is left of the differences is rounding of the input
        found = merged(method, factors)
        assert brute.error(found.delta.dense(), want) < 1e-5 / alike, method


def test_errors_name_the_factor():
    b = normal(40, 4)
    b[2, 1] = float("nan")
    with pytest.raises(mk.MergeError, match="b of X holds NaN or Inf"):
        ops.polar(Factors(b, normal(4, 30)))
    with pytest.raises(mk.MergeError, match="a of X holds NaN or Inf"):
        ops.polar(Factors(normal(30, 4), b.T.contiguous()))
