"""One seeded set of cases for every backend, and the comparison of a backend with the reference, bit for bit.

A test module of a backend takes the cases and calls the check of their kind::

    @pytest.mark.parametrize("case", program_cases(), ids=by_name)
    def test_programs(case): check_program(backend, case)

`device` is where the backend computes, `pieces` "whole" or "cut" (several calls on parts of the tensor).
"""

from __future__ import annotations

import random
import struct
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from math import lcm
from typing import Any, Literal

import torch

from feature_programs import (
    ALONE,
    KINDS,
    MIXES,
    Setting,
    balances,
    feature_program,
    importances,
    packed_marks,
    random_program,
    row_table,
    setting,
)
from gpu_matrix import bits, inputs, values
from mergekernels import _cpu
from mergekernels._backends import reference
from mergekernels._backends.reference.common import flat_index, keys
from mergekernels._backends.reference.rules import balance, importance, variance
from mergekernels._native import torch_dtype, view_of
from mergekernels.ops.keep import MAX_KEY, Marked
from mergekernels.ops.program import Balance, Program, Table
from mergekernels.ops.selection import Selection
from mergekernels.ops.sums import QUANTITIES, Gram, Reduce, Segments
from mergekernels.ops.sweeps import Interval, Sweep
from mergekernels.tensors import BF16, CANONICAL_BLOCK, F16, F32, F64, DType, Piece, TensorView, compute_dtype

# The tensors are small: two threads of torch that wait for each other cost more than they save.
torch.set_num_threads(1)

Cut = Literal["whole", "cut"]
DTYPES = (BF16, F16, F32, F64)


def by_name(case: Any) -> str:
    """The id of a case."""
    return str(case.name)


# A frozen dataclass without equality: a case stands for itself, and results of the reference are kept by case.
@dataclass(frozen=True, eq=False)
class ProgramCase:
    """A program and a piece. base, models, fisher, marks : tensors of the piece's elements (of its packed bits).

    casts : load casts of base and models. strided : the tensors are columns of wider ones.
    """

    name: str
    program: Program
    piece: Piece
    base: torch.Tensor | None
    models: tuple[torch.Tensor, ...]
    marks: tuple[torch.Tensor | None, ...]
    out: DType
    casts: tuple[DType | None, ...] = ()
    strided: bool = False

    @property
    def compute(self) -> DType:
        return compute_dtype([view_of(x).dtype for x in [*self.models, *([] if self.base is None else [self.base])]])

    @property
    def needs(self) -> frozenset[str]:
        """What a backend must have for `stream`."""
        return self.program.features


FAR = (Piece(3, 7, 100, 100), Piece(2**32 + 5, 7, 100, 12345), Piece(2**33 + 4096, 1, 700, 700))


def _case(name: str, s: Setting, program: Program, kind: str, out: DType, **more: Any) -> ProgramCase:
    models = [*s.models, *(importances(s, kind) if program.merge == "importance" else [])]
    marks = tuple(packed_marks(s) if isinstance(k, Marked) else None for k in program.keep)
    return ProgramCase(name, program, s.piece, s.base, tuple(models), marks, out, **more)


@cache
def program_cases(num_random: int = 150, largest: int = 70000) -> tuple[ProgramCase, ...]:
    """Every feature alone over dtypes, sizes and boxes, then random combinations; sizes up to `largest`."""
    return (*_alone_cases(largest), *_random_cases(num_random, largest))


def _sizes(largest: int) -> list[int]:
    return [n for n in (5000, 255, 4096, 7, 1, 9000, 0, 70000) if n <= largest]


