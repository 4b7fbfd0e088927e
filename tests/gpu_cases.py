"""The tests that every GPU backend must pass, on a device or emulated; a test module imports them and gives `target`.

target : fixture with (backend module, device).
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from gpu_matrix import (
    DTYPES,
    SEED,
    TENSOR,
    RecordedSweep,
    a_keep,
    bits,
    check_stream,
    check_sweep,
    inputs,
    key_interval,
    on,
    programs,
    tau_of,
    values,
    whole_interval,
    words_of,
)
from mergekernels import _cpu
from mergekernels._backends import reference
from mergekernels._backends.reference.common import delta
from mergekernels._backends.reference.select import select_point
from mergekernels._native import torch_dtype, view_of
from mergekernels.ops.keep import Keep
from mergekernels.ops.program import Program
from mergekernels.ops.selection import Scope, Selection
from mergekernels.ops.sweeps import NUM_BINS, Interval, Sweep
from mergekernels.tensors import BF16, F16, F32, F64, DType, Piece, compute_dtype
from rounding_oracle import ONCE, doubles, rounded_tensor

PROGRAMS = dict(programs())
KINDS = ("weights", "ties", "nasty")


def by_name(value: Any) -> str | None:
    return value.name if isinstance(value, DType) else None


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=by_name)
def test_stream_programs(target: Any, dtype: DType, name: str) -> None:
    case = list(PROGRAMS).index(name) * 4 + DTYPES.index(dtype)
    rng = random.Random(case)
    n = 4096 + 777
    x0, models = inputs(n, dtype, 3, KINDS[case % 3], seed=case)
    keep = tuple(a_keep(rng, x, x0, compute_dtype([dtype]), n) for x in models)
    program = Program((0.7, -1.3, 0.6), keep, seed=SEED, tensor=TENSOR, **PROGRAMS[name])
    check_stream(*target, program, x0, models, DTYPES[(case // 3) % 4])


@pytest.mark.parametrize("n", [0, 1, 255, 256, 257, 4095, 4096, 4097])
def test_stream_sizes(target: Any, n: int) -> None:
    x0, models = inputs(n, BF16, 2, "ties", seed=n)
    keep = tuple(Keep(0x3F000000, "hash", 1 << 31, 0) for _ in models)
    check_stream(*target, Program((1.0, 0.5), keep, seed=SEED, tensor=TENSOR, **PROGRAMS["ties"]), x0, models, BF16)


def test_stream_of_a_scalar(target: Any) -> None:
    x0, models = torch.tensor(1.5), [torch.tensor(2.5), torch.tensor(0.25)]
    out = check_stream(*target, Program((1.0, 2.0), (None, None)), x0, models, F32)
    assert out.shape == () and out.item() == 1.5 + 1.0 * 1.0 + 2.0 * -1.25


@pytest.mark.parametrize("num_models", [1, 2, 5, 64])
def test_stream_numbers_of_models(target: Any, num_models: int) -> None:
    n = 300
    x0, models = inputs(n, BF16, num_models, "ties", seed=num_models)
    keep = tuple(Keep(0x3F000000, "hash" if m % 16 == 0 else "all", m << 26, n // 2) for m in range(num_models))
    weights = tuple(1.0 - 0.1 * m for m in range(num_models))
    check_stream(*target, Program(weights, keep, seed=1, tensor=2, **PROGRAMS["ties_count"]), x0, models, F32)


@pytest.mark.parametrize("seed", [0, 1, 2**63, 2**64 - 1])
@pytest.mark.parametrize(
    "piece",
    [
        Piece(0, 1, 700, 700),
        Piece(2**33 + 4096, 1, 700, 700),
        Piece(2**31 - 3, 1, 700, 700),
        Piece(3, 7, 100, 100),
        Piece(2**32 + 5, 7, 100, 12345),
    ],
    ids=["flat", "far", "across-2^31", "rows", "columns"],
)
def test_stream_pieces(target: Any, piece: Piece, seed: int) -> None:
    """Ties are cut by word and by index wherever the piece lies."""
    x0, models = inputs(piece.numel, BF16, 2, "ties", seed=5)
    middle = piece.g0 + (piece.rows // 2) * piece.ld + piece.cols // 2
    keep = (Keep(0x3E800000, "hash", 1 << 31, middle), Keep(0x3F000000, "index", 0, middle))
    program = Program((1.0, 1.0), keep, seed=seed, tensor=0xFFFFFFFF)
    check_stream(*target, program, x0, models, F32, piece=piece, norms=False)


def test_stream_keeps_exactly_the_tied_words_up_to_the_cut(target: Any) -> None:
    """Not only equal to the reference: the words are those of Philox, the cut is at (word, index)."""
    backend, device = target
    n = 64
    ones = torch.ones(n)
    words = words_of(ones, 0)
    cut = int(words.sort().values[9])
    index = int((words == cut).nonzero()[0])
    for last, kept in ((index, 10), (index - 1, 9)):
        keep = (Keep(0x3F800000, "hash", cut, last),)
        out = check_stream(backend, device, Program((1.0,), keep, seed=SEED, tensor=TENSOR), None, [ones], F32)
        assert int(out.sum()) == kept
        assert torch.equal(out == 1, (words < cut) | ((words == cut) & (torch.arange(n) <= last)))


@pytest.mark.parametrize("dtype", DTYPES, ids=by_name)
@pytest.mark.parametrize(
    ("out", "scale", "cast"),
    [(None, 1.0, None), (None, 1.0, "same"), (None, -0.5, None), (BF16, 1.0, None), (F32, 1.0, F16), (F16, 3.0, None)],
)
def test_stream_copy(target: Any, dtype: DType, out: DType | None, scale: float, cast: Any) -> None:
    (x,) = inputs(700, dtype, 1, "nasty", seed=3, base=False)[1]
    casts = [None, dtype if cast == "same" else cast]
    program = Program((1.0,), (None,), base=False, copy=True, scale=scale)
    result = check_stream(*target, program, None, [x], out or dtype, casts=casts)
    if out is None and scale == 1.0:
        assert torch.equal(bits(result), bits(x)), "a copy changed bits, of a NaN perhaps"


def test_stream_copy_beside_a_base_of_another_dtype(target: Any) -> None:
    """The base only takes part in the statistics; the bits of the copy are the input's."""
    (x,) = inputs(300, BF16, 1, "nasty", seed=4, base=False)[1]
    program = Program((1.0,), (None,), copy=True)
    result = check_stream(*target, program, values(300, F32, 5, "nasty"), [x], BF16)
    assert torch.equal(bits(result), bits(x))


