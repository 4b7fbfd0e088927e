"""Results of small programs that a reader can check."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from mergekernels import _cpu
from mergekernels._backends import reference
from mergekernels._native import view_of
from mergekernels.errors import ArgumentError
from mergekernels.ops.keep import Draw, RankBand, RankDraw, Rows
from mergekernels.ops.program import Balance, Program, Useful
from mergekernels.tensors import F32, Piece


def run(
    program: Program, *models: list[float], base: list[float] | None = None, n: int = 0, **more: Any
) -> list[float]:
    """The output of a program on small lists, in float32."""
    views = [view_of(torch.tensor(x, dtype=torch.float32)) for x in models]
    x0 = None if base is None else view_of(torch.tensor(base, dtype=torch.float32))
    out = torch.empty(len(models[0]))
    piece = Piece.flat(0, len(models[0]))
    reference.stream(program, piece, x0, views, view_of(out), compute=F32, stats=None, threads=1, **more)
    return out.tolist()


def test_by_hand() -> None:
    """A few results that a reader can check."""
    two = {"weights": (1.0, 1.0), "keep": (None, None), "base": False}
    a, b = [3.0, -3.0, 0.0, 1.0], [1.0, 2.0, 5.0, -1.0]
    assert run(Program(**two, vote="weighted", divisor="agreeing_count"), a, b) == [2.0, -3.0, 5.0, 1.0]
    assert run(Program(**two, vote="count", zero_vote=-1), a, b) == [4.0, -3.0, 5.0, -1.0]
    assert run(Program(**two, vote="weighted", merge="max"), a, b) == [3.0, -3.0, 5.0, 1.0]
    assert run(Program(**two, merge="largest"), a, b) == [3.0, -3.0, 5.0, -1.0]
    assert run(Program(**two, divisor="kept_count"), a, b) == [2.0, -0.5, 5.0, 0.0]
    assert run(Program(**two, alone=(10.0, 20.0)), a, b) == [4.0, -1.0, 100.0, 0.0]
    assert run(Program(**two, limit=2.0), a, b) == [2.0, -1.0, 2.0, 0.0]
    assert run(Program(**two, useful=Useful((1.0, 1.0), 1)), a, b) == [4.0, -1.0, 5.0, 0.0]
    assert run(Program(**two, useful=Useful((1.0, 1.0), 2)), a, b) == [0.0, 0.0, 0.0, 0.0]
    importance = Program(**two, merge="importance")
    assert run(importance, a, b, [1.0, 1.0, 0.0, 3.0], [1.0, 0.0, 2.0, 1.0]) == [2.0, -3.0, 5.0, 0.5]
    anchored = Program((1.0, 0.5), (None, None), anchor="first")
    assert run(anchored, a, b, base=[1.0, 1.0, 1.0, 1.0]) == [5.0, -6.5, 1.0, 0.0]
    assert run(Program((2.0,), (None,), subtract=False), a, base=[1.0] * 4) == [7.0, -5.0, 1.0, 3.0]


def test_a_delta_of_zero_has_no_share_of_the_clipped_range() -> None:
    """It competes with the sign 0, although the range begins above it."""
    rule = Balance(1.0, 2.0, 0.0, cut=-1.0, top=1.0)
    program = Program((1.0, 1.0), (None, None), base=False, merge="balance", balance=(rule, rule))
    share = (math.tanh(4.0) + 1) / 2
    assert run(program, [0.0], [2.0]) == [pytest.approx(2 * share / (0.5 + share), rel=1e-6)]


def test_rows_by_hand() -> None:
    """Places within rows, interleaved or not, and a row of one element."""
    x = [4.0, -1.0, 3.0, 2.0, -8.0, 6.0, 5.0, 7.0]
    common = {"weights": (1.0,), "base": False}
    first_two = RankBand(0, 2)
    assert run(Program(keep=(first_two,), rows=Rows(4), **common), x) == [4, 0, 3, 0, -8, 0, 0, 7]
    # Slabs of two rows of two elements: (4, 3), (-1, 2), (-8, 5), (6, 7).
    assert run(Program(keep=(RankBand(0, 1),), rows=Rows(2, 2), **common), x) == [4, 0, 0, 2, -8, 0, 0, 7]
    assert run(Program(keep=(RankBand(1, 3),), rows=Rows(4), **common), x) == [0, 0, 3, 2, 0, 6, 0, 7]
    everything = RankDraw(0, 0, 1 << 32, divide=True)
    assert run(Program(keep=(everything,), rows=Rows(1), **common), x) == x
    half = RankDraw(1 << 31, 0, 0, divide=True)
    halved = run(Program(keep=(half,), rows=Rows(4), **common), x)
    assert all(v in (0.0, 2 * w) for v, w in zip(halved, x, strict=True)) and any(halved)
    certain = RankDraw(0, 1 << 32, 0)
    found = run(Program(keep=(certain,), rows=Rows(8), **common), x)
    assert found[4] == -8.0, "the largest is kept surely"
    assert found[1] == 0.0, "the smallest is dropped surely"


def test_equals_in_a_row_are_ordered_by_word_then_index() -> None:
    n = 64
    program = Program((1.0,), (RankBand(0, 10),), base=False, rows=Rows(n), seed=7, tensor=9)
    kept = [i for i, v in enumerate(run(program, [1.0] * n)) if v]
    words = _cpu.philox(7, 9, 2, 0, n)
    assert kept == sorted(sorted(range(n), key=lambda i: (words[i], i))[:10])


def test_draw_by_hand() -> None:
    n = 50
    words = _cpu.philox(7, 9, 16, 0, n)
    program = Program((0.0, 1.0), (None, Draw(1 << 31)), base=False, seed=7, tensor=9)
    assert run(program, [1.0] * n, [1.0] * n) == [float(w < 1 << 31) for w in words]
    assert run(Program((1.0,), (Draw(1 << 32),), base=False), [1.0] * n) == [1.0] * n
    assert run(Program((1.0,), (Draw(0),), base=False), [float("nan")] * n) == [0.0] * n


def test_largest_where_nobody_agrees_is_zero_with_the_sign() -> None:
    program = Program((1.0,), (None,), base=False, vote="weighted", zero_vote=-1, merge="max")
    assert str(run(program, [0.0])) == "[-0.0]"


def test_marks_of_useful_models_need_the_rule() -> None:
    x = view_of(torch.zeros(8))
    with pytest.raises(ArgumentError, match="useful"):
        out = [view_of(torch.zeros(1, dtype=torch.uint8))]
        reference.mark(Program((1.0,), (None,)), "useful", Piece.flat(0, 8), x, [x], out, compute=F32, threads=1)