def _alone_cases(largest: int) -> Iterator[ProgramCase]:
    sizes, mixes = _sizes(largest), list(MIXES)
    for f, name in enumerate(ALONE):
        boxes = name not in ("rank", "rank_divide", "place", "marked")
        for i in range(9):
            rng = random.Random(f"{name} {i}")
            mix, kind = mixes[(f + i) % len(mixes)], KINDS[(f // 2 + i) % 3]
            piece = FAR[i - 6] if i >= 6 and boxes else Piece.flat(0, sizes[(f + i) % len(sizes)])
            if name == "marked" and i >= 6:
                piece = Piece.flat(2**33 + 8 * i, 777)
            num_models = 1 if name == "importance_key" else (1, 2, 3, 5)[(f + i) % 4]
            if name == "factors" and i == 0:
                piece, num_models = Piece.flat(0, 300), 64
            base = name in ("subtract", "anchor") or (name != "importance" and (f + i) % 5 != 0)
            s = setting(rng, mix, kind, num_models, piece, base=base)
            out = DTYPES[(f + i // 2) % 4]
            title = f"{name}-{mix}-{kind}-{piece.numel}-{i}"
            yield _case(title, s, feature_program(name, s), kind, out, strided=i == 5)


def _random_cases(count: int, largest: int) -> Iterator[ProgramCase]:
    for i in range(count):
        rng = random.Random(f"any {i}")
        rows, marks = i % 3 == 0, i % 4 == 1
        piece = Piece.flat(0, rng.choice(_sizes(largest)[:-1] if i % 20 else _sizes(largest)))
        if not rows and rng.random() < 0.2:
            piece = Piece.flat(8 * rng.randrange(1 << 40), 1001) if marks else rng.choice(FAR)
        mix, kind = rng.choice(list(MIXES)), rng.choice(KINDS)
        s = setting(rng, mix, kind, rng.choice((1, 2, 2, 3, 4, 8)), piece, base=rng.random() < 0.75)
        program = random_program(s, rows=rows, marks=marks)
        casts: tuple[DType | None, ...] = ()
        if rng.random() < 0.15:
            casts = (rng.choice((BF16, F16, F32)),) * (len(s.models) * 2 + 1)
        out, strided = rng.choice(DTYPES), rng.random() < 0.1
        yield _case(f"any-{mix}-{kind}-{piece.numel}-{i}", s, program, kind, out, casts=casts, strided=strided)


def _view(x: torch.Tensor, device: str, strided: bool, cast: DType | None = None) -> TensorView:
    moved = x.to(device)
    if strided:
        wide = torch.full((*x.shape, 3), 9.0, dtype=x.dtype, device=device)
        wide[..., 1] = moved
        moved = wide[..., 1]
    view = view_of(moved)
    return TensorView(view.ptr, view.shape, view.strides, view.dtype, view.owner, cast, view.device)


def _parts(piece: Piece, slab: int, cut: Cut, unit: int) -> list[Piece]:
    """The piece, or parts of it: runs of whole units and slabs, or of rows, uneven ones and an empty one."""
    if cut == "whole" or not piece.numel:
        return [piece]
    if piece.rows > 1:
        steps = [0, 1, 1, piece.rows // 2, piece.rows]
        rows = pairwise(steps)
        return [Piece(piece.g0 + a * piece.ld, b - a, piece.cols, piece.ld) for a, b in rows]
    step = lcm(slab, unit)
    count = -(-piece.cols // step)
    cuts = [min(c * step, piece.cols) for c in sorted({0, count // 3, count // 2, count})]
    return [Piece.flat(piece.g0 + a, b - a) for a, b in pairwise(cuts)]


def _stream_facts(stats: _cpu.StreamStats) -> dict[str, object]:
    models = range(stats.num_models)
    return {
        "kept": [stats.kept(m) for m in models],
        "conflicts": stats.conflicts(),
        "votes": stats.votes(),
        "nonfinite": [stats.nonfinite(s) for s in range(stats.num_models + 2)],
        "squares": [_exact(stats.sum_squares(m)) for m in models],
    }


def _exact(x: float) -> str:
    """The bits of a sum; the sign of a NaN is the machine's affair."""
    return "nan" if x != x else struct.pack("<d", x).hex()


def _bytes_of(case: ProgramCase, part: Piece, t: int) -> torch.Tensor:
    packed = case.marks[t]
    assert packed is not None
    first = (part.g0 >> 3) - (case.piece.g0 >> 3)
    return packed[first : first - (-part.numel // 8)]


def _run_program(
    backend: Any, case: ProgramCase, device: str, threads: int, cut: Cut, output: bool, counted: bool
) -> tuple[torch.Tensor | None, dict[str, object] | None]:
    piece, n = case.piece, case.piece.numel
    casts = case.casts or (None,) * (len(case.models) + 1)
    shape = (piece.rows, piece.cols) if piece.rows > 1 else (n,)
    guard = torch.full((n + 64,), 7.0, dtype=torch_dtype(case.out), device=device)
    whole = guard[32 : 32 + n].view(shape)
    whole.fill_(float("nan"))
    flat = piece.rows == 1 and piece.g0 == 0
    stats = _cpu.StreamStats(len(case.models), -(-n // CANONICAL_BLOCK) if flat else 0) if counted else None
    for part in _parts(piece, case.program.slab, cut, CANONICAL_BLOCK if flat else 8):
        first = part.g0 - piece.g0
        rows = slice(first // piece.ld, first // piece.ld + part.rows) if piece.rows > 1 else slice(0)

        def of(x: torch.Tensor, first: int = first, rows: slice = rows, part: Piece = part) -> torch.Tensor:
            return x.view(shape)[rows] if piece.rows > 1 else x[first : first + part.numel]

        views = [_view(of(x), device, case.strided, c) for x, c in zip(case.models, casts[1:], strict=False)]
        base = None if case.base is None else _view(of(case.base), device, case.strided, casts[0])
        marks = [
            _view(_bytes_of(case, part, t), device, False) if isinstance(k, Marked) else None
            for t, k in enumerate(case.program.keep)
        ]
        more = {"marks": marks} if any(marks) else {}
        target = view_of(of(whole)) if output else None
        backend.stream(
            case.program, part, base, views, target, compute=case.compute, stats=stats, threads=threads, **more
        )
    assert (guard[:32] == 7).all() and (guard[32 + n :] == 7).all(), "written outside the output"
    facts = None if stats is None else _stream_facts(stats)
    return (whole.reshape(-1).cpu() if output else None), facts


@cache
def _expected_program(case: ProgramCase, output: bool) -> tuple[torch.Tensor | None, dict[str, object] | None]:
    return _run_program(reference, case, "cpu", 1, "whole", output, True)


def check_program(
    backend: Any,
    case: ProgramCase,
    device: str = "cpu",
    *,
    threads: int = 1,
    pieces: Cut = "whole",
    output: bool = True,
    counted: bool = True,
) -> None:
    """Output and statistics of `stream` are those of the reference. output, counted : ask for them."""
    expected, facts = _expected_program(case, output)
    got, found = _run_program(backend, case, device, threads, pieces, output, counted)
    if expected is not None and got is not None:
        _same(expected, got)
    assert not counted or found == facts


def _same(expected: torch.Tensor, got: torch.Tensor) -> None:
    differ = (bits(expected) != bits(got)).reshape(-1).nonzero().reshape(-1)
    assert not differ.numel(), (
        f"{differ.numel()} of {expected.numel()} elements differ, first at {int(differ[0])}: "
        f"{expected.reshape(-1)[differ[0]]!r} expected, {got.reshape(-1)[differ[0]]!r} found"
    )


@dataclass(frozen=True, eq=False)
class MarkCase:
    """A program whose marks are written; its rules are not `Marked`."""

    name: str
    program: ProgramCase
    kind: Literal["kept", "agreeing", "useful"]

    @property
    def needs(self) -> frozenset[str]:
        return self.program.needs | {"mark"}


@cache
def mark_cases(count: int = 40, largest: int = 9000) -> tuple[MarkCase, ...]:
    """The random programs and some of the others, for each kind that they have."""
    found = []
    for case in program_cases(150, largest):
        program = case.program
        if any(isinstance(k, Marked) for k in program.keep) or case.piece.rows > 1 or case.piece.g0 % 8:
            continue
        kinds: list[Literal["kept", "agreeing", "useful"]] = ["kept"]
        kinds += ["agreeing"] if program.vote != "none" else []
        kinds += ["useful"] if program.useful is not None else []
        found += [MarkCase(f"{kind}-{case.name}", case, kind) for kind in kinds]
    step = max(1, len(found) // count)
    return tuple(found[::step])


def _run_mark(backend: Any, case: MarkCase, device: str, threads: int, cut: Cut) -> list[torch.Tensor]:
    inner, n = case.program, case.program.piece.numel
    casts = inner.casts or (None,) * (len(inner.models) + 1)
    wholes = [torch.full((-(-n // 8) + 2,), 0xA5, dtype=torch.uint8, device=device) for _ in inner.program.weights]
    for part in _parts(inner.piece, inner.program.slab, cut, CANONICAL_BLOCK):
        a = part.g0 - inner.piece.g0
        views = [_view(x[a : a + part.numel], device, False, c) for x, c in zip(inner.models, casts[1:], strict=False)]
        base = None if inner.base is None else _view(inner.base[a : a + part.numel], device, False, casts[0])
        marks = [view_of(w[1 + a // 8 : 1 + a // 8 - (-part.numel // 8)]) for w in wholes]
        backend.mark(inner.program, case.kind, part, base, views, marks, compute=inner.compute, threads=threads)
    return [w.cpu() for w in wholes]


@cache
def _expected_mark(case: MarkCase) -> list[torch.Tensor]:
    return _run_mark(reference, case, "cpu", 1, "whole")


def check_mark(backend: Any, case: MarkCase, device: str = "cpu", *, threads: int = 1, pieces: Cut = "whole") -> None:
    """The bits, and nothing around them, are those of the reference."""
    pairs = zip(_expected_mark(case), _run_mark(backend, case, device, threads, pieces), strict=True)
    for t, (expected, got) in enumerate(pairs):
        assert torch.equal(expected, got), f"model {t}"


@dataclass(frozen=True, eq=False)
class SweepCase:
    """A counting pass over a piece. selection : that it is part of, if any."""

    name: str
    request: Sweep
    piece: Piece
    base: torch.Tensor | None
    models: tuple[torch.Tensor, ...]
    tensor: int
    offset: int
    capacity: int
    casts: tuple[DType | None, ...] = ()
    selection: Selection | None = None

    @property
    def compute(self) -> DType:
        return compute_dtype([view_of(x).dtype for x in [*self.models, *([] if self.base is None else [self.base])]])

    @property
    def needs(self) -> frozenset[str]:
        return frozenset() if self.request.key == "delta" else frozenset({f"key:{self.request.key}"})


@cache
def sweep_cases(largest: int = 70000) -> tuple[SweepCase, ...]:
    """Every key, both stages and orders, several searches per model, few and many entries."""
    found, mixes, sizes = [], list(MIXES), _sizes(largest)
    keys_: tuple[Literal["delta", "variance", "importance", "balance"], ...]
    keys_ = ("delta", "variance", "importance", "balance")
    for k, key in enumerate(keys_):
        for i in range(14):
            rng = random.Random(f"{key} {i}")
            mix, kind = mixes[(k + i) % len(mixes)], KINDS[(k + i // 2) % 3]
            piece = FAR[i - 11] if i >= 11 else Piece.flat(0, sizes[(k + i) % len(sizes)])
            s = setting(rng, mix, kind, (1, 2, 3, 6)[(k + i) % 4], piece, base=(k + i) % 5 != 0)
            rows = row_table(s) if key == "importance" else None
            rules = balances(s) if key == "balance" else ()
            order: Literal["hash", "index"] = "index" if i % 3 == 2 else "hash"
            offset = rng.choice((0, 3, 1 << 40))
            searched = [0] * rng.choice((1, 2, 3)) if key == "variance" else []
            searched = searched or [rng.randrange(s.num_models) for _ in range(rng.choice((1, 2, 5)))]
            intervals: list[Interval | None] = [
                _interval(s, _number(s, key, m, rows, rules), m, order, offset) for m in searched
            ]
            if i % 4 == 0:
                intervals.insert(0, None)
            request = Sweep(tuple(intervals), order, s.base is not None, rng.getrandbits(64), key, rows, rules)
            capacity = rng.choice((3, piece.numel + 1))
            casts: tuple[DType | None, ...] = (F16,) * (s.num_models + 1) if i == 7 else ()
            name = f"{key}-{mix}-{kind}-{piece.numel}-{i}"
            found.append(
                SweepCase(name, request, piece, s.base, tuple(s.models), rng.getrandbits(32), offset, capacity, casts)
            )
    return tuple(found)


def _number(s: Setting, key: str, m: int, rows: Table | None, rules: Sequence[Balance]) -> torch.Tensor:
    d = s.deltas[m]
    if key == "variance":
        return variance(s.deltas)
    if key == "balance":
        total = torch.zeros_like(d)
        for v in s.deltas:
            total = total + v
        return balance(rules[m], d, total)[1]
    return d if rows is None else importance(d, rows, s.g)


def _interval(s: Setting, number: torch.Tensor, m: int, order: str, offset: int) -> Interval:
    ordered = keys(number).sort().values.tolist() or [1]
    if s.rng.random() < 0.4:
        g = flat_index(s.piece, torch.device("cpu")).tolist() or [0]
        lo, hi = 1 << s.rng.randrange(31), 2**32 - 1 - (1 << s.rng.randrange(31))
        if order == "index":
            lo, hi = offset + g[len(g) // 8], offset + g[len(g) * 7 // 8]
        return Interval("tie", min(lo, hi), max(lo, hi), s.rng.choice(ordered), m)
    if s.rng.random() < 0.3:
        return Interval("key", 1, MAX_KEY[s.compute.name], 0, m)
    lo, hi = sorted(s.rng.choices(ordered, k=2))
    return Interval("key", max(lo, 1), max(hi, 1), 0, m)


def _run_sweep(backend: Any, case: SweepCase, device: str, threads: int, cut: Cut) -> list[object]:
    request, piece = case.request, case.piece
    stage = {"key": 1, "tie": 2}
    rows = [(0, 1, 1, 0, 0) if i is None else (stage[i.stage], i.lo, i.hi, i.tau, i.model) for i in request.intervals]
    columns = [list(c) for c in zip(*rows, strict=True)]
    order = 1 if request.order == "index" else 0
    stats = _cpu.SweepStats(*columns[:4], order, case.capacity, columns[4])
    casts = case.casts or (None,) * (len(case.models) + 1)
    for part in _parts(piece, 1, cut, 1):
        first = (part.g0 - piece.g0) // piece.ld * piece.cols if piece.rows > 1 else part.g0 - piece.g0
        span = slice(first, first + part.numel)
        shape = (part.rows, part.cols) if piece.rows > 1 else (part.numel,)
        views = [_view(x[span].view(shape), device, False, c) for x, c in zip(case.models, casts[1:], strict=False)]
        base = None if case.base is None else _view(case.base[span].view(shape), device, False, casts[0])
        backend.sweep(
            request,
            stats,
            part,
            base,
            views,
            compute=case.compute,
            tensor=case.tensor,
            offset=case.offset,
            threads=threads,
        )
    facts: list[object] = [stats.nonfinite(s) for s in range(len(request.intervals) + 1)]
    for m, interval in enumerate(request.intervals):
        if interval is None:
            continue
        inside = stats.inside(m)
        facts += [m, stats.before(m), inside, stats.overflowed(m), stats.histogram(m)]
        if stats.overflowed(m):
            continue
        ranks = sorted({1 + r * max(1, inside // 40) for r in range(min(inside, 41))} & set(range(1, inside + 1)))
        found = stats.order_statistics(m, ranks)
        facts += [found, [stats.count_ordinal(m, ordinal) for ordinal in found[::8]]]
        offsets, ids = [case.offset], [case.tensor]
        if interval.stage == "tie":
            points = [(interval.tau, rank) for rank in ranks[::8]]
        else:
            points = [(ordinal, r) for ordinal in found[::8] for r in {1, stats.count_ordinal(m, ordinal)[1]}]
        facts += [stats.tie_point(m, r, tau, order, request.seed, offsets, ids) for tau, r in points]
    return facts


@cache
def _expected_sweep(case: SweepCase) -> list[object]:
    return _run_sweep(reference, case, "cpu", 1, "whole")


def check_sweep(backend: Any, case: SweepCase, device: str = "cpu", *, threads: int = 1, pieces: Cut = "whole") -> None:
    """Counts, entries, bins and non-finite values are those of the reference."""
    assert _run_sweep(backend, case, device, threads, pieces) == _expected_sweep(case)


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
        views = [_plain(_box(x, piece), device) for x in case.models]
        base = None if case.base is None else _plain(_box(case.base, piece), device)
        backend.gram(case.request, sums, piece, base, views, compute=case.compute, threads=threads)
    return _folded(sums, slots)


def _plain(x: torch.Tensor, device: str) -> TensorView:
    return view_of(x if device == "cpu" else x.to(device))


def _folded(sums: _cpu.BlockSums, slots: int) -> list[list[str]]:
    return [[_exact(x) for x in array("d", sums.fold(slot))] for slot in range(slots)]


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


def _run_reduce(backend: Any, case: ReduceCase, device: str, threads: int, cut: Cut) -> list[list[str]]:
    inner = case.program
    slots = case.request.num_slots(len(inner.program.weights))
    casts = inner.casts or (None,) * (len(inner.models) + 1)
    sums = _cpu.BlockSums(slots, 1, inner.piece.numel)
    for part in _parts(inner.piece, inner.program.slab, cut, CANONICAL_BLOCK):
        span = slice(part.g0, part.g0 + part.numel)
        views = [_view(x[span], device, inner.strided, c) for x, c in zip(inner.models, casts[1:], strict=False)]
        base = None if inner.base is None else _view(inner.base[span], device, inner.strided, casts[0])
        backend.reduce(inner.program, case.request, sums, part, base, views, compute=inner.compute, threads=threads)
    return _folded(sums, slots)


@cache
def _expected_reduce(case: ReduceCase) -> list[list[str]]:
    return _run_reduce(reference, case, "cpu", 1, "whole")


def check_reduce(
    backend: Any, case: ReduceCase, device: str = "cpu", *, threads: int = 1, pieces: Cut = "whole"
) -> None:
    """Every sum is that of the reference."""
    assert _run_reduce(backend, case, device, threads, pieces) == _expected_reduce(case)


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
    base, model = _plain(case.base, device), _plain(case.model, device)
    compute = compute_dtype([base.dtype, model.dtype])
    found = backend.divergence(case.row_length, case.piece, base, model, compute=compute, threads=threads)
    return [_exact(x) for x in found]


@cache
def _expected_divergence(case: DivergenceCase) -> list[str]:
    return _run_divergence(reference, case, "cpu", 1)


def check_divergence(backend: Any, case: DivergenceCase, device: str = "cpu", *, threads: int = 1) -> None:
    """Every number is that of the reference."""
    assert _run_divergence(backend, case, device, threads) == _expected_divergence(case)
