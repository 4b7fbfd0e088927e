"""`gram` and `divergence` of the cpu backend against the reference, bit for bit: values, cuts, views, threads."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Literal

import pytest
import torch

from cpu_cases import DTYPES, ISAS, KINDS, misaligned, values
from feature_cases import (
    DivergenceCase,
    GramCase,
    by_name,
    check_divergence,
    check_gram,
    divergence_cases,
    gram_cases,
)
from mergekernels import _cpu
from mergekernels._backends import cpu, reference
from mergekernels._native import view_of
from mergekernels.ops.sums import Gram, Segments
from mergekernels.tensors import BF16, F32, F64, DType, Piece, TensorView

Box = tuple[int, int, int, int]  # first row, first column, rows, columns


@pytest.fixture(autouse=True, params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("MERGEKERNELS_CPU_ISA", request.param)
    yield request.param


@pytest.mark.parametrize("case", gram_cases(), ids=by_name)
def test_gram(case: GramCase) -> None:
    check_gram(cpu, case, threads=2)


@pytest.mark.parametrize("case", divergence_cases(), ids=by_name)
def test_divergence(case: DivergenceCase) -> None:
    check_divergence(cpu, case, threads=2)


def gram(
    backend: object,
    segments: Segments,
    pieces: list[tuple[Piece, torch.Tensor | None, list[torch.Tensor]]],
    num_models: int,
    compute: DType,
    *,
    length: int | None = None,
    threads: int = 1,
    cast: DType | None = None,
) -> list[bytes]:
    """The sums of every pair, folded per segment, with one NaN for all."""
    length = segments.length if length is None else length
    sums = _cpu.BlockSums(num_models * (num_models + 1) // 2, segments.count, length)
    for piece, base, models in pieces:
        views = [None if x is None else view_of(x) for x in [base, *models]]
        if cast is not None:
            views = [
                None if v is None else TensorView(v.ptr, v.shape, v.strides, v.dtype, v.owner, cast) for v in views
            ]
        backend.gram(  # type: ignore[attr-defined]
            Gram(segments, base is not None), sums, piece, views[0], views[1:], compute=compute, threads=threads
        )
    folded = [torch.frombuffer(bytearray(sums.fold(p)), dtype=torch.float64) for p in range(sums.num_slots)]
    return [torch.where(x.isnan(), torch.full_like(x, torch.nan), x).numpy().tobytes() for x in folded]


def check(
    segments: Segments,
    models: list[torch.Tensor],
    base: torch.Tensor | None,
    compute: DType,
    *,
    threads: int = 1,
    cast: DType | None = None,
) -> list[bytes]:
    n = models[0].numel()
    whole = [(Piece.flat(0, n), base, models)]
    length = n if segments.axis == "tensor" else segments.length
    want = gram(reference, segments, whole, len(models), compute, length=length, cast=cast)
    got = gram(cpu, segments, whole, len(models), compute, length=length, threads=threads, cast=cast)
    assert got == want
    return got


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_tensor(dtype: str, kind: str) -> None:
    d = DTYPES[dtype]
    compute = F64 if d is F64 else F32
    rng = random.Random(f"gram {dtype} {kind}")
    for case, n in enumerate((0, 1, 3, 5, 9, 100, 255, 256, 257, 2049, 4095, 4096, 4097, 9001)):
        models = [values(kind, n, d, 10 * case + m) for m in range(rng.randrange(1, 7))]
        base = values(rng.choice((kind, "normal")), n, d, 999 + case) if rng.random() < 0.7 else None
        check(Segments("tensor", 1, n), models, base, compute, threads=rng.choice((1, 2, 3)))


@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize(
    ("count", "length"), [(1, 1), (7, 1), (1, 7), (5, 3), (60, 33), (5, 300), (3, 4100), (2, 9000), (1050, 2)]
)
def test_rows_and_columns(count: int, length: int, axis: Literal["rows", "columns"]) -> None:
    rng = random.Random(f"{count} {length} {axis}")
    for num_models in (2,) if count > 1000 else (1, 2, 3, 4, 5, 9):
        d = rng.choice(list(DTYPES.values()))
        models = [values("normal", count * length, d, m) for m in range(num_models)]
        base = values("normal", count * length, d, 77) if rng.random() < 0.7 else None
        check(Segments(axis, count, length), models, base, F64 if d is F64 else F32)


@pytest.mark.parametrize("axis", ["tensor", "rows", "columns"])
def test_many_models(axis: str) -> None:
    models = [values("normal", 4500, BF16, m) for m in range(64)]
    count, length = {"tensor": (1, 4500), "rows": (2, 2250), "columns": (3, 1500)}[axis]
    check(Segments(axis, count, length), models, None, F32)


@pytest.mark.parametrize("axis", ["tensor", "rows", "columns"])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads(axis: str, threads: int) -> None:
    shape = {"rows": (40, 30000), "columns": (30000, 40), "tensor": (1, 1200000)}[axis]
    models = [values("normal", shape[0] * shape[1], BF16, m).reshape(shape) for m in range(2)]
    base = values("normal", shape[0] * shape[1], BF16, 9).reshape(shape)
    count, length = shape[::-1] if axis == "columns" else shape
    check(Segments(axis, count, length), models, base, F32, threads=threads)


def cuts(rng: random.Random, n: int) -> list[int]:
    """Places at multiples of 4096 between 0 and n, both included."""
    inner = [p for p in range(4096, n, 4096) if rng.random() < 0.6]
    return [0, *inner, n]


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("axis", ["tensor", "rows", "columns"])
def test_pieces_give_the_sums_of_the_whole(axis: str, strided: bool) -> None:
    rng = random.Random(f"pieces {axis} {strided}")
    for shape in ((9001, 3), (4097, 5)) if axis == "columns" else ((3, 9001), (5, 8192)):
        rows, cols = shape
        models = [values("normal", rows * cols, F32, m).reshape(shape) for m in range(3)]
        base = values("normal", rows * cols, F32, 50).reshape(shape)
        n = rows * cols
        if axis == "tensor":
            segments = Segments("tensor", 1, n)
            edges = cuts(rng, n)
            boxes = [(Piece.flat(a, b - a), slice(a, b)) for a, b in itertools.pairwise(edges)]
            take = [(p, base.reshape(-1)[s], [x.reshape(-1)[s] for x in models]) for p, s in boxes]
        else:
            segments = Segments(axis, rows, cols) if axis == "rows" else Segments(axis, cols, rows)
            row_cut = sorted({0, rows, *(rng.randrange(rows) for _ in range(2))}) if axis == "rows" else cuts(rng, rows)
            col_cut = cuts(rng, cols) if axis == "rows" else sorted({0, cols, rng.randrange(cols)})
            take = []
            for top, bottom in itertools.pairwise(row_cut):
                for left, right in itertools.pairwise(col_cut):
                    piece = Piece(top * cols + left, bottom - top, right - left, cols)
                    box = (slice(top, bottom), slice(left, right))
                    # Boxes of a tensor are views with gaps; copies are dense.
                    found = [x[box] if strided else x[box].contiguous() for x in [base, *models]]
                    take.append((piece, found[0], found[1:]))
        rng.shuffle(take)
        want = gram(reference, segments, [(Piece.flat(0, n), base, models)], 3, F32)
        assert gram(cpu, segments, take, 3, F32, threads=2) == want


def test_views_of_any_stride_and_address() -> None:
    shape = (70, 130)
    plain = [values("normal", 9100, BF16, m).reshape(shape) for m in range(3)]
    turned = [x.t().contiguous().t() for x in plain]
    for axis, count, length in (("tensor", 1, 9100), ("rows", 70, 130), ("columns", 130, 70)):
        segments = Segments(axis, count, length)
        want = check(segments, plain[1:], plain[0], F32)
        assert check(segments, turned[1:], turned[0], F32) == want
        assert check(segments, [misaligned(x) for x in plain[1:]], turned[0], F32) == want


def test_mixed_types_and_load_casts() -> None:
    models = [values("normal", 5000, d, 3) for d in DTYPES.values()]
    check(Segments("tensor", 1, 5000), models, values("normal", 5000, BF16, 8), F64)
    check(Segments("tensor", 1, 5000), models, values("normal", 5000, BF16, 8), F32, cast=BF16)


def test_the_order_of_sums_is_the_documented_one() -> None:
    # 2^53 + 1 is not a double: whether small terms survive shows which terms were added to which.
    x = torch.zeros(4096 + 256, dtype=torch.float64)
    x[0] = 2.0**27  # lane 0: its square swallows 1 unless two of them meet first
    x[256] = x[512] = 1.0
    x[1] = x[129] = 1.0  # lanes 1 and 129 meet at stride 128, before they meet lane 0
    assert torch.frombuffer(bytearray(check(Segments("tensor", 1, x.numel()), [x], None, F64)[0]), dtype=torch.float64)[
        0
    ] == float(2**54 + 2)
    y = torch.zeros(8 * 4096, dtype=torch.float64)
    y[0] = 2.0**27
    y[2 * 4096] = y[3 * 4096] = 1.0  # blocks 2 and 3 meet first
    got = check(Segments("tensor", 1, y.numel()), [y], None, F64)
    assert torch.frombuffer(bytearray(got[0]), dtype=torch.float64)[0] == float(2**54 + 2)


@pytest.mark.parametrize(
    ("axis", "piece"),
    [
        ("tensor", Piece.flat(1, 4096)),
        ("tensor", Piece.flat(0, 4097)),
        ("tensor", Piece.flat(8192, 4096)),
        ("rows", Piece.flat(50, 100)),
        ("rows", Piece(0, 10, 50, 100)),
        ("rows", Piece.flat(9900, 200)),
        ("columns", Piece.flat(0, 150)),
        ("columns", Piece(0, 50, 10, 100)),
        ("columns", Piece(0, 50, 10, 99)),
    ],
)
def test_pieces_that_cut_a_block_are_refused(axis: str, piece: Piece) -> None:
    count, length = {"tensor": (1, 10000), "rows": (100, 100), "columns": (100, 100)}[axis]
    x = torch.zeros(piece.rows, piece.cols)
    with pytest.raises((ValueError, IndexError)):
        gram(cpu, Segments(axis, count, length), [(piece, None, [x])], 1, F32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_divergence_of_any_values(dtype: str, kind: str) -> None:
    d = DTYPES[dtype]
    compute = F64 if d is F64 else F32
    for case, (rows, length) in enumerate(((0, 4), (3, 1), (5, 7), (2, 255), (3, 257), (2, 4096), (2, 9001))):
        p, q = (values(kind, rows * length, d, 2 * case + i) * (40 if kind == "normal" else 1) for i in (0, 1))
        check_divergence(cpu, DivergenceCase("any", length, Piece.flat(0, rows * length), q, p, compute), threads=1)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_divergence_of_views_in_threads(threads: int) -> None:
    # A team of three needs 3 MiB of work as the backend counts it; a turned view is gathered row by row.
    p, q = (values("normal", 60_000, BF16, i).reshape(200, 300) for i in (1, 2))
    piece = Piece.flat(0, 60_000)
    want = reference.divergence(300, piece, view_of(q), view_of(p), compute=F32, threads=1)
    for turn in (False, True):
        x = p.t().contiguous().t() if turn else p
        got = cpu.divergence(300, piece, view_of(q), view_of(x), compute=F32, threads=threads)
        assert got.tobytes() == want.tobytes()


def test_divergence_needs_whole_rows() -> None:
    x = view_of(torch.zeros(100))
    for length, first in ((3, 0), (50, 25), (0, 0)):
        with pytest.raises(ValueError, match="whole rows"):
            cpu.divergence(length, Piece.flat(first, 100), x, x, compute=F32, threads=1)
