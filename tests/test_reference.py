"""The reference against scalars: every feature of a program, keys, sums, marks and selections on small tensors."""

from __future__ import annotations

import random
from array import array
from typing import Any

import numpy as np
import pytest
import torch

from brute_program import Brute, Element, exact_sum, key
from feature_cases import (
    ProgramCase,
    by_name,
    check_mark,
    check_program,
    check_reduce,
    check_sweep,
    mark_cases,
    program_cases,
    reduce_cases,
    sweep_cases,
)
from feature_programs import ALONE, KINDS, MIXES, feature_program, importances, packed_marks, random_program, setting
from gpu_matrix import bits
from mergekernels import _cpu
from mergekernels._backends import reference
from mergekernels._backends.reference.common import load
from mergekernels._native import torch_dtype, view_of
from mergekernels.ops.keep import Marked
from mergekernels.ops.sums import QUANTITIES, Reduce
from mergekernels.tensors import F32, Piece

SIZES = (0, 1, 7, 32, 50, 64)
BOXES = (Piece(3, 3, 10, 10), Piece(2**32 + 5, 3, 10, 12345), Piece(2**33 + 4096, 1, 31, 31))


def alone(name: str, i: int) -> ProgramCase:
    """A small case of one feature."""
    rng = random.Random(f"small {name} {i}")
    flat = name in ("rank", "rank_divide", "place", "marked")
    piece = BOXES[i % 3] if i % 4 == 3 and not flat else Piece.flat(0, SIZES[(i + len(name)) % 6])
    return small(rng, name, i, piece, 1 if name == "importance_key" else 1 + (i + len(name)) % 3)


