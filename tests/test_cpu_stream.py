"""`stream` of the cpu backend against the reference: instruction sets, dtypes, shapes, values, programs, cuts, team."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest
import torch

from cpu_cases import (
    DTYPES,
    ISAS,
    KINDS,
    check_stream,
    guarded,
    guards_intact,
    misaligned,
    num_blocks,
    random_program,
    run_stream,
    same_bits,
    stream_facts,
    values,
)
from mergekernels import _cpu
from mergekernels._backends import cpu, reference
from mergekernels._native import torch_dtype, view_of
from mergekernels.ops.keep import KEEP_NOTHING, Keep
from mergekernels.ops.program import Program
from mergekernels.tensors import BF16, F16, F32, F64, Piece, TensorView
from rounding_oracle import ONCE, doubles, rounded_tensor


@pytest.fixture(autouse=True, params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("MERGEKERNELS_CPU_ISA", request.param)
    yield request.param


def deltas_of(models: list[torch.Tensor], base: torch.Tensor | None, compute: object) -> list[torch.Tensor]:
    c = torch_dtype(compute)  # type: ignore[arg-type]
    x0 = 0 if base is None else base.to(c)
    return [m.to(c) - x0 for m in models]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_random_programs_over_all_values(dtype: str, kind: str) -> None:
    d = DTYPES[dtype]
    compute = F64 if d is F64 else F32
    rng = random.Random(f"{dtype} {kind}")
    for case, n in enumerate((1, 3, 255, 256, 257, 1000, 4095, 4096, 4097, 9001)):
        num_models = rng.choice((1, 2, 3, 4, 7))
        models = [values(kind, n, d, 10 * case + m) for m in range(num_models)]
        base = values(rng.choice((kind, "normal")), n, d, 999 + case) if rng.random() < 0.8 else None
        program = random_program(rng, deltas_of(models, base, compute), base is not None, Piece.flat(0, n))
        out = rng.choice((d, d, BF16, F16, F32, F64 if compute is F64 else F32))
        check_stream(program, base, models, out, compute, threads=rng.choice((1, 2, 3, 8)))


PROGRAMS = {
    "linear": Program((0.3, 0.5, 0.2), (None,) * 3, base=False, divisor="value", divisor_value=1.0),
    "task_arithmetic": Program((0.3, -0.5, 0.2), (None,) * 3, scale=0.7),
    "ties": Program(
        (1.0, 0.5, 0.25), (Keep(0x3C000000, "hash", 2**31, 50),) * 3, vote="weighted", divisor="agreeing_weights"
    ),
    "ties-paper": Program(
        (1.0,) * 3, (Keep(0x3C000000),) * 3, vote="weighted", zero_vote=-1, divisor="agreeing_count", scale=0.4
    ),
    "nothing": Program((1.0,) * 3, (KEEP_NOTHING,) * 3, vote="weighted", divisor="agreeing_weights"),
}


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 5), (1,), (7, 1, 13), (33, 129), (2, 3, 4, 5)])
def test_shapes(shape: tuple[int, ...], dtype: str, name: str) -> None:
    d = DTYPES[dtype]
    n = torch.Size(shape).numel()
    models = [values("ties", n, d, m).reshape(shape) for m in range(3)]
    base = values("zeros", n, d, 7).reshape(shape) if PROGRAMS[name].base else None
    check_stream(PROGRAMS[name], base, models, d, F32)


@pytest.mark.parametrize(
    ("vote", "divisor", "zero_vote"),
    [
        *itertools.product(("none",), ("none", "value"), (-1, 0, 1)),
        *itertools.product(("weighted",), ("none", "value", "agreeing_weights", "agreeing_count"), (-1, 0, 1)),
    ],
)
def test_every_kind_of_combination(vote: str, divisor: str, zero_vote: int) -> None:
    models = [values("ties", 700, BF16, m) for m in range(4)]
    base = values("ties", 700, BF16, 9)
    program = Program(
        (1.0, -1.0, 0.5, 0.5),
        (None, Keep(0x3E800000, "index", index=300), None, Keep(0x3F000000)),
        vote=vote,
        divisor=divisor,
        zero_vote=zero_vote,
        divisor_value=2.5,
    )  # type: ignore[arg-type]
    check_stream(program, base, models, BF16, F32)


@pytest.mark.parametrize("num_models", [1, 2, 5, 16, 63, 64])
@pytest.mark.parametrize("dtype", ["bf16", "fp64"])
def test_number_of_models(num_models: int, dtype: str) -> None:
    d = DTYPES[dtype]
    compute = F64 if dtype == "fp64" else F32
    models = [values("ties", 5000, d, m) for m in range(num_models)]
    base = values("ties", 5000, d, 1000)
    program = random_program(random.Random(num_models), deltas_of(models, base, compute), True, Piece.flat(0, 5000))
    check_stream(program, base, models, d, compute)


@pytest.mark.parametrize("cast", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("dtypes", [("bf16", "fp16", "fp32"), ("fp16", "bf16", "bf16"), ("fp32", "fp64", "bf16")])
def test_mixed_dtypes_and_load_casts(dtypes: tuple[str, ...], cast: str) -> None:
    rng = random.Random(cast)
    compute = F64 if "fp64" in dtypes else F32
    for kind in ("normal", "huge", "bits"):
        models = [values(kind, 1300, DTYPES[t], i) for i, t in enumerate(dtypes)]
        base = values("normal", 1300, BF16, 5)
        program = random_program(rng, deltas_of(models, base, compute), True, Piece.flat(0, 1300))
        casts = [DTYPES[cast], None, DTYPES[cast], DTYPES[cast]]
        check_stream(program, base, models, DTYPES[cast], compute, casts=casts)


def test_float64_narrowed_on_loading_in_float32_arithmetic() -> None:
    models = [values("normal", 500, F64, m) for m in range(2)]
    program = Program((1.0, 2.0), (None, None), base=False)
    check_stream(program, None, models, BF16, F32, casts=[F32, BF16])


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_float64_is_rounded_once_to_16_bits(dtype: str) -> None:
    """Results and load casts, in both arithmetics, and the reference too, against exact fractions."""
    d = DTYPES[dtype]
    assert all(float(rounded_tensor([x], t)) == y for t, x, y in ONCE)
    xs = [x for t, x, _ in ONCE if t is d] + doubles(d)
    exact = rounded_tensor(xs, d)
    x = torch.tensor(xs, dtype=torch.float64)
    copy = Program((1.0,), (None,), base=False, copy=True)
    assert same_bits(check_stream(copy, None, [x], d, F64, threads=2), exact)
    for compute, out in ((F64, F64), (F64, d), (F32, F32), (F32, d)):
        loaded = check_stream(copy, None, [x], out, compute, casts=[d])
        assert same_bits(loaded.to(exact.dtype)[~x.isnan()], exact[~x.isnan()])
        assert bool(loaded[x.isnan()].isnan().all())
    # A sum of which no input needs rounding.
    total = check_stream(
        Program((1.0, 1.0), (None, None), base=False), None, [x, torch.full_like(x, 2.0**-40)], d, F64, stats=False
    )
    assert same_bits(total, rounded_tensor([v + 2.0**-40 for v in xs], d))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_copy(dtype: str, scale: float) -> None:
    d = DTYPES[dtype]
    compute = F64 if dtype == "fp64" else F32
    for kind, out, cast in itertools.product(("bits", "zeros"), (d, BF16, F16), (None, BF16)):
        x = values(kind, 4500, d, 3)
        program = Program((1.0,), (None,), base=False, scale=scale, copy=True)
        result = check_stream(program, None, [x], out, compute, casts=[cast])
        if scale == 1.0 and out is d and cast is None:
            assert same_bits(result, x)


def strided(shape: tuple[int, ...], dtype: object, seed: int, how: str) -> torch.Tensor:
    n = torch.Size(shape).numel()
    x = values("normal", n, dtype, seed).reshape(shape)  # type: ignore[arg-type]
    if how == "transposed":
        return x.reshape(shape[::-1]).permute(*reversed(range(len(shape))))
    if how == "stepped":
        wide = torch.zeros((*shape[:-1], shape[-1] * 3), dtype=x.dtype)
        wide[..., ::3] = x
        return wide[..., ::3]
    if how == "expanded":
        return x[:1].expand(shape)
    if how == "misaligned":
        return misaligned(x)
    return x


@pytest.mark.parametrize("shape", [(40, 130), (5, 3, 7, 11), (4099, 2)])
@pytest.mark.parametrize("dtype", ["bf16", "fp32", "fp64"])
def test_strides(shape: tuple[int, ...], dtype: str) -> None:
    d = DTYPES[dtype]
    compute = F64 if dtype == "fp64" else F32
    hows = ("dense", "transposed", "stepped", "expanded", "misaligned")
    for i, how in enumerate(hows):
        models = [strided(shape, d, 1, how), strided(shape, d, 2, hows[(i + 1) % 5])]
        base = strided(shape, d, 3, hows[(i + 2) % 5])
        program = random_program(
            random.Random(i), [x.contiguous() for x in deltas_of(models, base, compute)], True, Piece.flat(0, 1)
        )
        check_stream(program, base, models, d, compute, threads=1 + i, out_view=bool(i % 2))


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_threads_change_nothing(threads: int) -> None:
    n = 700_003
    models = [values("ties", n, BF16, m) for m in range(3)]
    models[1][[5, n - 1]] = float("inf")
    base = values("zeros", n, BF16, 8)
    check_stream(PROGRAMS["ties"], base, models, BF16, F32, threads=threads)


def test_pieces_with_gaps_have_their_own_indices() -> None:
    """Row and column shards of a tensor give the bits and the counts of the whole."""
    rng = random.Random(4)
    rows, cols = 37, 301
    whole = [values("ties", rows * cols, BF16, m).reshape(rows, cols) for m in range(3)]
    whole[1][30, 300] = float("nan")
    base = values("ties", rows * cols, BF16, 6).reshape(rows, cols)
    base[3, 7] = float("inf")
    for _ in range(12):
        program = random_program(rng, deltas_of(whole, base, F32), True, Piece.flat(0, rows * cols))
        expected = torch.empty(rows, cols, dtype=torch.bfloat16)
        everything = [(Piece.flat(0, rows * cols), view_of(base), [view_of(x) for x in whole], view_of(expected))]
        facts = stream_facts(run_stream(reference, program, everything, F32, 0))  # type: ignore[arg-type]
        memory, out = guarded((rows, cols), BF16)
        r = sorted({0, rows, *(rng.randrange(rows) for _ in range(3))})
        c = sorted({0, cols, *(rng.randrange(cols) for _ in range(3))})
        pieces = []
        for (r0, r1), (c0, c1) in itertools.product(itertools.pairwise(r), itertools.pairwise(c)):
            box = (slice(r0, r1), slice(c0, c1))
            copies = [view_of(x[box].contiguous() if rng.random() < 0.5 else x[box]) for x in (*whole, base)]
            piece = Piece(r0 * cols + c0, r1 - r0, c1 - c0, cols)
            pieces.append((piece, copies[-1], copies[:-1], view_of(out[box])))
        rng.shuffle(pieces)
        stats = run_stream(cpu, program, pieces, F32, 0, threads=2)
        assert guards_intact(memory, 2)
        assert same_bits(out, expected)
        assert stream_facts(stats) == facts  # type: ignore[arg-type]


def test_norms_over_pieces_of_whole_blocks() -> None:
    n = 4096 * 9 + 77
    models = [values("normal", n, BF16, m) for m in range(2)]
    base = values("normal", n, BF16, 5)
    program = Program((1.0, 1.0), (None, None))
    whole = [(Piece.flat(0, n), view_of(base), [view_of(x) for x in models], None)]
    expected = stream_facts(run_stream(reference, program, whole, F32, num_blocks(n)))  # type: ignore[arg-type]
    cuts = [0, 4096 * 2, 4096 * 3, 4096 * 8, n]
    pieces = [
        (Piece.flat(a, b - a), view_of(base[a:b]), [view_of(x[a:b]) for x in models], None)
        for a, b in itertools.pairwise(cuts)
    ]
    pieces.reverse()
    assert stream_facts(run_stream(cpu, program, pieces, F32, num_blocks(n), 2)) == expected  # type: ignore[arg-type]


def test_norms_need_whole_blocks() -> None:
    x = values("normal", 5000, F32, 1)
    for piece, part in ((Piece.flat(7, 4096), x[7:4103]), (Piece.flat(0, 100), x[:100]), (Piece(0, 2, 3, 9), x[:6])):
        with pytest.raises(ValueError, match="whole blocks of 4096"):
            run_stream(cpu, Program((1.0,), (None,), base=False), [(piece, None, [view_of(part)], None)], F32, 2)


def test_indices_beyond_32_bits() -> None:
    g0 = 2**33 + 4096
    models = [values("constant", 4096, BF16, m) for m in range(2)]
    base = values("zeros", 4096, BF16, 5)
    for keep in (Keep(0x3F000000, "hash", 2**30, g0 + 5), Keep(0x3F000000, "index", 0, g0 + 1000)):
        program = Program((1.0, 1.0), (keep, keep), seed=2**63 + 1, tensor=77)
        check_stream(program, base, models, BF16, F32, piece=Piece.flat(g0, 4096), stats=False)


def test_the_result_may_replace_an_input() -> None:
    models = [values("ties", 3000, BF16, m) for m in range(3)]
    base = values("zeros", 3000, BF16, 8)
    expected = check_stream(PROGRAMS["ties"], base, models, BF16, F32)
    pieces = [(Piece.flat(0, 3000), view_of(base), [view_of(x) for x in models], view_of(base))]
    run_stream(cpu, PROGRAMS["ties"], pieces, F32, None)
    assert same_bits(base, expected)


def test_flush_to_zero_of_the_caller_has_no_effect() -> None:
    models = [values("subnormal", 3000, F32, m) for m in range(3)]
    expected = torch.empty(3000)
    pieces = [(Piece.flat(0, 3000), None, [view_of(x) for x in models], view_of(expected))]
    run_stream(reference, PROGRAMS["linear"], pieces, F32, None)
    assert int((expected != 0).sum()) > 1000
    out = torch.empty(3000)
    assert torch.set_flush_denormal(True)
    try:
        run_stream(cpu, PROGRAMS["linear"], [(*pieces[0][:3], view_of(out))], F32, None)
    finally:
        torch.set_flush_denormal(False)
    assert same_bits(out, expected)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shape": (9,), "strides": (1,)}, "has 9 elements, its piece 10"),
        ({"strides": (1, 1)}, "one stride for each dimension"),
        ({"ptr": 3}, "not aligned to its dtype"),
        ({"ptr": 0}, "null address"),
        ({"dtype": None}, "dtype that is not computed with"),
    ],
)
def test_views_are_checked(change: dict[str, object], words: str) -> None:
    from dataclasses import replace

    from mergekernels.tensors import dtype_of

    x = torch.zeros(10)
    if "dtype" in change:
        change = {"dtype": dtype_of("int32")}
    bad = replace(view_of(x), **change)
    assert isinstance(bad, TensorView)
    with pytest.raises(ValueError, match=words):
        cpu.stream(
            Program((1.0,), (None,), base=False),
            Piece.flat(0, 10),
            None,
            [bad],
            view_of(torch.zeros(10)),
            compute=F32,
            stats=None,
            threads=1,
        )


@pytest.mark.parametrize("ties", ["hash", "index"])
def test_the_point_itself_is_kept_and_the_next_is_not(ties: str) -> None:
    """All elements tie, and the point is the word and index of one of them, or one index below."""
    n, at, seed, tensor = 700, 300, 11, 5
    x = values("constant", n, F32, 0)
    word = _cpu.philox(seed, tensor, 2, at, 1)[0] if ties == "hash" else 0
    for index, kept in ((at, 1.0), (at - 1, 0.0)):
        keep = Keep(0x3F000000, ties, word, index)  # type: ignore[arg-type]
        program = Program((-2.0,), (keep,), base=False, seed=seed, tensor=tensor)
        result = check_stream(program, None, [x], F32, F32)
        assert float(result[at]) == kept


def tree(sums: list[float]) -> float:
    """The tree of the specification, level by level."""
    while len(sums) > 1:
        pairs = [a + b for a, b in zip(sums[0::2], sums[1::2], strict=False)]
        sums = pairs + sums[len(pairs) * 2 :]
    return sums[0] if sums else 0.0


@pytest.mark.parametrize("n", [0, 1, 2, 3, 5, 7, 8, 13, 100])
def test_blocks_add_up_in_a_tree(n: int) -> None:
    rng = random.Random(n)
    sums = [rng.random() * 10.0 ** rng.randrange(-8, 8) for _ in range(n)]
    data = torch.tensor(sums, dtype=torch.float64).numpy()
    assert _cpu.block_tree(data) == tree(sums)
    stats = _cpu.StreamStats(2, n)
    stats.set_blocks(1, 0, data)
    assert (stats.sum_squares(0), stats.sum_squares(1)) == (0.0, tree(sums))
