"""`sweep` of the cpu backend against the reference: counts, entries, histograms, tie words and non-finite inputs."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest
import torch

from cpu_cases import DTYPES, ISAS, KINDS, misaligned, new_sweep_stats, sweep_facts, values
from mergekernels import _cpu
from mergekernels._backends import cpu, reference
from mergekernels._backends.reference.common import keys
from mergekernels._native import torch_dtype, view_of
from mergekernels.ops.keep import MAX_KEY
from mergekernels.ops.sweeps import Interval, Sweep, bin_shift
from mergekernels.tensors import BF16, F32, F64, DType, Piece


@pytest.fixture(autouse=True, params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("MERGEKERNELS_CPU_ISA", request.param)
    yield request.param


def run(
    backend: object,
    request: Sweep,
    pieces: list[tuple[Piece, torch.Tensor | None, list[torch.Tensor | None]]],
    compute: DType,
    capacity: int,
    *,
    tensor: int = 5,
    offset: int = 0,
    threads: int = 1,
) -> _cpu.SweepStats:
    stats = new_sweep_stats(request, capacity)
    for piece, base, models in pieces:
        backend.sweep(  # type: ignore[attr-defined]
            request,
            stats,
            piece,
            None if base is None else view_of(base),
            [None if x is None else view_of(x) for x in models],
            compute=compute,
            tensor=tensor,
            offset=offset,
            threads=threads,
        )
    return stats


def random_interval(rng: random.Random, d: torch.Tensor, order: str, n: int) -> Interval | None:
    """An interval around the keys of a delta, or around the tie ordinals of one of its keys."""
    if rng.random() < 0.1:
        return None
    k = keys(d)
    pick = int(k[rng.randrange(k.numel())]) if k.numel() else 5
    if rng.random() < 0.6:
        lo = max(1, pick - rng.choice((0, 1, 1000, 10**9)))
        top = MAX_KEY["F64" if d.dtype == torch.float64 else "F32"]
        return Interval("key", lo, min(top, max(lo, pick + rng.choice((0, 1, 1000, 10**9, 2**62)))))
    last = n - 1 if order == "index" else 2**32 - 1
    lo = rng.choice((0, rng.randrange(max(last, 0) + 1)))
    return Interval("tie", lo, rng.randrange(lo, max(last, lo) + 1), pick)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_random_intervals_over_all_values(dtype: str, kind: str) -> None:
    d = DTYPES[dtype]
    compute = F64 if d is F64 else F32
    c = torch_dtype(compute)
    rng = random.Random(f"sweep {dtype} {kind}")
    for case, n in enumerate((0, 1, 255, 256, 257, 4095, 4096, 4097, 9001)):
        models: list[torch.Tensor | None] = [values(kind, n, d, 10 * case + m) for m in range(rng.choice((1, 3, 6)))]
        base = values(rng.choice((kind, "normal")), n, d, 999 + case) if rng.random() < 0.8 else None
        order = rng.choice(("hash", "index"))
        x0 = 0 if base is None else base.to(c)
        intervals = tuple(random_interval(rng, x.to(c) - x0, order, n) for x in models if x is not None)
        if len(models) > 1 and rng.random() < 0.3:
            models[1] = None
        seed = rng.randrange(2**64)
        request = Sweep(intervals, order, base is not None, seed)  # type: ignore[arg-type]
        capacity = rng.choice((0, 10, 10**6))
        pieces = [(Piece.flat(0, n), base, models)]
        expected = sweep_facts(run(reference, request, pieces, compute, capacity), request)
        threads = rng.choice((1, 2, 3, 8))
        assert sweep_facts(run(cpu, request, pieces, compute, capacity, threads=threads), request) == expected


@pytest.mark.parametrize("order", ["hash", "index"])
@pytest.mark.parametrize("stage", ["key", "tie"])
def test_cuts_threads_and_strides_change_nothing(stage: str, order: str) -> None:
    rng = random.Random(f"{stage}{order}")
    rows, cols = 61, 307
    n = rows * cols
    whole = [values("ties", n, BF16, m).reshape(rows, cols) for m in range(3)]
    whole[2][60, 5] = float("inf")
    base = values("zeros", n, BF16, 9).reshape(rows, cols)
    base[11, 0] = float("nan")
    tau = int(keys(torch.tensor([0.25]))[0])
    top = 1000 + n - 1 if order == "index" else 2**31
    interval = Interval("key", tau, tau) if stage == "key" else Interval("tie", 2000, top, tau)
    request = Sweep((interval,) * 3, order, True, 77)  # type: ignore[arg-type]
    everything: list[tuple[Piece, torch.Tensor | None, list[torch.Tensor | None]]]
    everything = [(Piece.flat(0, n), base, [*whole])]
    expected = sweep_facts(run(reference, request, everything, F32, 10**6, offset=1000), request)
    for _ in range(6):
        r = sorted({0, rows, *(rng.randrange(rows) for _ in range(3))})
        c = sorted({0, cols, *(rng.randrange(cols) for _ in range(3))})
        pieces: list[tuple[Piece, torch.Tensor | None, list[torch.Tensor | None]]] = []
        for (r0, r1), (c0, c1) in itertools.product(itertools.pairwise(r), itertools.pairwise(c)):
            box = [x[r0:r1, c0:c1] for x in (*whole, base)]
            box = [misaligned(x.contiguous()) if rng.random() < 0.5 else x for x in box]
            pieces.append((Piece(r0 * cols + c0, r1 - r0, c1 - c0, cols), box[-1], [*box[:-1]]))
        rng.shuffle(pieces)
        for capacity in (10**6, 50):
            stats = run(cpu, request, pieces, F32, capacity, offset=1000, threads=rng.choice((1, 3)))
            facts = sweep_facts(stats, request)
            if capacity == 50:
                assert stats.overflowed(0)
                assert [[*x[:2], x[3]] for x in facts[4:]] == [[*x[:2], x[3]] for x in expected[4:]]  # type: ignore[index]
                assert facts[:4] == expected[:4]
            else:
                assert facts == expected


def test_many_elements_in_many_threads() -> None:
    n = 1_500_001
    models: list[torch.Tensor | None] = [values("normal", n, BF16, m) for m in range(2)]
    request = Sweep((Interval("key", 0x3C000000, 0x3D000000),) * 2, "hash", False, 3)
    expected = run(reference, request, [(Piece.flat(0, n), None, models)], F32, 10**7)
    for threads in (1, 2, 8):
        stats = run(cpu, request, [(Piece.flat(0, n), None, models)], F32, 10**7, threads=threads)
        for m in range(2):
            inside = expected.inside(m)
            assert (stats.before(m), stats.inside(m)) == (expected.before(m), inside)
            ranks = [1, inside // 3, inside // 2, inside]
            assert stats.order_statistics(m, ranks) == expected.order_statistics(m, ranks)
            assert stats.histogram(m) == expected.histogram(m)


def test_scope_indices_beyond_32_bits() -> None:
    x: list[torch.Tensor | None] = [values("constant", 700, F32, 0)]
    tau = int(keys(torch.tensor([0.5]))[0])
    piece = Piece.flat(2**33 + 1, 700)
    for order in ("hash", "index"):
        request = Sweep((Interval("tie", 0, 2**36, tau),), order, False, 1)  # type: ignore[arg-type]
        got = [
            sweep_facts(run(b, request, [(piece, None, x)], F32, 1000, offset=2**34), request) for b in (reference, cpu)
        ]
        assert got[0] == got[1]


def test_statistics_merge_and_travel() -> None:
    a, b = (values("normal", 5000, F32, m) for m in range(2))
    b[17] = float("nan")
    request = Sweep((Interval("key", 0x3C000000, 0x3D000000),), "hash", False, 3)
    parts = [(Piece.flat(0, 5000), None, [a]), (Piece.flat(5000, 5000), None, [b])]
    for capacity in (10**6, 3000, 10):
        both = sweep_facts(run(cpu, request, parts, F32, capacity), request)  # type: ignore[arg-type]
        one, two = (run(cpu, request, [p], F32, capacity) for p in parts)  # type: ignore[list-item]
        one = _cpu.SweepStats.load(one.dump())
        one.merge(_cpu.SweepStats.load(two.dump()))
        assert sweep_facts(one, request) == both
        assert sweep_facts(_cpu.SweepStats.load(one.dump()), request) == both


def test_truncated_and_foreign_bytes_are_refused() -> None:
    request = Sweep((Interval("key", 1, 2),), "hash", False, 3)
    data = new_sweep_stats(request, 10).dump()
    for bad in (b"", data[:-1], data + b"x", b"MKother1" + data[8:], data[:8] + b"\xff" * (len(data) - 8)):
        with pytest.raises(ValueError, match=r"not dumped statistics|needs a stage|tie order|capacity|1 to 64"):
            _cpu.SweepStats.load(bad)


def test_unlike_statistics_do_not_merge() -> None:
    a = new_sweep_stats(Sweep((Interval("key", 1, 2),)), 10)
    b = new_sweep_stats(Sweep((Interval("key", 1, 3),)), 10)
    with pytest.raises(ValueError, match="different sweeps"):
        a.merge(b)
    with pytest.raises(ValueError, match="themselves"):
        a.merge(a)


@pytest.mark.parametrize("width", [0, 1, 4094, 4095, 4096, 8191, 8192, 2**31, 2**62])
def test_bins_match_the_host(width: int) -> None:
    lo, hi = 7, 7 + width
    stats = _cpu.SweepStats([1], [lo], [hi], [0], 0, 0)
    ordinals = torch.tensor([lo, lo + width // 2, hi], dtype=torch.int64).numpy().view("uint64")
    stats.add(0, 0, ordinals, ordinals)
    counts = [0] * 4096
    for o in (lo, lo + width // 2, hi):
        counts[(o - lo) >> bin_shift(lo, hi)] += 1
    assert stats.overflowed(0)
    assert stats.histogram(0) == counts