def small(rng: random.Random, name: str, i: int, piece: Piece, num_models: int) -> ProgramCase:
    """A case of one feature, or of any ("any", "rows", "marks")."""
    mix, kind = list(MIXES)[i % 6], KINDS[(i // 2) % 3]
    base = name in ("subtract", "anchor") or (name != "importance" and i % 4 != 1)
    s = setting(rng, mix, kind, num_models, piece, base=base)
    if name in ALONE:
        program = feature_program(name, s)
    else:
        program = random_program(s, rows=name == "rows", marks=name == "marks")
    fisher = importances(s, kind) if program.merge == "importance" else []
    marks = tuple(packed_marks(s) if isinstance(k, Marked) else None for k in program.keep)
    # Results in the compute dtype show every bit; rounding to 16 bits has its own tests.
    return ProgramCase(f"{name}-{i}", program, piece, s.base, (*s.models, *fisher), marks, s.compute)


def brute(case: ProgramCase) -> Brute:
    """The case for the scalar implementation."""
    f = np.float32 if case.compute is F32 else np.float64

    def scalars(x: torch.Tensor) -> list[Any]:
        return [f(v) for v in load(view_of(x), case.compute).tolist()]

    piece, t = case.piece, len(case.program.weights)
    g = [piece.g0 + r * piece.ld + c for r in range(piece.rows) for c in range(piece.cols)]
    unpacked = [None if m is None else [int(m[i // 8]) >> i % 8 & 1 for i in range(piece.numel)] for m in case.marks]
    models = [scalars(x) for x in case.models]
    return Brute(
        case.program, f, None if case.base is None else scalars(case.base), models[:t], models[t:], g, unpacked
    )


def check_against_brute(case: ProgramCase) -> None:
    """Output, statistics, sums and marks."""
    t, n = len(case.program.weights), case.piece.numel
    scalar = brute(case)
    elements = scalar.elements()
    piece = case.piece
    views = [view_of(x) for x in case.models]
    base = None if case.base is None else view_of(case.base)
    out = torch.empty(n, dtype=torch_dtype(case.out))
    flat = piece.rows == 1 and piece.g0 == 0
    stats = _cpu.StreamStats(len(views), 1 if flat else 0)
    marks = [None if m is None else view_of(m) for m in case.marks]
    call = {"compute": case.compute, "threads": 1}
    reference.stream(case.program, piece, base, views, view_of(out), stats=stats, marks=marks, **call)
    expected = torch.tensor([float(e.out) for e in elements], dtype=torch.float64).to(out.dtype)
    expected[expected.isnan()] = float("nan")
    assert torch.equal(bits(out), bits(expected)), (out, expected)

    kept = [sum(bool(e.kept[m] != 0) for e in elements) for m in range(t)]
    assert [stats.kept(m) for m in range(len(views))] == kept + [0] * (len(views) - t)
    assert stats.conflicts() == sum(any(v > 0 for v in e.weighted) and any(v < 0 for v in e.weighted) for e in elements)
    assert stats.votes() == (sum(bool(e.vote > 0) for e in elements), sum(bool(e.vote < 0) for e in elements))
    columns = [*scalar.xs, *scalar.fs, scalar.x0 or [], [float(v) for v in out.tolist()]]
    for source, column in enumerate(columns):
        below = t <= source < len(views)
        bad = [g for g, v in zip(scalar.g, column, strict=False) if not np.isfinite(v) or (below and v < 0)]
        assert stats.nonfinite(source) == (min(bad, default=-1), len(bad))
    if flat:
        for m in range(t):
            same_number(stats.sum_squares(m), exact_sum([square(e.deltas[m]) for e in elements]))
        if not any(marks):
            check_sums(case, scalar, elements)
    if not any(marks) and piece.rows == 1:
        check_marks(case, elements)


def same_number(got: float, expected: float) -> None:
    assert got == expected or (got != got and expected != expected)


def square(x: Any) -> float:
    """x * x in float64."""
    return float(x) * float(x)


def check_sums(case: ProgramCase, scalar: Brute, elements: list[Element]) -> None:
    """Every quantity of `Reduce`."""
    t = len(case.program.weights)
    names = tuple(q for q in QUANTITIES if scalar.fs or q not in ("importance_squares", "negative_count"))
    request = Reduce(names)
    sums = _cpu.BlockSums(request.num_slots(t), 1, case.piece.numel)
    views = [view_of(x) for x in case.models]
    base = None if case.base is None else view_of(case.base)
    reference.reduce(case.program, request, sums, case.piece, base, views, compute=case.compute, threads=1)
    per_model: dict[str, Any] = {
        "abs": lambda e, m: abs(float(e.deltas[m])),
        "squares": lambda e, m: square(e.deltas[m]),
        "kept_abs": lambda e, m: abs(float(e.trimmed[m])),
        "kept_squares": lambda e, m: square(e.trimmed[m]),
        "agreeing_abs": lambda e, m: abs(float(e.q)) if e.agree[m] else 0.0,
        "kept_count": lambda e, m: float(e.kept[m] != 0),
        "alone_count": lambda e, m: float(e.kept[m] != 0 and sum(bool(v != 0) for v in e.kept) == 1),
    }
    expected: list[list[float]] = []
    with np.errstate(all="ignore"):
        for name in names:
            if name == "total_abs":
                expected.append([abs(float(scalar.total(e.deltas))) for e in elements])
            elif name == "merged_abs":
                expected.append([abs(float(e.y)) for e in elements])
            elif name in per_model:
                expected += [[per_model[name](e, m) for e in elements] for m in range(t)]
            elif name == "importance_squares":
                expected += [[square(v) for v in f] for f in scalar.fs]
            else:
                expected += [[float(v < 0) for v in f] for f in scalar.fs]
    for slot, values in enumerate(expected):
        same_number(array("d", sums.fold(slot))[0], exact_sum(values))


def check_marks(case: ProgramCase, elements: list[Element]) -> None:
    """The bits of each kind."""
    views = [view_of(x) for x in case.models]
    base = None if case.base is None else view_of(case.base)
    for kind in ("kept", "agreeing", "useful"):
        if kind == "useful" and case.program.useful is None:
            continue
        packed = [torch.full((-(-len(elements) // 8),), 0xFF, dtype=torch.uint8) for _ in case.program.weights]
        out = [view_of(x) for x in packed]
        reference.mark(case.program, kind, case.piece, base, views, out, compute=case.compute, threads=1)
        for m, found in enumerate(packed):
            chosen = [{"kept": e.masks, "agreeing": e.agree, "useful": e.useful}[kind][m] for e in elements]
            chosen += [False] * (-len(chosen) % 8)
            assert [int(b) >> i & 1 for b in found for i in range(8)] == [int(c) for c in chosen]


@pytest.mark.parametrize("name", ALONE)
def test_feature(name: str) -> None:
    for i in range(12):
        check_against_brute(alone(name, i))


@pytest.mark.parametrize("kind", ["any", "rows", "marks"])
def test_combinations(kind: str) -> None:
    for i in range(60):
        rng = random.Random(f"{kind} {i}")
        piece = rng.choice(BOXES) if kind == "any" and i % 5 == 0 else Piece.flat(0, rng.choice(SIZES))
        if kind == "marks" and i % 3 == 0:
            piece = Piece.flat(2**36 + 8, 21)
        check_against_brute(small(rng, kind, i, piece, rng.choice((1, 2, 3, 4))))


@pytest.mark.parametrize("kind", ["program", "mark", "sweep", "reduce"])
def test_cuts_change_nothing(kind: str) -> None:
    """What the reference yields does not depend on where a tensor is cut."""
    cases, check = {
        "program": (program_cases, check_program),
        "mark": (mark_cases, check_mark),
        "sweep": (sweep_cases, check_sweep),
        "reduce": (reduce_cases, check_reduce),
    }[kind]
    for case in cases()[:: 1 if kind == "sweep" else 3]:
        assert case.needs <= reference.FEATURES, by_name(case)
        check(reference, case, pieces="cut")


def test_the_cases_have_every_feature() -> None:
    found = frozenset().union(*(case.needs for group in (program_cases(), sweep_cases()) for case in group))
    assert found | {"gram", "reduce", "reduce:kept", "divergence", "mark", "seg_dot", "concrete"} == reference.FEATURES


def test_keys_of_scalars() -> None:
    assert key(np.float32("nan")) == 0x7F800001 and key(np.float32(-1.0)) == 0x3F800000
    assert key(np.float64("inf")) + 1 == key(np.float64("nan"))
