"""Tiles of products under Triton's interpreter, bit for bit as a loop over ranks, and in any box."""

from __future__ import annotations

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton's interpreter is asked for before start: TRITON_INTERPRET=1", allow_module_level=True)

import torch

from mergekernels._backends import _triton_factors
from mergekernels.adapters.model import Factors
from mergekernels.ops import FactorTiles

M, N = 300, 517
RANKS = (3, 0, 16, 1)


def factors(seed: int = 0) -> list[Factors]:
    rng = torch.Generator().manual_seed(seed)
    return [Factors(torch.randn(M, r, generator=rng), torch.randn(r, N, generator=rng)) for r in RANKS]


def by_loop(f: Factors) -> torch.Tensor:
    """Each product rounded, then each sum, in order."""
    out = torch.zeros(f.b.shape[0], f.a.shape[1])
    for k in range(f.b.shape[1]):
        out = out + f.b[:, k, None] * f.a[k]
    return out


def tiles(given: list[Factors], rows: tuple[int, int], cols: tuple[int, int]) -> torch.Tensor:
    b, a = torch.cat([f.b for f in given], 1).t().contiguous(), torch.cat([f.a for f in given])
    ends = [0]
    for f in given:
        ends.append(ends[-1] + f.b.shape[1])
    return _triton_factors.factor_tiles(b, a, ends, rows, cols)


def test_every_box_has_the_bits_of_the_loop() -> None:
    given = factors()
    expected = torch.stack([by_loop(f) for f in given])
    for rows, cols in (((0, M), (0, N)), ((7, 8), (3, 501)), ((129, 300), (255, 258)), ((5, 5), (0, 9))):
        found = tiles(given, rows, cols)
        assert torch.equal(found, expected[:, rows[0] : rows[1], cols[0] : cols[1]])


def test_within_the_bound_of_the_reference() -> None:
    """Beside float64: at most (rank + 1) eps sum |b| |a|; beside the op's own route on the CPU twice that."""
    given = factors(1)
    found = tiles(given, (0, M), (0, N))
    reference = FactorTiles(given)
    for t, f in enumerate(given):
        bound = (RANKS[t] + 1) * 2.0**-24 * (f.b.abs().double() @ f.a.abs().double())
        assert bool(((found[t].double() - f.b.double() @ f.a.double()).abs() <= bound).all())
        assert bool(((found[t] - reference.tile(model=t)).double().abs() <= 2 * bound).all())


def test_op_takes_tiles_from_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: sums and single products, the weights in the left factors."""
    monkeypatch.setattr(_triton_factors, "serves", lambda b, ranks: True)
    given, weights = factors(2), [0.5, 1.0, -2.0, 3.0]
    op = FactorTiles(given, weights)
    weighted = [Factors(f.b * w, f.a) for f, w in zip(given, weights, strict=True)]
    whole = by_loop(Factors(torch.cat([f.b for f in weighted], 1), torch.cat([f.a for f in weighted])))
    assert torch.equal(op.tile((10, 200), (3, 300)), whole[10:200, 3:300])
    for t, (f, tile) in enumerate(zip(weighted, op.tiles((1, 9), (0, N)), strict=True)):
        assert torch.equal(tile, by_loop(f)[1:9]) and torch.equal(tile, op.tile((1, 9), None, t))
