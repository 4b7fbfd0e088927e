"""`tall_qr`: orthogonality, reconstruction and rank within the promise, on every spectrum, dtype and cut."""

from __future__ import annotations

import pytest
import torch

import mergekernels as mk
from mergekernels import ops
from mergekernels.ops.spectral.gram import gram
from mergekernels.ops.spectral.sharded import BLOCK
from spectra import F64, SPECTRA, gaussian, matrix, relative, values, with_values


def off_orthonormal(q):
    k = q.shape[1]
    return float((q.to(F64).mT @ q.to(F64) - torch.eye(k, dtype=F64)).norm()) / max(k, 1) ** 0.5


def promised(x, made, cut=0.0, eps=1e-7):
    """Asserts what `tall_qr` promises."""
    q = made.q.dense() if isinstance(made.q, ops.Sharded) else made.q
    assert q.shape == (x.shape[0], made.rank) and made.r.shape == (made.rank, x.shape[1])
    assert made.r.dtype == F64 and q.dtype == (F64 if x.dtype == F64 else torch.float32)
    assert off_orthonormal(q) <= eps
    assert relative(q.to(F64) @ made.r, x) <= eps + cut


@pytest.mark.parametrize("tol", [1e-6, 1e-9])  # from the Gram; from the matrix itself
@pytest.mark.parametrize("kind", SPECTRA)
def test_spectra(kind, tol):
    x = matrix(kind, 600, 48)
    made = ops.tall_qr(x, tol)
    promised(x, made, cut=tol)
    if tol == 1e-6:
        assert made.rank == int((values(kind, 48) > 0).sum())
    if made.rank == 48:
        assert torch.equal(made.r, made.r.triu())


@pytest.mark.parametrize("kind", SPECTRA)
def test_float64_keeps_float64_accuracy(kind):
    x = matrix(kind, 600, 48, dtype=F64)
    promised(x, ops.tall_qr(x), cut=0.0, eps=1e-13)


@pytest.mark.parametrize("power", [3, 4, 5, 6, 7, 8])
def test_condition(power):
    """To 1e5 nothing is cut; beyond 1e6 the columns' dependence is, and never more than that."""
    x = with_values(torch.logspace(0, -power, 64, dtype=F64), 2000, 64).float()
    made = ops.tall_qr(x)
    promised(x, made, cut=1e-6 if power >= 6 else 0.0)
    sigma = torch.linalg.svdvals(x.to(F64))
    assert int((sigma > 3e-6 * sigma[0]).sum()) <= made.rank <= int((sigma > 3e-7 * sigma[0]).sum())
    if power <= 5:
        assert 0.3 <= made.condition / float(sigma[0] / sigma[-1]) <= 3
    promised(x, ops.tall_qr(x, 0.0))


def test_dependent_columns():
    x = gaussian(500, 20).float()
    noise = gaussian(500, 20, 1).float()
    twice = torch.cat([x, x], 1)
    promised(twice, ops.tall_qr(twice))
    assert ops.tall_qr(twice).rank == 20
    near = torch.cat([x, x + 1e-4 * noise], 1)
    promised(near, ops.tall_qr(near))
    assert ops.tall_qr(near).rank == 40
    nearer = torch.cat([x, x * (1 + 1e-7 * noise)], 1)
    promised(nearer, ops.tall_qr(nearer), cut=1e-6)
    assert ops.tall_qr(nearer).rank == 20


def test_small_columns_are_not_dropped():
    """A column counts by its direction: one far smaller than the others is kept, and found again."""
    x = gaussian(500, 20).float()
    x[:, 3] *= 1e-12
    for tol in (1e-6, 1e-9):
        made = ops.tall_qr(x, tol)
        assert made.rank == 20
        assert relative((made.q.to(F64) @ made.r)[:, 3], x[:, 3]) <= 1e-7


