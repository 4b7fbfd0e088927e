"""Tiles of products of factors in Triton, for element-wise passes over task vectors that nobody holds dense."""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["HEADER_SIZE", "LONGEST", "factor_tile_kernel", "tile_size"]

HEADER_SIZE = 6
"""Numbers before the ends in the table: first row, rows, first column, columns, m, n."""
LONGEST = 64
"""Rank up to which writing the tile takes longer than forming it; above, a matrix product of the library is faster."""


def tile_size(interpreted: bool) -> tuple[int, int]:
    """Rows and columns per program: 32 sums in each of 128 threads; under the interpreter few programs."""
    return (128, 256) if interpreted else (32, 128)


@triton.jit
def factor_tile_kernel(table, b, a, out, ROWS: tl.constexpr, COLS: tl.constexpr):
    """out[t, i, j] = sum over k = ends[t] .. ends[t + 1] - 1 of b[k, first row + i] * a[k, first column + j], float32.

    k runs upwards, every product is rounded, then every sum: an element has the same bits in every tile and on every
    device. No split of k, no tensor cores.
    Writes 4 bytes per element. Reads 4 rank (1 / ROWS + 1 / COLS) bytes per element, mostly from the cache.

    Grid: products times row tiles times column tiles, columns fastest.
    table : int64 header, then the ends. b : [rank, m], a : [rank, n], out : [products, rows, columns], all dense.
    """
    row0 = tl.load(table)
    rows = tl.load(table + 1)
    col0 = tl.load(table + 2)
    cols = tl.load(table + 3)
    m = tl.load(table + 4)
    n = tl.load(table + 5)
    across = (cols + COLS - 1) // COLS
    down = (rows + ROWS - 1) // ROWS
    at = tl.program_id(0).to(tl.int64)
    i = at // across % down * ROWS + tl.arange(0, ROWS)
    j = at % across * COLS + tl.arange(0, COLS)
    t = at // (across * down)
    first = tl.load(table + 6 + t)
    last = tl.load(table + 7 + t)
    sums = tl.zeros([ROWS, COLS], tl.float32)
    for k in range(first, last):
        x = tl.load(b + k * m + row0 + i, mask=i < rows, other=0.0)
        y = tl.load(a + k * n + col0 + j, mask=j < cols, other=0.0)
        sums = sums + x[:, None] * y[None, :]
    place = (t * rows + i)[:, None] * cols + j[None, :]
    tl.store(out + place, sums, mask=(i < rows)[:, None] & (j < cols)[None, :])
