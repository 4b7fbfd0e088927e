"""The reference's keys, selections, dot products and divergence against scalars."""

from __future__ import annotations

import random
import struct
from array import array
from typing import Any

import numpy as np
import pytest
import torch

from brute import philox
from brute_program import Brute, exact_sum, key
from feature_cases import (
    GramCase,
    SweepCase,
    by_name,
    check_divergence,
    divergence_cases,
    gram_cases,
    gram_sums,
    sweep_cases,
)
from feature_programs import balances, row_table, setting
from mergekernels import _cpu
from mergekernels._backends import reference
from mergekernels._backends.reference.common import load
from mergekernels._native import view_of
from mergekernels.ops.keep import Keep
from mergekernels.ops.program import Program
from mergekernels.ops.selection import Scope, Selection
from mergekernels.ops.sums import pair_slot
from mergekernels.tensors import CANONICAL_BLOCK, F32, F64, DType, Piece


def bits_of(x: float) -> bytes:
    return b"nan" if x != x else struct.pack("<d", x)


def scalars(x: torch.Tensor, compute: DType) -> list[Any]:
    f = np.float32 if compute is F32 else np.float64
    return [f(v) for v in load(view_of(x), compute).reshape(-1).tolist()]


def brute_keys(case: SweepCase, model: int) -> list[int]:
    """The key of a model for every element."""
    f = np.float32 if case.compute is F32 else np.float64
    x0 = None if case.base is None else scalars(case.base, case.compute)
    request, piece = case.request, case.piece
    g = [piece.g0 + r * piece.ld + c for r in range(piece.rows) for c in range(piece.cols)]
    none = tuple(None for _ in case.models)
    program = Program((1.0,) * len(none), none)
    scalar = Brute(program, f, x0, [scalars(x, case.compute) for x in case.models], [], g, none)
    found = []
    with np.errstate(all="ignore"):
        for i, deltas in enumerate(scalar.deltas):
            number = deltas[model]
            if request.key == "variance":
                number = scalar.variance(deltas)
            elif request.key == "balance":
                number = scalar.balance(request.balance[model], number, scalar.total(deltas))[1]
            elif request.key == "drawn":
                number = number if philox(request.seed, case.tensor, 16 * model, g[i]) < request.draws[model] else f(0)
            elif request.rows is not None:
                number = abs(number) * f(request.rows.values[g[i] // request.rows.length])
            found.append(key(number))
    return found


def small_sweep(i: int, name: str, n: int) -> SweepCase:
    """A setting for a selection."""
    rng = random.Random(f"{name} {i}")
    mix, kind = ("fp32", "bf16", "fp64")[i % 3], ("ties", "weights", "nasty")[i // 3 % 3]
    s = setting(rng, mix, kind, 3, Piece.flat(0, n))
    rows, rules = row_table(s) if name == "importance" else None, balances(s) if name == "balance" else ()
    ranks = ((1, 1), (1, n // 3)) if name != "variance" else ((0, n // 4),)
    policy = ("hash", "index", "all")[i % 3]
    scope = Scope((0,), (5,), n, s.compute.name)  # type: ignore[arg-type]
    selection = Selection.of(ranks, scope, policy=policy, seed=11, base=True, key=name, rows=rows, balance=rules)  # type: ignore[arg-type]
    return SweepCase(name, selection.sweep, s.piece, s.base, tuple(s.models), 5, 0, 60, selection=selection)


@pytest.mark.parametrize("name", ["delta", "variance", "importance", "balance"])
def test_selections_find_the_point_of_a_sorted_list(name: str) -> None:
    """Counting passes with little room end where sorting scalars ends, for every key."""
    for i in range(9):
        n = 150
        case = small_sweep(i, name, n)
        selection = case.selection
        assert selection is not None
        wanted = [s for s in selection.searches if s is not None]
        views = [view_of(x) for x in case.models]
        passes = 0
        while not selection.done:
            request = selection.sweep
            stage = {"key": 1, "tie": 2}
            rows = [
                (0, 1, 1, 0, 0) if v is None else (stage[v.stage], v.lo, v.hi, v.tau, v.model)
                for v in request.intervals
            ]
            lists = [list(c) for c in zip(*rows, strict=True)]
            stats = _cpu.SweepStats(*lists[:4], int(request.order == "index"), case.capacity, lists[4])
            assert case.base is not None
            reference.sweep(
                request,
                stats,
                case.piece,
                view_of(case.base),
                views,
                compute=case.compute,
                tensor=5,
                offset=0,
                threads=1,
            )
            selection = selection.advance(stats, n)
            passes += 1
            assert passes < 12
        for search, point in zip(wanted, selection.points, strict=True):
            assert point is not None
            keys = brute_keys(case, search.model)
            words = [philox(11, 5, 16 * search.model + 2, g) if selection.policy == "hash" else 0 for g in range(n)]
            order = sorted(range(n), key=lambda g: (-keys[g], words[g], g))
            chosen = set(order[: search.k])
            if selection.policy == "all":
                chosen = {g for g in range(n) if keys[g] >= keys[order[search.k - 1]]}
            kept = {g for g in range(n) if passes_point(point, keys[g], words[g], g)}
            assert {g for g in kept if keys[g]} == {g for g in chosen if keys[g]}


def passes_point(point: Keep, k: int, word: int, g: int) -> bool:
    tied = {"all": True, "none": False, "hash": (word, g) <= (point.word, point.index), "index": g <= point.index}
    return k > point.tau or (k == point.tau and tied[point.ties])


@pytest.mark.parametrize("case", [c for c in sweep_cases() if c.piece.numel < 1100 and not c.casts], ids=by_name)
def test_sweeps_count_as_scalars_do(case: SweepCase) -> None:
    request, piece = case.request, case.piece
    record = Recorded()
    shape = (piece.rows, piece.cols)
    views = [view_of(x.view(shape)) for x in case.models]
    base = None if case.base is None else view_of(case.base.view(shape))
    reference.sweep(
        request, record, piece, base, views, compute=case.compute, tensor=case.tensor, offset=case.offset, threads=1
    )  # type: ignore[arg-type]
    g = [piece.g0 + r * piece.ld + c for r in range(piece.rows) for c in range(piece.cols)]
    finite = [[np.isfinite(v) for v in scalars(x, case.compute)] for x in case.models]
    expected_bad = {}
    for s, interval in enumerate(request.intervals):
        if interval is None:
            assert s not in record.found
            continue
        keys = brute_keys(case, interval.model)
        found = {i: keys[i] for i in range(len(g))}
        ahead = lambda o, hi=interval.hi: o > hi  # noqa: E731
        if interval.stage == "tie":
            ahead = lambda o, lo=interval.lo: o < lo  # noqa: E731
            found = {
                i: g[i] + case.offset
                if request.order == "index"
                else philox(request.seed, case.tensor, 16 * interval.model + 2, g[i])
                for i, k in found.items()
                if k == interval.tau
            }
        inside = sorted((o, g[i] + case.offset) for i, o in found.items() if interval.lo <= o <= interval.hi)
        assert record.found[s] == (sum(ahead(o) for o in found.values()), inside)
        looked = finite if request.joint else [finite[interval.model]]
        bad = [g[i] + case.offset for i in range(len(g)) if not all(f[i] for f in looked)]
        if bad:
            expected_bad[s] = (min(bad), len(bad))
    if case.base is not None:
        bad = [v + case.offset for v, x in zip(g, scalars(case.base, case.compute), strict=True) if not np.isfinite(x)]
        if bad:
            expected_bad[len(request.intervals)] = (min(bad), len(bad))
    assert record.bad == expected_bad


class Recorded:
    """What a sweep adds to its statistics."""

    def __init__(self) -> None:
        self.found: dict[int, tuple[int, list[tuple[int, int]]]] = {}
        self.bad: dict[int, tuple[int, int]] = {}

    def add(self, search: int, before: int, ordinals: Any, indices: Any) -> None:
        self.found[search] = (before, sorted(zip(ordinals, indices, strict=True)))

    def add_nonfinite(self, source: int, first: int, count: int) -> None:
        self.bad[source] = (first, count)


def some_grams() -> list[GramCase]:
    return [c for c in gram_cases() if sum(x.numel() for x in c.models) < 60000]


@pytest.mark.parametrize("case", some_grams(), ids=by_name)
def test_gram_sums_as_scalars_do(case: GramCase) -> None:
    count = len(case.models)
    segments = case.request.segments
    sums = _cpu.BlockSums(count * (count + 1) // 2, segments.count, segments.length)
    views = [view_of(x) for x in case.models]
    whole = Piece(0, *case.models[0].shape, case.models[0].shape[1])
    base = None if case.base is None else view_of(case.base)
    reference.gram(case.request, sums, whole, base, views, compute=case.compute, threads=1)
    with np.errstate(all="ignore"):
        vectors = [scalars(x, case.compute) for x in case.models]
        if case.base is not None and case.request.subtract:
            x0 = scalars(case.base, case.compute)
            vectors = [[a - b for a, b in zip(v, x0, strict=True)] for v in vectors]
        wide = [[float(v) for v in vector] for vector in vectors]
    for i in range(count):
        for j in range(i, count):
            found = array("d", sums.fold(pair_slot(j, i, count)))
            products = [a * b for a, b in zip(wide[i], wide[j], strict=True)]
            for s in range(segments.count):
                if segments.axis == "columns":
                    part = products[s :: segments.count]
                else:
                    part = products[s * segments.length : (s + 1) * segments.length]
                assert bits_of(found[s]) == bits_of(exact_sum(part)), (i, j, s)


def test_gram_does_not_depend_on_pieces() -> None:
    """All pieces of the same tensors fold to the same numbers."""
    found: dict[str, set[str]] = {}
    for case in gram_cases():
        found.setdefault(case.name.rpartition("-")[0], set()).add(str(gram_sums(case)))
    assert len(found) > 30 and all(len(results) == 1 for results in found.values())


def test_divergence_of_scalars() -> None:
    """Rows of up to 300 elements in scalars; and the rows by themselves."""
    for case in divergence_cases():
        check_divergence(reference, case)
        if case.row_length > 300:
            continue
        compute = F64 if F64 in (view_of(case.base).dtype, view_of(case.model).dtype) else F32
        f = np.float32 if compute is F32 else np.float64
        found = reference.divergence(
            case.row_length, case.piece, view_of(case.base), view_of(case.model), compute=compute, threads=1
        )
        x, b = scalars(case.model, compute), scalars(case.base, compute)
        with np.errstate(all="ignore"):
            for r in range(len(found)):
                row = slice(r * case.row_length, (r + 1) * case.row_length)
                p, q = softmax(x[row], f), softmax(b[row], f)
                terms = [u * f(_cpu.transcendental("log", float(u / v))) for u, v in zip(p, q, strict=True)]
                total = exact_sum([float(t) for t in terms])
                assert bits_of(found[r]) == bits_of(0.0 if total < 0 else total)


def softmax(x: list[Any], f: Any) -> list[Any]:
    top = max(x) if all(v == v for v in x) else f("nan")
    e = [f(_cpu.transcendental("exp", float(v - top))) for v in x]
    z = f(exact_sum([float(v) for v in e]))
    return [v / z + f(1e-8) for v in e]


def test_divergence_is_that_of_the_distributions() -> None:
    """Close to the textbook formula, and 0 for equal rows."""
    x, b = torch.tensor([[0.1, 0.7, -0.3]], dtype=torch.float64), torch.tensor([[0.2, 0.1, 0.0]], dtype=torch.float64)
    found = reference.divergence(3, Piece.flat(0, 3), view_of(b), view_of(x), compute=F64, threads=1)[0]
    p, q = x.softmax(1), b.softmax(1)
    assert found == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-6)
    assert reference.divergence(3, Piece.flat(0, 3), view_of(b), view_of(b), compute=F64, threads=1)[0] == 0.0


def test_blocks_are_summed_in_their_order() -> None:
    """Sums whose rounding depends on the order, over more than two blocks."""
    rng = random.Random(1)
    n = 2 * CANONICAL_BLOCK + 777
    values = [rng.gauss(0, 1) for _ in range(n)]
    x = torch.tensor(values, dtype=torch.float64)
    stats = _cpu.StreamStats(1, 3)
    program = Program((1.0,), (None,), base=False)
    reference.stream(program, Piece.flat(0, n), None, [view_of(x)], None, compute=F64, stats=stats, threads=1)
    expected = exact_sum([v * v for v in values])
    assert stats.sum_squares(0) == expected
    assert expected != sum(v * v for v in values), "the order would not matter"