@pytest.mark.parametrize(("d", "c"), [(20, 50), (1, 7), (7, 1), (0, 4), (4, 0), (BLOCK + 100, 3)])
def test_shapes(d, c):
    x = gaussian(d, c).float()
    for tol in (1e-6, 0.0):
        made = ops.tall_qr(x, tol)
        assert made.rank == min(d, c)
        promised(x, made)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened(dtype):
    x = gaussian(300, 20).to(dtype)
    promised(x, ops.tall_qr(x))


ROWS = 2 * BLOCK + 700
CUTS = [[100, ROWS - 100], [BLOCK, BLOCK, 700], [5000, 0, 37, ROWS - 5037]]


@pytest.mark.parametrize("sizes", CUTS, ids=str)
def test_row_shards(sizes):
    """The Gram has the same bits however the rows are cut, and so does r; q keeps the shards."""
    x = gaussian(ROWS, 24).float()
    cut = ops.Sharded(list(x.split(sizes)), 0)
    assert torch.equal(gram(cut), gram(x))
    made, whole = ops.tall_qr(cut), ops.tall_qr(x)
    assert [p.shape[0] for p in made.q.parts] == sizes
    promised(x, made)
    assert torch.equal(made.r, whole.r)
    fine = ops.tall_qr(cut, 0.0)
    assert [p.shape[0] for p in fine.q.parts] == sizes
    promised(x, fine)
    assert torch.equal(fine.r, ops.tall_qr(x, 0.0).r)


def test_other_layouts_have_the_same_bits():
    """Column shards, and row shards of a transposed, offset or strided tensor."""
    x = gaussian(ROWS, 24).float()
    want = gram(x)
    assert torch.equal(gram(ops.Sharded(list(x.split([5, 19], 1)), 1)), want)
    assert torch.equal(gram(x.mT.contiguous().mT), want)
    odd = torch.empty(ROWS * 25 + 1)[1:].view(ROWS, 25)[:, :24]
    odd.copy_(x)
    assert torch.equal(gram(odd), want)
    promised(x, ops.tall_qr(ops.Sharded(list(x.split([5, 19], 1)), 1)))
    assert relative(want, x.to(F64).mT @ x.to(F64)) < 1e-15


def test_lists_are_as_single_matrices():
    xs = [matrix(kind, 80 + 10 * i, 12) for i, kind in enumerate(SPECTRA)]
    for x, made in zip(xs, ops.tall_qr(xs), strict=True):
        assert torch.equal(made.q, ops.tall_qr(x).q) and torch.equal(made.r, ops.tall_qr(x).r)
    assert ops.tall_qr([]) == []


def test_threads_are_left_as_they_were():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        ops.tall_qr([gaussian(50, 5)] * 5)
        assert torch.get_num_threads() == 2
        with pytest.raises(mk.MergeError):
            ops.tall_qr([gaussian(50, 5), torch.full((3, 2), float("nan"))] * 2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def fails(code, function, *args, **kwargs):
    with pytest.raises(mk.MergeError) as info:
        function(*args, **kwargs)
    assert info.value.code == code
    return str(info.value)


def test_bad_input():
    x = gaussian(10, 3)
    holes = x.clone()
    holes[4, 1] = float("nan")
    assert "X[1]" in fails("data.nonfinite", ops.tall_qr, [x, holes])
    holes[4, 1] = float("inf")
    assert "shard 1 of X" in fails("data.nonfinite", ops.tall_qr, ops.Sharded([x, holes], 0))
    fails("matrix.dimension", ops.tall_qr, x[0])
    fails("tensor.dtype", ops.tall_qr, x.to(torch.int32))
    fails("tensor.type", ops.tall_qr, "x")
    fails("argument", ops.tall_qr, x, 1.0)
    fails("argument", ops.tall_qr, x, -1e-9)
    fails("shards.cuts", ops.Sharded, [x, gaussian(10, 4)], 0)
    fails("shards.cuts", ops.Sharded, [x, x.float()], 0)
    fails("shards.empty", ops.Sharded, [], 0)
    fails("shards.dimension", ops.Sharded, [x], 2)