@pytest.mark.parametrize("cast", [None, BF16, F16, F32], ids=["mixed", "BF16", "F16", "F32"])
def test_stream_casts_and_mixed_dtypes(target: Any, cast: DType | None) -> None:
    n = 600
    models = [values(n, d, 10 + d.code, "nasty") for d in (F16, F32, BF16)]
    x0 = values(n, BF16, 9, "weights")
    keep = (None, Keep(0x3C000000, "all"), Keep(0x3C000000, "none"))
    program = Program((1.0, 0.3, -1.0), keep, **PROGRAMS["ties"])
    check_stream(*target, program, x0, models, F32, casts=[cast] * 4)
    doubles = [*models[:2], values(n, F64, 1, "nasty")]
    check_stream(*target, program, x0, doubles, BF16, casts=[cast] * 4)


def test_stream_strided_views(target: Any) -> None:
    """A transposed base, a model with gaps, an output that is a column slice."""
    backend, device = target
    rows, cols = 30, 41
    rng = torch.Generator().manual_seed(0)
    x0 = torch.randn(cols, rows, generator=rng).t()
    gaps = torch.randn(rows, 3 * cols, generator=rng)[:, ::3]
    results = []
    for run, where in ((reference.stream, "cpu"), (backend.stream, device)):
        whole = torch.full((rows, cols + 5), 7.0, device=where)
        out = whole[:, 2 : 2 + cols]
        program = Program((0.5,), (None,))
        views = [on(where, x) for x in (x0, gaps)]
        run(
            program,
            Piece.flat(0, rows * cols),
            views[0],
            views[1:],
            view_of(out),
            compute=F32,
            stats=None,
            threads=1,
        )
        assert (whole[:, :2] == 7).all() and (whole[:, 2 + cols :] == 7).all()
        results.append(whole.cpu())
    assert torch.equal(*results)
    assert torch.equal(results[0][:, 2 : 2 + cols], x0 + 0.5 * (gaps - x0))


