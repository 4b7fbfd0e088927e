"""Cases of programs, and of the marks that they write, with their checks against the reference."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch

from feature_programs import (
    ALONE,
    KINDS,
    MIXES,
    Setting,
    feature_program,
    importances,
    packed_marks,
    random_program,
    setting,
)
from feature_shared import (
    DTYPES,
    FAR,
    Cut,
    exact_bits,
    parts_of,
    same_bits,
    sizes_up_to,
    view_on,
)
from mergekernels import _cpu
from mergekernels._backends import reference
from mergekernels._native import torch_dtype, view_of
from mergekernels.ops.keep import Marked
from mergekernels.ops.program import Program
from mergekernels.tensors import BF16, CANONICAL_BLOCK, F16, F32, DType, Piece, compute_dtype


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


def _case(name: str, s: Setting, program: Program, kind: str, out: DType, **more: Any) -> ProgramCase:
    models = [*s.models, *(importances(s, kind) if program.merge == "importance" else [])]
    marks = tuple(packed_marks(s) if isinstance(k, Marked) else None for k in program.keep)
    return ProgramCase(name, program, s.piece, s.base, tuple(models), marks, out, **more)


@cache
def program_cases(num_random: int = 150, largest: int = 70000) -> tuple[ProgramCase, ...]:
    """Every feature alone over dtypes, sizes and boxes, then random combinations; sizes up to `largest`."""
    return (*_alone_cases(largest), *_random_cases(num_random, largest))


def _alone_cases(largest: int) -> Iterator[ProgramCase]:
    sizes, mixes = sizes_up_to(largest), list(MIXES)
    for f, name in enumerate(ALONE):
        boxes = name not in ("rank", "rank_divide", "place", "marked")
        for i in range(9):
            rng = random.Random(f"{name} {i}")
            mix, kind = mixes[(f + i) % len(mixes)], KINDS[(f // 2 + i) % 3]
            piece = FAR[i - 6] if i >= 6 and boxes else Piece.flat(0, sizes[(f + i) % len(sizes)])
            if name == "marked" and i >= 6:
                piece = Piece.flat(2**33 + 8 * i, 777)
            num_models = 1 if name == "importance_key" else (1, 2, 3, 5)[(f + i) % 4]
            if i == 0 and name in ("factors", "vote_count", "balance", "useful", "joint", "importance", "draw"):
                piece, num_models = Piece.flat(0, 300), 32 if name == "importance" else 64
            base = name in ("subtract", "anchor") or (name != "importance" and (f + i) % 5 != 0)
            s = setting(rng, mix, kind, num_models, piece, base=base)
            out = DTYPES[(f + i // 2) % 4]
            title = f"{name}-{mix}-{kind}-{piece.numel}-{i}"
            yield _case(title, s, feature_program(name, s), kind, out, strided=i == 5)


def _random_cases(count: int, largest: int) -> Iterator[ProgramCase]:
    for i in range(count):
        rng = random.Random(f"any {i}")
        rows, marks = i % 3 == 0, i % 4 == 1
        piece = Piece.flat(0, rng.choice(sizes_up_to(largest)[:-1] if i % 20 else sizes_up_to(largest)))
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


def _stream_facts(stats: _cpu.StreamStats) -> dict[str, object]:
    models = range(stats.num_models)
    return {
        "kept": [stats.kept(m) for m in models],
        "conflicts": stats.conflicts(),
        "votes": stats.votes(),
        "nonfinite": [stats.nonfinite(s) for s in range(stats.num_models + 2)],
        "squares": [exact_bits(stats.sum_squares(m)) for m in models],
    }


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
    for part in parts_of(piece, case.program.slab, cut, CANONICAL_BLOCK if flat else 8):
        first = part.g0 - piece.g0
        rows = slice(first // piece.ld, first // piece.ld + part.rows) if piece.rows > 1 else slice(0)

        def of(x: torch.Tensor, first: int = first, rows: slice = rows, part: Piece = part) -> torch.Tensor:
            return x.view(shape)[rows] if piece.rows > 1 else x[first : first + part.numel]

        views = [view_on(of(x), device, case.strided, c) for x, c in zip(case.models, casts[1:], strict=False)]
        base = None if case.base is None else view_on(of(case.base), device, case.strided, casts[0])
        marks = [
            view_on(_bytes_of(case, part, t), device, False) if isinstance(k, Marked) else None
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
    tensors = [x for x in (case.base, *case.models, *case.marks) if x is not None]
    before = [x.clone() for x in tensors]
    got, found = _run_program(backend, case, device, threads, pieces, output, counted)
    for x, y in zip(tensors, before, strict=True):
        assert torch.equal(x.view(torch.uint8), y.view(torch.uint8)), "an input was written"
    if expected is not None and got is not None:
        same_bits(expected, got)
    assert not counted or found == facts


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
    for part in parts_of(inner.piece, inner.program.slab, cut, CANONICAL_BLOCK):
        a = part.g0 - inner.piece.g0
        span = slice(a, a + part.numel)
        views = [view_on(x[span], device, False, c) for x, c in zip(inner.models, casts[1:], strict=False)]
        base = None if inner.base is None else view_on(inner.base[span], device, False, casts[0])
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
