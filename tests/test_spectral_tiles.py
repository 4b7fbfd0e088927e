"""Factor tiles beside products in float64, and the bits of one element in every box; stacks and balance."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from mergekernels import ops
from mergekernels.adapters.model import Factors
from mergekernels.errors import ArgumentError
from spectra import F64, gaussian, relative


def adapters(m, n, ranks=(4, 16, 0, 7), dtype=torch.float32):
    return [Factors(gaussian(m, r, 2 * i).to(dtype), gaussian(r, n, 2 * i + 1).to(dtype)) for i, r in enumerate(ranks)]


WEIGHTS = (0.5, -1.25, 3.0, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("shape", [(1100, 600), (3, 1500), (513, 1), (40, 30)])
def test_tiles_are_the_products(shape, dtype):
    parts = adapters(*shape, dtype=dtype)
    tiles = ops.FactorTiles(parts, WEIGHTS)
    wide = [w * (p.b.to(F64) @ p.a.to(F64)) for w, p in zip(WEIGHTS, parts, strict=True)]
    # A sum of r terms in order is wrong by at most r eps times the sum of the magnitudes of the terms.
    eps = torch.finfo(dtype).eps
    for model in (None, 0, 1, 2, 3):
        want = sum(wide) if model is None else wide[model]
        chosen = range(4) if model is None else [model]
        size = sum(abs(WEIGHTS[t]) * (parts[t].b.abs().to(F64) @ parts[t].a.abs().to(F64)) for t in chosen)
        got = tiles.tile(model=model)
        assert got.dtype == dtype and got.shape == shape
        assert bool(((got.to(F64) - want).abs() <= 28 * eps * size).all())


def test_bits_do_not_depend_on_the_box():
    m, n = 1200, 1100
    tiles = ops.FactorTiles(adapters(m, n), WEIGHTS)
    for model in (None, 1):
        whole = tiles.tile(model=model)
        for rows, cols in itertools.product(
            [(0, 1), (511, 513), (700, 1200), (5, 1100)], [(0, n), (512, 513), (3, 900)]
        ):
            box = whole[slice(*rows), slice(*cols)]
            assert torch.equal(tiles.tile(rows, cols, model), box)
            out = torch.full((rows[1] - rows[0], cols[1] - cols[0]), float("nan"))
            assert tiles.tile(rows, cols, model, out) is out and torch.equal(out, box)
    again = ops.FactorTiles(adapters(m, n), WEIGHTS)
    assert torch.equal(again.tile((17, 900), (100, 1001)), tiles.tile()[17:900, 100:1001])


def test_bits_do_not_depend_on_threads():
    tiles, before, found = ops.FactorTiles(adapters(600, 700), WEIGHTS), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(tiles.tile())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_no_columns_give_zeros_and_bad_boxes_are_refused():
    tiles = ops.FactorTiles(adapters(40, 30))
    assert len(tiles) == 4 and not tiles.tile(model=2).any()
    assert tiles.tile((5, 5)).shape == (0, 30)
    for rows, cols in (((0, 41), None), ((-1, 3), None), ((4, 3), None), (None, (0, 31))):
        with pytest.raises(ArgumentError, match="box"):
            tiles.tile(rows, cols)


def test_stack_is_the_sum():
    parts = adapters(50, 40)
    total = ops.stack(parts, WEIGHTS)
    assert total.rank == 27 and total.b.dtype == torch.float32
    want = sum(w * (p.b.to(F64) @ p.a.to(F64)) for w, p in zip(WEIGHTS, parts, strict=True))
    assert relative(total.b.to(F64) @ total.a.to(F64), want) <= 1e-7
    assert torch.equal(ops.stack(parts).a, torch.cat([p.a for p in parts]))
    assert ops.stack([parts[0], adapters(50, 40, dtype=F64)[1]]).a.dtype == F64
    for bad in ((), (parts[0], adapters(50, 41)[0])):
        with pytest.raises(ArgumentError):
            ops.stack(bad)
    with pytest.raises(ArgumentError, match="one weight"):
        ops.stack(parts, [1.0])


def test_balance_is_exact():
    b, a = gaussian(60, 9).float(), gaussian(9, 50, 1).float()
    b, a = b * 2.0 ** torch.arange(-30.0, 6.0, 4.0), a * 3.0 ** torch.arange(9.0)[:, None]
    b[:, 4], a[7] = 0.0, 0.0
    even_b, even_a = ops.balance(b, a)
    for i in range(9):
        assert torch.equal(torch.outer(even_b[:, i], even_a[i]), torch.outer(b[:, i], a[i]))
        left, right = float(even_b[:, i].norm()), float(even_a[i].norm())
        if left and right:
            assert abs(math.log2(left / right)) <= 1.0 + 1e-6
        else:
            assert torch.equal(even_b[:, i], b[:, i]) and torch.equal(even_a[i], a[i])