@pytest.mark.parametrize("dtype", DTYPES, ids=by_name)
def test_stream_pointers_aligned_to_the_dtype_only(target: Any, dtype: DType) -> None:
    backend, device = target
    n = 4096 + 100
    x0, models = inputs(n + 1, dtype, 2, "weights", seed=8)
    assert x0 is not None
    program = Program((1.0, 1.0), (None, None), divisor="value", divisor_value=2.0)
    results = []
    for run, where in ((reference.stream, "cpu"), (backend.stream, device)):
        # One element beyond an aligned address.
        views = [view_of(x.to(where)[1:]) for x in (x0, *models)]
        out = torch.empty(n + 1, dtype=x0.dtype, device=where)[1:]
        run(
            program,
            Piece.flat(0, n),
            views[0],
            views[1:],
            view_of(out),
            compute=compute_dtype([dtype]),
            stats=None,
            threads=1,
        )
        results.append(bits(out))
    assert torch.equal(*results)


def test_stream_in_place(target: Any) -> None:
    """The output may be exactly one of the inputs."""
    backend, device = target
    n = 4096 + 50
    x0, models = inputs(n, BF16, 2, "weights", seed=1)
    assert x0 is not None
    program = Program((0.5, 0.5), (None, None))
    expected = check_stream(backend, device, program, x0, models, BF16)
    for place in range(3):
        tensors = [x.clone().to(device) for x in (x0, *models)]
        views = [view_of(t) for t in tensors]
        backend.stream(program, Piece.flat(0, n), views[0], views[1:], views[place], compute=F32, stats=None, threads=1)
        assert torch.equal(bits(tensors[place]), bits(expected))


def test_stream_statistics_alone(target: Any) -> None:
    """Without an output the counts are the same, and without either nothing is done."""
    backend, device = target
    x0, models = inputs(5000, F32, 2, "nasty", seed=2)
    views = [on(device, x) for x in (x0, *models)]
    program = Program((1.0, -1.0), (Keep(0x3A000000, "all"), None))
    stats = _cpu.StreamStats(2, 2), _cpu.StreamStats(2, 2)
    piece = Piece.flat(0, 5000)
    backend.stream(program, piece, views[0], views[1:], None, compute=F32, stats=stats[0], threads=1)
    host = [view_of(x) for x in (x0, *models) if x is not None]
    reference.stream(program, piece, host[0], host[1:], None, compute=F32, stats=stats[1], threads=1)
    for name in ("conflicts", "votes"):
        assert getattr(stats[0], name)() == getattr(stats[1], name)()
    assert [stats[0].kept(m) for m in range(2)] == [stats[1].kept(m) for m in range(2)]
    assert [stats[0].nonfinite(s) for s in range(4)] == [stats[1].nonfinite(s) for s in range(4)]
    assert stats[0].nonfinite(3) == (-1, 0) and stats[0].nonfinite(0)[1] > 0
    backend.stream(program, piece, views[0], views[1:], None, compute=F32, stats=None, threads=1)


