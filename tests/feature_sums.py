"""Cases of exact sums, dot products and divergences, with their checks against the reference."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import torch

from feature_programs import (
    KINDS,
    MIXES,
    setting,
)
from feature_shared import (
    DTYPES,
    Cut,
    exact_bits,
    folded_bits,
    parts_of,
    plain_view,
    view_on,
)
from feature_streams import ProgramCase, program_cases
from gpu_matrix import inputs, values
from mergekernels import _cpu
from mergekernels._backends import reference
from mergekernels.ops.keep import Marked, RankDraw
from mergekernels.ops.sums import QUANTITIES, Gram, Reduce, Segments
from mergekernels.tensors import CANONICAL_BLOCK, DType, Piece, compute_dtype

Bits = tuple[torch.Tensor, ...]


@dataclass(frozen=True, eq=False)
class GramCase:
    """Dot products of tensors of two dimensions (of one row for axis "tensor"), in pieces."""

    name: str
    request: Gram
    pieces: tuple[Piece, ...]
    base: torch.Tensor | None
    models: tuple[torch.Tensor, ...]
    compute: DType
    needs: frozenset[str] = frozenset({"gram"})


@cache
def gram_cases() -> tuple[GramCase, ...]:
    """All three axes, segments of one element and of several blocks, boxes of rows and of columns."""
    shapes: list[tuple[Literal["tensor", "rows", "columns"], int, int]] = [
        *(("tensor", 1, n) for n in (0, 1, 255, 4096, 4097, 70000)),
        *(("rows", r, c) for r, c in ((1, 1), (5, 1), (7, 255), (3, 4096), (3, 9001), (40, 100))),
        *(("columns", r, c) for r, c in ((1, 1), (1, 9), (255, 7), (4096, 2), (9001, 3), (100, 40))),
    ]
    found, mixes = [], list(MIXES)
    for i, (axis, rows, cols) in enumerate(shapes):
        for subtract in (True, False):
            n, mix, kind = rows * cols, mixes[(i + subtract) % len(mixes)], KINDS[i % 3 if i % 4 else 0]
            s = setting(random.Random(f"gram {i}"), mix, kind, (1, 2, 3, 6)[i % 4], Piece.flat(0, n), base=subtract)
            count, length = {"tensor": (1, n), "rows": (rows, cols), "columns": (cols, rows)}[axis]
            shape = (rows, cols)
            base = None if s.base is None else s.base.view(shape)
            request = Gram(Segments(axis, count, length), subtract)
            for cut, pieces in _gram_pieces(axis, rows, cols).items():
                name = f"{axis}-{rows}x{cols}-{mix}-{kind}-{'deltas' if subtract else 'values'}-{cut}"
                models = tuple(x.view(shape) for x in s.models)
                found.append(GramCase(name, request, tuple(pieces), base, models, s.compute))
    return tuple(found)


def _gram_pieces(axis: str, rows: int, cols: int) -> dict[str, list[Piece]]:
    whole = {"whole": [Piece(0, rows, cols, cols)]}
    n = rows * cols
    if axis == "tensor":
        whole["cut"] = [Piece.flat(a, min(8192, n - a)) for a in range(0, n, 8192)]
    elif axis == "rows":
        whole["rows"] = [Piece(r * cols, 1, cols, cols) for r in range(rows)]
        whole["flat"] = [Piece.flat(0, n)]
        whole["columns"] = [Piece(c, rows, min(4096, cols - c), cols) for c in range(0, cols, 4096)]
    else:
        whole["rows"] = [Piece(r * cols, min(4096, rows - r), cols, cols) for r in range(0, rows, 4096)]
        whole["columns"] = [Piece(c, rows, 1, cols) for c in range(cols)]
    return {name: p for name, p in whole.items() if name == "whole" or len(p) > 1 or name == "flat"}


def _box(x: torch.Tensor, piece: Piece) -> torch.Tensor:
    """The elements of a piece of a matrix."""
    cols = x.shape[1]
    if piece.rows == 1 and (piece.cols > cols or x.shape[0] == 1):
        return x.reshape(-1)[piece.g0 : piece.g0 + piece.cols]
    row, col = divmod(piece.g0, cols) if cols else (0, 0)
    return x[row : row + piece.rows, col : col + piece.cols]


def _run_gram(backend: Any, case: GramCase, device: str, threads: int) -> list[list[str]]:
    slots = len(case.models) * (len(case.models) + 1) // 2
    segments = case.request.segments
    sums = _cpu.BlockSums(slots, segments.count, segments.length)
    for piece in case.pieces:
        views = [plain_view(_box(x, piece), device) for x in case.models]
        base = None if case.base is None else plain_view(_box(case.base, piece), device)
        backend.gram(case.request, sums, piece, base, views, compute=case.compute, threads=threads)
    return folded_bits(sums, slots)


@cache
def gram_sums(case: GramCase) -> list[list[str]]:
    """What the reference gives: per slot and segment the bits of the sum."""
    return _run_gram(reference, case, "cpu", 1)


def check_gram(backend: Any, case: GramCase, device: str = "cpu", *, threads: int = 1) -> None:
    """Every dot product of every segment is that of the reference."""
    assert _run_gram(backend, case, device, threads) == gram_sums(case)


@dataclass(frozen=True, eq=False)
class ReduceCase:
    """Sums of what a program computes on its way, over a whole flat tensor."""

    name: str
    program: ProgramCase
    request: Reduce

    @property
    def needs(self) -> frozenset[str]:
        return self.program.needs | {"reduce"}


@cache
def reduce_cases(count: int = 60, largest: int = 70000) -> tuple[ReduceCase, ...]:
    """The programs without marks of whole tensors, with a few quantities each; every quantity often."""
    cases = [
        c
        for c in program_cases(150, largest)
        if c.piece.rows == 1 and c.piece.g0 == 0 and not any(isinstance(k, Marked) for k in c.program.keep)
    ]
    found = []
    for i, case in enumerate(cases[:: max(1, len(cases) // count)]):
        rng = random.Random(f"reduce {i}")
        names = [q for q in QUANTITIES if case.program.merge == "importance" or q[:3] not in ("imp", "neg")]
        picked = tuple(rng.sample(names, rng.choice((1, 2, len(names)))))
        found.append(ReduceCase(f"{case.name}-{len(picked)}", case, Reduce(picked)))
    return tuple(found)


def _run_reduce(backend: Any, case: ReduceCase, device: str, threads: int, cut: Cut) -> tuple[list[list[str]], Bits]:
    """The sums, and per model the packed bits of what it keeps (() from a backend that does not write them)."""
    inner = case.program
    marking = "reduce:kept" in backend.FEATURES and not inner.program.copy
    bits = tuple(torch.zeros(-(-inner.piece.numel // 8), dtype=torch.uint8) for _ in range(marking * len(inner.models)))
    bits = bits[: len(inner.program.weights)]
    slots = case.request.num_slots(len(inner.program.weights))
    casts = inner.casts or (None,) * (len(inner.models) + 1)
    sums = _cpu.BlockSums(slots, 1, inner.piece.numel)
    for part in parts_of(inner.piece, inner.program.slab, cut, CANONICAL_BLOCK):
        span = slice(part.g0, part.g0 + part.numel)
        views = [view_on(x[span], device, inner.strided, c) for x, c in zip(inner.models, casts[1:], strict=False)]
        base = None if inner.base is None else view_on(inner.base[span], device, inner.strided, casts[0])
        at = slice(part.g0 // 8, -(-(part.g0 + part.numel) // 8))
        kept = {"kept": [plain_view(b[at], device) for b in bits]} if marking else {}
        backend.reduce(
            inner.program, case.request, sums, part, base, views, compute=inner.compute, threads=threads, **kept
        )
    return folded_bits(sums, slots), bits


def kept_cases() -> tuple[ReduceCase, ...]:
    """The cases whose program only selects: marks say all that its rules do."""
    programs = [(c, c.program.program) for c in reduce_cases()]
    return tuple(c for c, p in programs if not p.copy and not any(isinstance(k, RankDraw) and k.divide for k in p.keep))


@cache
def _expected_reduce(case: ReduceCase) -> tuple[list[list[str]], Bits]:
    return _run_reduce(reference, case, "cpu", 1, "whole")


def check_reduce(
    backend: Any, case: ReduceCase, device: str = "cpu", *, threads: int = 1, pieces: Cut = "whole"
) -> None:
    """Every sum is that of the reference, and so is every bit of what is kept."""
    sums, bits = _run_reduce(backend, case, device, threads, pieces)
    expected, expected_bits = _expected_reduce(case)
    assert sums == expected
    assert all(map(torch.equal, bits, expected_bits))


def check_kept(backend: Any, case: ReduceCase) -> None:
    """A program that keeps by the bits of `reduce` writes what the program itself writes."""
    inner = case.program
    _, bits = _run_reduce(backend, case, "cpu", 1, "whole")
    program = replace(inner.program, keep=(Marked(),) * len(bits), rows=None)
    casts = inner.casts or (None,) * (len(inner.models) + 1)
    views = [view_on(x, "cpu", inner.strided, c) for x, c in zip(inner.models, casts[1:], strict=False)]
    base = None if inner.base is None else view_on(inner.base, "cpu", inner.strided, casts[0])
    found = []
    for chosen, marks in ((inner.program, ()), (program, [plain_view(b, "cpu") for b in bits])):
        out = torch.zeros(inner.piece.numel, dtype=inner.models[0].dtype)
        stats = _cpu.StreamStats(len(inner.models), -(-inner.piece.numel // CANONICAL_BLOCK))
        backend.stream(
            chosen,
            inner.piece,
            base,
            views,
            plain_view(out, "cpu"),
            compute=inner.compute,
            stats=stats,
            threads=1,
            marks=marks,
        )
        counts = [(stats.kept(m), stats.sum_squares(m).hex()) for m in range(len(inner.models))]
        found.append((out.view(torch.uint8).tolist(), counts, stats.conflicts(), stats.votes()))
    assert found[0] == found[1]


@dataclass(frozen=True, eq=False)
class DivergenceCase:
    """Rows of a base and of a model."""

    name: str
    row_length: int
    piece: Piece
    base: torch.Tensor
    model: torch.Tensor
    needs: frozenset[str] = frozenset({"divergence"})


@cache
def divergence_cases() -> tuple[DivergenceCase, ...]:
    """Rows of one element and of several blocks; values that overflow, that are not finite, that are all equal."""
    found = []
    for i, (rows, length) in enumerate(((0, 5), (9, 1), (5, 7), (3, 300), (2, 4096), (2, 5000), (1, 70000), (40, 64))):
        for j, dtype in enumerate(DTYPES):
            kind = KINDS[(i + j) % 3]
            x0, (x,) = inputs(rows * length, dtype, 1, kind, seed=10 * i + j)
            assert x0 is not None
            if kind == "weights" and j % 2:
                x0, x = x0 * 300, values(rows * length, dtype, 10 * i + j + 1, kind) * 300
            start = length * (0, 1 << 33)[(i + j) % 2]
            name = f"{rows}x{length}-{dtype.name}-{kind}"
            found.append(DivergenceCase(name, length, Piece.flat(start, rows * length), x0, x))
    return tuple(found)


def _run_divergence(backend: Any, case: DivergenceCase, device: str, threads: int) -> list[str]:
    base, model = plain_view(case.base, device), plain_view(case.model, device)
    compute = compute_dtype([base.dtype, model.dtype])
    found = backend.divergence(case.row_length, case.piece, base, model, compute=compute, threads=threads)
    return [exact_bits(x) for x in found]


@cache
def _expected_divergence(case: DivergenceCase) -> list[str]:
    return _run_divergence(reference, case, "cpu", 1)


def check_divergence(backend: Any, case: DivergenceCase, device: str = "cpu", *, threads: int = 1) -> None:
    """Every number is that of the reference."""
    assert _run_divergence(backend, case, device, threads) == _expected_divergence(case)
