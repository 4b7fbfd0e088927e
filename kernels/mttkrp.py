"""The products of a stack of low-rank updates with two factor matrices, in Triton: gather by task, multiply, add up."""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["outer_kernel", "task_kernel", "tile_sizes"]


def tile_sizes(interpreted: bool) -> tuple[int, int, int]:
    """Rows of the result, stacked columns per step, columns of the result."""
    return (128, 64, 64) if interpreted else (64, 16, 32)


@triton.jit
def outer_kernel(x, p, c, owner, out, rows, ranks, width, ROWS: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr):
    """out[i, k] = sum over r of x[i, r] p[r, k] c[owner[r], k], float32, r in steps upwards; no split of r, no TF32.

    Reads 4 (R rows + 2 R width rows / ROWS) bytes, the second part from the cache, and writes 4 rows width; 2 R rows
    width flops. Without the fusion p c is written and read once more, and another launch needed.

    Grid: row tiles, tiles of WIDTH columns. x : [rows, R], p : [R, width], c : [T, width], all dense float32;
    owner : int32 [R].
    """
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in range(0, ranks, STEP):
        r = first + tl.arange(0, STEP)
        inside = r < ranks
        task = tl.load(owner + r, mask=inside, other=0)
        both = inside[:, None] & (k < width)[None, :]
        left = tl.load(x + i[:, None] * ranks + r[None, :], mask=(i < rows)[:, None] & inside[None, :], other=0.0)
        right = tl.load(p + r[:, None] * width + k[None, :], mask=both, other=0.0)
        right = right * tl.load(c + task[:, None] * width + k[None, :], mask=both, other=0.0)
        sums = tl.dot(left, right, sums, input_precision="ieee")
    tl.store(out + i[:, None] * width + k[None, :], sums, mask=(i < rows)[:, None] & (k < width)[None, :])


@triton.jit
def task_kernel(p, s, ends, out, width, STEP: tl.constexpr, WIDTH: tl.constexpr):
    """out[t, k] = sum over r = ends[t] .. ends[t + 1] - 1 of p[r, k] s[r, k], added up in float64 in steps upwards.

    Reads 8 R width bytes, writes 8 T width. Grid: tasks, column tiles. p, s : [R, width] float32. ends : int32 [T + 1].
    """
    t = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    sums = tl.zeros([WIDTH], tl.float64)
    first = tl.load(ends + t)
    last = tl.load(ends + t + 1)
    for start in range(first, last, STEP):
        r = start + tl.arange(0, STEP)
        at = r[:, None] * width + k[None, :]
        mask = (r < last)[:, None] & (k < width)[None, :]
        x = tl.load(p + at, mask=mask, other=0.0).to(tl.float64)
        sums += tl.sum(x * tl.load(s + at, mask=mask, other=0.0).to(tl.float64), axis=0)
    tl.store(out + t * width + k, sums, mask=k < width)