@pytest.mark.parametrize("order", ["hash", "index"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=by_name)
def test_sweep(target: Any, dtype: DType, kind: str, order: Any) -> None:
    """Keys and ties, entries and bins, models left out."""
    n = 4096 + 500
    compute = compute_dtype([dtype])
    x0, models = inputs(n, dtype, 4, kind, seed=DTYPES.index(dtype) * 3)
    last = n + 2 if order == "index" else 2**32 - 1
    tie = Interval("tie", last // 8, last // 2, tau_of(models[2], x0, compute, 0.4))
    intervals = (key_interval(models[0], x0, compute, 0.1, 0.3), whole_interval(compute), tie, None)
    for capacity in (n, 3):
        found = check_sweep(*target, Sweep(intervals, order, True, SEED), x0, models, capacity=capacity, offset=3)
        assert 3 not in found.found
        assert (1 in found.bins) == (capacity == 3)


def test_sweep_without_base_and_of_keys_only(target: Any) -> None:
    for dtype in DTYPES:
        compute = compute_dtype([dtype])
        _, models = inputs(1000, dtype, 2, "weights", seed=2, base=False)
        intervals = (key_interval(models[0], None, compute, 0.2, 0.4), key_interval(models[1], None, compute, 0.5, 0.5))
        check_sweep(*target, Sweep(intervals, "hash", False, SEED), None, models)


@pytest.mark.parametrize("n", [0, 1, 255, 256, 257, 4096])
def test_sweep_sizes(target: Any, n: int) -> None:
    x0, models = inputs(n, BF16, 1, "ties", seed=n)
    check_sweep(*target, Sweep((whole_interval(F32),), "hash", True, SEED), x0, models)


@pytest.mark.parametrize("order", ["hash", "index"])
def test_sweep_pieces(target: Any, order: Any) -> None:
    for piece in (Piece(2**33, 1, 700, 700), Piece(2**32 + 5, 7, 100, 12345)):
        x0, models = inputs(piece.numel, BF16, 1, "ties", seed=5)
        last = piece.g0 + piece.rows * piece.ld + 10**10
        tie = Interval("tie", 0, last if order == "index" else 2**31, 0x3F000000)
        found = check_sweep(*target, Sweep((tie,), order, True, SEED), x0, models, piece=piece, offset=10**10)
        assert found.entries[0]


def test_sweep_of_an_interval_with_one_key(target: Any) -> None:
    x0, models = inputs(2000, BF16, 1, "ties", seed=5)
    found: RecordedSweep = check_sweep(
        *target, Sweep((Interval("key", 0x3F000000, 0x3F000000),)), x0, models, capacity=4
    )
    assert (
        found.bins[0][0] == found.inside(0)
        and sum(found.bins[0]) == found.bins[0][0]
        and len(found.bins[0]) == NUM_BINS
    )


def test_sweep_casts_and_mixed_dtypes(target: Any) -> None:
    models = [values(600, d, 10 + d.code, "nasty") for d in (F16, F32, BF16)]
    x0 = values(600, BF16, 9, "weights")
    intervals = tuple(Interval("key", 0x3A000000, 0x3F000000) for _ in models)
    for cast in (None, BF16, F16):
        check_sweep(*target, Sweep(intervals, "hash", True, SEED), x0, models, casts=[cast] * 4)


@pytest.mark.parametrize("policy", ["hash", "index", "all"])
def test_selection_ends_at_the_point_that_sorting_gives(target: Any, policy: Any) -> None:
    """Sweeps through the native statistics, with room for few entries, so that intervals must be narrowed."""
    backend, device = target
    n = 5000
    x0, models = inputs(n, BF16, 2, "ties", seed=7)
    models[0] = inputs(n, BF16, 1, "weights", seed=7)[1][0]
    ks = (1000, 2345)
    scope = Scope((0,), (TENSOR,), n, "F32")
    selection = Selection.start(ks, scope, policy=policy, seed=SEED, base=True)
    views = [on(device, x) for x in (x0, *models)]
    passes = 0
    while not selection.done:
        sweep = selection.sweep
        stage = {"key": 1, "tie": 2}
        bounds = [(0, 0, 0, 0) if i is None else (stage[i.stage], i.lo, i.hi, i.tau) for i in sweep.intervals]
        stats = _cpu.SweepStats(*map(list, zip(*bounds, strict=True)), 0 if sweep.order == "hash" else 1, 900)
        for first, count in ((0, 4096), (4096, n - 4096)):
            parts = [view_of(v.owner[first : first + count]) for v in views if v is not None]
            backend.sweep(
                sweep,
                stats,
                Piece.flat(first, count),
                parts[0],
                parts[1:],
                compute=F32,
                tensor=TENSOR,
                offset=0,
                threads=1,
            )
        selection = selection.advance(stats, n)
        passes += 1
        assert passes < 10
    for m, (x, k) in enumerate(zip(models, ks, strict=True)):
        assert x0 is not None
        point = selection.points[m]
        assert point is not None
        expected = select_point(delta(x.float(), x0.float()), k, policy, SEED, TENSOR, m)
        tied = point.ties in ("hash", "index")
        assert point.tau == expected.tau
        if tied:
            assert point == expected


def test_backend_says_why_not(target: Any) -> None:
    backend, device = target
    view = view_of(torch.zeros(4, device=device))
    assert backend.why_not("stream", [view]) is None
    assert backend.why_not("select", [view]) is None
    assert "no kernel for gram" in backend.why_not("gram", [view])
    integers = view_of(torch.zeros(4, dtype=torch.int64, device=device))
    assert "int64" in backend.why_not("stream", [integers])
    elsewhere = view_of(torch.zeros(4, device="meta"))
    assert "different devices" in backend.why_not("stream", [view, elsewhere])


def test_out_dtypes_round_to_nearest_even(target: Any) -> None:
    """Every exponent, halves between two neighbours, overflow to infinity."""
    exponents = torch.arange(0, 256, dtype=torch.int64)[:, None] << 23
    tails = [0x0, 0x1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x18000, 0xFFF, 0x1000, 0x1001, 0x3000, 0x7FFFFF, 0x7FE000]
    x = (exponents | torch.tensor(tails)[None, :]).to(torch.int32).reshape(-1)
    x = torch.cat([x, x | torch.iinfo(torch.int32).min]).view(torch.float32)
    for dtype in (BF16, F16, F32):
        out = check_stream(*target, Program((1.0,), (None,), base=False), None, [x], dtype, stats=False)
        whole = x + 0.0
        expected = whole.to(torch_dtype(dtype))
        assert torch.equal(out.isnan(), x.isnan())
        assert torch.equal(out[~x.isnan()], expected[~x.isnan()])


@pytest.mark.parametrize("dtype", [BF16, F16], ids=by_name)
def test_float64_is_rounded_once_to_16_bits(target: Any, dtype: DType) -> None:
    """Results and load casts against exact fractions."""
    xs = [x for t, x, _ in ONCE if t is dtype] + doubles(dtype)
    exact = rounded_tensor(xs, dtype)
    x = torch.tensor(xs, dtype=torch.float64)
    copy = Program((1.0,), (None,), base=False, copy=True)
    assert torch.equal(bits(check_stream(*target, copy, None, [x], dtype)), bits(exact))
    loaded = check_stream(*target, copy, None, [x], F64, casts=[None, dtype])
    assert torch.equal(bits(loaded)[~x.isnan()], bits(exact.double())[~x.isnan()])
    total = check_stream(
        *target, Program((1.0, 1.0), (None, None), base=False), None, [x, torch.full_like(x, 2.0**-40)], dtype
    )
    assert torch.equal(bits(total), bits(rounded_tensor([v + 2.0**-40 for v in xs], dtype)))
