"""`soft_threshold`: the proximal maps beside their definitions, in float64."""

from __future__ import annotations

import pytest
import torch

import mergekernels as mk
from mergekernels import ops
from mergekernels.adapters.model import Factors
from mergekernels.ops.spectral.above import remainder
from spectra import F64, SPECTRA, factors, gaussian, matrix, orthonormal, relative, shrunk, svd, values, with_values

SHAPES = [(60, 60), (120, 40), (40, 120)]


def squared_threshold(s, mu):
    """mu times the nuclear norm of the minimiser, by bisection on t = mu * sum (s - t)_+."""
    low, high = 0.0, float(s.max()) if s.numel() else 0.0
    for _ in range(200):
        t = (low + high) / 2
        low, high = (t, high) if mu * float((s - t).clamp_min(0).sum()) > t else (low, t)
    return low


def objective(x, y, mu, kind):
    gap, norm = float((x - y.to(F64)).norm() ** 2), float(svd(y)[1].sum())
    return gap / 2 + mu * norm if kind == "plain" else gap + mu * norm**2


@pytest.mark.parametrize("mu", [1e-3, 0.1, 0.9])
@pytest.mark.parametrize("kind", ["plain", "squared"])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_against_the_definition(spectrum, kind, mu):
    for shape in SHAPES:
        x = matrix(spectrum, *shape)
        s = svd(x)[1]
        tau = mu if kind == "plain" else squared_threshold(s, mu)
        made = ops.soft_threshold(x, mu, kind)
        want = shrunk(x, tau)
        assert made.y.dtype == torch.float32 and made.y.shape == x.shape
        assert float((made.y.to(F64) - want).norm()) <= 1e-6 * float(x.norm())
        left = (s - tau).clamp_min(0)
        assert abs(made.nuclear - float(left.sum())) <= 1e-6 * float(s.sum())
        near = int(((s - tau).abs() < 1e-6 * float(s[0])).sum())
        assert abs(made.rank - int((left > 0).sum())) <= near


@pytest.mark.parametrize("kind", ["plain", "squared"])
def test_it_is_the_minimum(kind):
    """No other matrix nearby has a smaller objective."""
    x = matrix("decay", 30, 20, dtype=F64)
    y = ops.soft_threshold(x, 0.2, kind).y
    best = objective(x, y, 0.2, kind)
    for seed in range(20):
        step = gaussian(30, 20, seed)
        for size in (1e-3, 1e-2, 0.1):
            assert objective(x, y + size * step, 0.2, kind) > best
    for factor in (0.9, 0.99, 1.01, 1.1):
        assert objective(x, y * factor, 0.2, kind) > best


def test_zero_and_large_thresholds():
    for x in (matrix("decay", 40, 30), matrix("decay", 40, 30, dtype=F64)):
        top = float(svd(x)[1][0])
        for kind in ("plain", "squared"):
            made = ops.soft_threshold(x, 0.0, kind)
            assert torch.equal(made.y, x) and made.rank == 30
        for mu in (top * 1.0001, 10 * top, 1e6):
            made = ops.soft_threshold(x, mu)
            assert torch.equal(made.y, torch.zeros_like(x)) and made.nuclear == 0.0 and made.rank == 0
        assert ops.soft_threshold(x, 1e6, "squared").rank >= 1  # its threshold is never above the largest value


@pytest.mark.parametrize("rank", [1, 6, 12])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_factors(spectrum, rank):
    b, a = factors(spectrum, 50, 40, rank)
    product = b.to(F64) @ a.to(F64)
    for kind in ("plain", "squared"):
        made = ops.soft_threshold(Factors(b, a), 0.3, kind)
        tau = 0.3 if kind == "plain" else squared_threshold(svd(product)[1], 0.3)
        assert float((made.y.dense().to(F64) - shrunk(product, tau)).norm()) <= 1e-6 * float(product.norm())
        assert made.y.rank == made.rank
        assert abs(made.nuclear - float((svd(product)[1] - tau).clamp_min(0).sum())) <= 1e-6 * float(product.norm())
    same = ops.soft_threshold(Factors(b, a), 0.0)
    assert torch.equal(same.y.b, b) and torch.equal(same.y.a, a)
    assert same.rank == int((values(spectrum, rank) > 0).sum())


@pytest.mark.parametrize(("dim", "sizes"), [(0, [50, 0, 70]), (1, [7, 33])])
def test_shards(dim, sizes):
    x = matrix("decay", 120, 40)
    made = ops.soft_threshold(ops.Sharded(list(x.split(sizes, dim)), dim), 0.2)
    whole = ops.soft_threshold(x, 0.2)
    assert made.y.dim == dim and made.y.sizes == sizes
    assert relative(made.y.dense(), whole.y) <= 1e-6
    assert made.nuclear == whole.nuclear and made.rank == whole.rank


def test_lists():
    xs = [matrix(kind, *shape) for kind in SPECTRA for shape in SHAPES]
    for x, made in zip(xs, ops.soft_threshold(xs, 0.2), strict=True):
        assert relative(made.y, ops.soft_threshold(x, 0.2).y) <= 1e-6
    assert ops.soft_threshold([], 0.2) == []


