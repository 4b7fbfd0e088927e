"""Rules by rank of the cpu backend against the reference: draws, dividing draws and bands, bit for bit."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from cpu_cases import DTYPES, ISAS, KINDS, values
from feature_cases import ProgramCase, by_name, check_program, program_cases
from mergekernels._backends import cpu, reference
from mergekernels._native import view_of
from mergekernels.ops.keep import RankBand, RankDraw, Rows
from mergekernels.ops.program import Program
from mergekernels.tensors import BF16, F32, F64, DType, Piece

Rule = RankDraw | RankBand


@pytest.fixture(autouse=True, params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("MERGEKERNELS_CPU_ISA", request.param)
    yield request.param


def bits_of(
    backend: object, program: Program, tensors: list[torch.Tensor], compute: DType, threads: int
) -> list[bytes]:
    """The packed bits of what is kept, a delta of zero too, and the merged tensor."""
    n = tensors[0].numel()
    base = view_of(tensors[-1]) if program.base else None
    models = [view_of(x) for x in tensors[: len(program.weights)]]
    marks = [torch.full((-(-n // 8),), 0xA5, dtype=torch.uint8) for _ in models]
    piece = Piece.flat(0, n)
    backend.mark(  # type: ignore[attr-defined]
        program, "kept", piece, base, models, [view_of(m) for m in marks], compute=compute, threads=threads
    )
    out = torch.empty(n, dtype=tensors[0].dtype)
    backend.stream(  # type: ignore[attr-defined]
        program, piece, base, models, view_of(out), compute=compute, stats=None, threads=threads
    )
    return [m.numpy().tobytes() for m in marks] + [out.view(torch.uint8).numpy().tobytes()]


def check(
    rules: list[Rule],
    rows: Rows,
    slabs: int,
    dtype: DType,
    kind: str,
    *,
    base: bool = True,
    threads: int = 1,
    seed: int = 1,
) -> None:
    n = rows.length * rows.stride * slabs
    compute = F64 if dtype is F64 else F32
    tensors = [values(kind, n, dtype, seed + m) for m in range(len(rules))]
    if base:
        tensors.append(values(kind, n, dtype, seed + 50))
    program = Program((1.0,) * len(rules), tuple(rules), base=base, rows=rows, seed=seed * 2**33 + 5, tensor=77)
    assert bits_of(cpu, program, tensors, compute, threads) == bits_of(reference, program, tensors, compute, 1)


def some_rules(rng: random.Random, m: int) -> list[Rule]:
    """A draw at an epsilon of 0.1 or so, a dividing one, one that decides nothing by the word alone, and a band."""
    low = rng.randrange(2**30, 2**31)
    first = rng.randrange(m + 1)
    return [
        RankDraw(low, rng.randrange(2**29, 2**31), 2**31),
        RankDraw(low, rng.randrange(2**31), 2**30, divide=True),
        rng.choice((RankDraw(0, 2**32, 2**32), RankDraw(2**32, 0, 0), RankDraw(0, 0, 5), RankDraw(5, 2**32 - 5, 0))),
        RankBand(first, rng.randrange(first, m + 2)),
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_any_values(dtype: str, kind: str) -> None:
    rng = random.Random(f"ranks {dtype} {kind}")
    for length in (1, 2, 3, 17, 100, 257, 2050):
        rows = Rows(length, rng.choice((1, 1, 3)))
        check(some_rules(rng, length), rows, rng.choice((1, 3)), DTYPES[dtype], kind, base=rng.random() < 0.7)


@pytest.mark.parametrize("kind", ["normal", "ties", "zeros"])
def test_long_rows(kind: str) -> None:
    rng = random.Random(kind)
    check(some_rules(rng, 100_000), Rows(100_000), 1, BF16, kind)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads(threads: int) -> None:
    rng = random.Random(5)
    check(some_rules(rng, 1000)[:2], Rows(1000), 270, F32, "normal", threads=threads)


def test_one_outlier_leaves_the_other_ranks_apart() -> None:
    # Bins are laid over the range of a row's keys; here nearly all of them share a few bins.
    rng = random.Random(8)
    for outlier in (3e38, float("inf"), float("nan")):
        x = values("normal", 3000, F32, 4)
        x[17] = outlier
        x[5] = 1e-45
        program = Program((1.0,) * 4, tuple(some_rules(rng, 3000)), base=False, rows=Rows(3000), seed=3, tensor=4)
        tensors = [x] * 4
        assert bits_of(cpu, program, tensors, F32, 1) == bits_of(reference, program, tensors, F32, 1)


RANKED = [c for c in program_cases() if "rank" in c.program.features]


@pytest.mark.parametrize("case", RANKED, ids=by_name)
def test_programs(case: ProgramCase) -> None:
    check_program(cpu, case, threads=2, pieces="cut")


@pytest.mark.slow
def test_rows_of_millions() -> None:
    """Such rows have more bins. One value is a seventh of the row, so that a bin is put in order by ties."""
    n = 2_100_001
    x = torch.randn(n, generator=torch.Generator().manual_seed(3))
    x[::7] = 0.5
    program = Program((1.0,), (RankDraw(1 << 28, 1 << 29, 0),), base=False, rows=Rows(n), seed=1)
    assert bits_of(cpu, program, [x], F32, 1) == bits_of(reference, program, [x], F32, 1)