@pytest.mark.parametrize("kind", ["plain", "squared"])
def test_equivariance_and_no_amplification(kind):
    x = matrix("ill", 50, 40, dtype=F64)
    q, r = orthonormal(50, 50, 7), orthonormal(40, 40, 8)
    f = lambda y: ops.soft_threshold(y, 1e-2, kind).y  # noqa: E731
    assert relative(f(q @ x @ r.mT), q @ f(x) @ r.mT) <= 1e-10
    noise = 1e-4 * gaussian(50, 40, 3)
    assert float((f(x + noise) - f(x)).norm()) <= float(noise.norm()) * (1 + 1e-9)


LARGE = {  # few values above a threshold, of a matrix that is large enough for that to matter
    "decay": lambda i: (i + 1) ** -0.7,
    "exponential": lambda i: torch.exp(-i / 30),
    "head": lambda i: torch.where(i < 5, 100 - 10 * i, 1 / (1 + i / 50)),
    "degenerate": lambda i: (1 + torch.div(i, 8, rounding_mode="floor")) ** -0.7,
    "low rank": lambda i: torch.where(i < 30, 1.0, 0.0),
}


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("name", LARGE)
def test_only_what_is_above_the_threshold(name, flip):
    """Cold, and warm for a similar matrix; with thresholds just beside a value."""
    m, n = 450, 400
    s = LARGE[name](torch.arange(n, dtype=F64))
    x = with_values(s, m, n).float()
    near = x + 1e-3 * float(x.norm()) / (m * n) ** 0.5 * gaussian(m, n, 5).float()
    if flip:
        x, near = x.mT, near.mT
    for mu, kind in ((float(s[20]) * 0.9999, "plain"), (float(s[20]) * 1.0001, "plain"), (0.02, "squared")):
        tau = mu if kind == "plain" else squared_threshold(s, mu)
        made = ops.soft_threshold(x, mu, kind)
        if int((s > tau).sum()) < 40:
            assert made.route == "above"
        assert float((made.y.to(F64) - shrunk(x, tau)).norm()) <= 1e-6 * float(x.norm())
        assert abs(made.nuclear - float((s - tau).clamp_min(0).sum())) <= 1e-5 * float(s.sum())
        again = ops.soft_threshold(near, mu, kind, warm=made.basis)
        tau = mu if kind == "plain" else squared_threshold(svd(near)[1], mu)
        assert float((again.y.to(F64) - shrunk(near, tau)).norm()) <= 1e-6 * float(near.norm())


def test_a_misleading_start_does_not_matter():
    """A start orthogonal to everything above the threshold, or of one column, or of too many."""
    s = LARGE["exponential"](torch.arange(400, dtype=F64))
    x = with_values(s, 420, 400, seed=3).float()
    _, _, vh = svd(x)
    want = shrunk(x, 0.6)
    for warm in (vh[300:330].mT.float(), vh[:1].mT, vh[:399].mT.float(), torch.zeros(400, 5)):
        made = ops.soft_threshold(x, 0.6, warm=warm)
        assert float((made.y.to(F64) - want).norm()) <= 1e-6 * float(x.norm())
        assert made.rank == int((s > 0.6).sum())


def test_what_a_block_misses_is_found():
    """The last check before an answer: a direction above the threshold that is not in the block."""
    s = torch.tensor([5.0, 4.0, 3.0, 0.5], dtype=F64)
    x = with_values(s, 50, 40).float()
    vh = svd(x)[2].float()
    for missing in range(3):
        rest = vh[[i for i in range(4) if i != missing]].mT
        found = remainder(x, rest, 1.0)
        assert float((vh[missing] @ torch.linalg.qr(found)[0]).norm()) > 0.99
    assert remainder(x, vh[:3].mT, 1.0) is None
    assert remainder(x, vh[:4].mT, 1e-3) is None  # nothing is left but rounding


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_scaling(scale):
    """Squares of the entries would leave the range of float32."""
    s = LARGE["exponential"](torch.arange(400, dtype=F64))
    x = with_values(s, 420, 400).float()
    want = shrunk(x, 0.6) * scale
    assert relative(ops.soft_threshold(x * scale, 0.6 * scale).y, want) <= 1e-5


def test_many_values_above_the_threshold():
    """Nothing is gained there: the Gram's eigenvectors."""
    x = gaussian(500, 400).float()
    for mu in (0.1, 5.0):
        made = ops.soft_threshold(x, mu)
        assert made.route == "gram"
        assert float((made.y.to(F64) - shrunk(x, mu)).norm()) <= 1e-6 * float(x.norm())


def test_bad_input():
    x = gaussian(5, 4)
    for mu in (-0.1, float("nan"), float("inf")):
        with pytest.raises(mk.MergeError, match="mu"):
            ops.soft_threshold(x, mu)
    with pytest.raises(mk.MergeError, match="kind"):
        ops.soft_threshold(x, 0.1, "cubed")
    with pytest.raises(mk.MergeError, match="warm"):
        ops.soft_threshold(x, 0.1, warm=gaussian(5, 2))
    with pytest.raises(mk.MergeError, match="warm"):
        ops.soft_threshold([x, x], 0.1, warm=[None])
    with pytest.raises(mk.MergeError, match=r"X\[1\] holds NaN"):
        ops.soft_threshold([x, x * float("nan")], 0.1)
