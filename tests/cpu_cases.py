"""Inputs for the tests of the CPU backend, and the comparison with the reference, bit for bit."""

from __future__ import annotations

import random
import struct

import pytest
import torch

from mergekernels import _cpu
from mergekernels._backends import cpu, reference
from mergekernels._native import torch_dtype, view_of
from mergekernels.ops.keep import Keep
from mergekernels.ops.program import Program
from mergekernels.ops.sweeps import Sweep
from mergekernels.tensors import BF16, CANONICAL_BLOCK, F16, F32, F64, DType, Piece, TensorView

# For fixtures. The golden digests hold every instruction set to the same bits; in the long suites the best one runs
# always, the others with the slow tests.
ISAS = [pytest.param(name, marks=[pytest.mark.slow] if i else []) for i, name in enumerate(_cpu.isas())]
DTYPES = {"bf16": BF16, "fp16": F16, "fp32": F32, "fp64": F64}
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
GUARD = 64


def values(kind: str, n: int, dtype: DType, seed: int) -> torch.Tensor:
    """A flat tensor of one kind of values."""
    gen = torch.Generator().manual_seed(seed)
    normal = torch.randn(n, generator=gen, dtype=torch.float64)
    t = torch_dtype(dtype)
    if kind == "normal":
        return (normal * 0.02).to(t)
    if kind == "ties":
        return (torch.randint(-3, 4, (n,), generator=gen) * 0.25).to(t)
    if kind == "constant":
        return torch.full((n,), -0.5, dtype=t)
    if kind == "zeros":
        return torch.where(normal > 0, 0.0, -0.0).to(t)
    if kind == "subnormal":
        tiny = torch.finfo(t).smallest_normal
        return (normal * tiny * 0.3).to(t)
    if kind == "huge":
        return (torch.rand(n, generator=gen, dtype=torch.float64) - 0.5).to(t) * torch.finfo(t).max * 1.9
    if kind == "bits":
        width = 8 * dtype.itemsize
        raw = torch.randint(-(2 ** (width - 1)), 2 ** (width - 1) - 1, (n,), generator=gen, dtype=torch.int64)
        return raw.to(BITS[dtype.itemsize]).view(t)
    assert kind == "nonfinite"
    x = normal.to(t)
    for v in (float("nan"), float("inf"), -float("inf")):
        x[torch.rand(n, generator=gen) < 0.02] = v
    return x


KINDS = ("normal", "ties", "constant", "zeros", "subnormal", "huge", "bits", "nonfinite")


def guarded(shape: tuple[int, ...], dtype: DType) -> tuple[torch.Tensor, torch.Tensor]:
    """(memory, an uninitialised-looking tensor in its middle): every byte around it is a guard."""
    n = 1
    for size in shape:
        n *= size
    memory = torch.full(((n * dtype.itemsize + 2 * GUARD * dtype.itemsize),), 0xA5, dtype=torch.uint8)
    inner = memory[GUARD * dtype.itemsize :][: n * dtype.itemsize].view(torch_dtype(dtype)).reshape(shape)
    return memory, inner


def guards_intact(memory: torch.Tensor, itemsize: int) -> bool:
    """Whether the bytes around the tensor of `guarded` are untouched."""
    band = GUARD * itemsize
    return bool((memory[:band] == 0xA5).all() and (memory[-band:] == 0xA5).all())


def misaligned(x: torch.Tensor) -> torch.Tensor:
    """A copy of a contiguous tensor whose address is aligned to its dtype and to nothing more."""
    memory = torch.empty(x.numel() + 9, dtype=x.dtype)
    start = 1 if (memory.data_ptr() // x.element_size()) % 2 == 0 else 2
    y = memory[start:][: x.numel()].reshape(x.shape)
    y.copy_(x)
    return y


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equality of the bytes."""
    kind = BITS[a.element_size()]
    return torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


def stream_facts(stats: _cpu.StreamStats) -> dict[str, object]:
    """All that a StreamStats holds, comparable by ==."""
    models = range(stats.num_models)
    sums = [stats.sum_squares(m) for m in models]
    return {
        "kept": [stats.kept(m) for m in models],
        "conflicts": stats.conflicts(),
        "votes": stats.votes(),
        "nonfinite": [stats.nonfinite(s) for s in range(stats.num_models + 2)],
        "squares": ["nan" if s != s else struct.pack("<d", s) for s in sums],
    }


def num_blocks(n: int) -> int:
    """Canonical blocks of a tensor of n elements."""
    return -(-n // CANONICAL_BLOCK)


def run_stream(
    backend: object,
    program: Program,
    pieces: list[tuple[Piece, TensorView | None, list[TensorView], TensorView | None]],
    compute: DType,
    blocks: int | None,
    threads: int = 1,
) -> _cpu.StreamStats | None:
    """One program over the pieces of a tensor; the statistics, None if `blocks` is None."""
    stats = None if blocks is None else _cpu.StreamStats(len(program.weights), blocks)
    for piece, base, models, out in pieces:
        backend.stream(program, piece, base, models, out, compute=compute, stats=stats, threads=threads)  # type: ignore[attr-defined]
    return stats


def check_stream(
    program: Program,
    base: torch.Tensor | None,
    models: list[torch.Tensor],
    out_dtype: DType,
    compute: DType,
    *,
    casts: list[DType | None] | None = None,
    threads: int = 1,
    piece: Piece | None = None,
    stats: bool = True,
    out_view: bool = False,
) -> torch.Tensor:
    """Runs a program with the cpu backend (instruction set from the environment) and compares all it yields."""
    shape = tuple(models[0].shape)
    n = models[0].numel()
    piece = piece or Piece.flat(0, n)
    flat = piece.rows <= 1 or piece.ld == piece.cols
    blocks = None if not stats else num_blocks(piece.g0 + n) if flat and piece.g0 % CANONICAL_BLOCK == 0 else 0
    tensors = [*models] if base is None else [*models, base]
    casts = casts or [None] * len(tensors)
    views = []
    for x, cast in zip(tensors, casts, strict=True):
        v = view_of(x)
        views.append(TensorView(v.ptr, v.shape, v.strides, v.dtype, v.owner, cast))
    before = [x.clone() for x in tensors]

    results = []
    facts = []
    for backend in (reference, cpu):
        memory, out = guarded((*shape, 2) if out_view else shape, out_dtype)
        target = out[..., 0] if out_view else out
        used = run_stream(
            backend,
            program,
            [(piece, views[-1] if base is not None else None, views[: len(models)], view_of(target))],
            compute,
            blocks,
            threads,
        )
        assert guards_intact(memory, out_dtype.itemsize)
        results.append(out.clone())
        facts.append(None if used is None else stream_facts(used))
    assert all(same_bits(a, b) for a, b in zip(tensors, before, strict=True)), "an input was written"
    assert facts[0] == facts[1]
    assert same_bits(results[0], results[1])
    return results[1]


def random_keep(rng: random.Random, d: torch.Tensor, piece: Piece) -> Keep | None:
    """A point near the values of a delta, so that ties at it happen."""
    if rng.random() < 0.15 or d.numel() == 0:
        return None
    if d.dtype == torch.float64:
        keys = (d.view(torch.int64) & 0x7FFFFFFFFFFFFFFF).clamp_max(0x7FF0000000000001)
    else:
        keys = (d.view(torch.int32).long() & 0x7FFFFFFF).clamp_max(0x7F800001)
    tau = int(keys.reshape(-1)[rng.randrange(d.numel())]) if rng.random() < 0.9 else rng.choice([0, 2**64 - 1])
    ties = rng.choice(("all", "none", "hash", "hash", "index"))
    last = piece.g0 + max(piece.rows - 1, 0) * piece.ld + piece.cols
    return Keep(tau, ties, rng.choice((0, 2**31, rng.randrange(2**32), 2**32 - 1)), rng.randrange(-1, last + 1))


def random_program(rng: random.Random, deltas: list[torch.Tensor], base: bool, piece: Piece) -> Program:
    """Any program for these deltas."""
    n = len(deltas)
    weights = tuple(rng.choice((1.0, -0.7, 0.0, 0.5, 1e-3, rng.gauss(0, 1))) for _ in range(n))
    vote = rng.choice(("none", "weighted", "weighted"))
    divisors = ("none", "value", "agreeing_weights", "agreeing_count")
    return Program(
        weights,
        tuple(random_keep(rng, d, piece) for d in deltas),
        base=base,
        vote=vote,
        zero_vote=rng.choice((-1, 0, 1)),
        divisor=rng.choice(divisors[:2] if vote == "none" else divisors),
        divisor_value=rng.choice((1.0, float(n), -3.0, 0.3)),
        scale=rng.choice((1.0, 1.0, 0.3, -2.0, 0.0)),
        seed=rng.choice((0, 1, 2**64 - 1, rng.randrange(2**64))),
        tensor=rng.randrange(2**32),
    )


def sweep_facts(stats: _cpu.SweepStats, request: Sweep) -> list[object]:
    """All that a SweepStats holds for its models, comparable by ==."""
    facts: list[object] = [stats.nonfinite(s) for s in range(len(request.intervals) + 1)]
    for m, interval in enumerate(request.intervals):
        if interval is None:
            continue
        inside = stats.inside(m)
        entry = [stats.before(m), inside, stats.overflowed(m), stats.histogram(m)]
        if not stats.overflowed(m):
            entry.append(stats.order_statistics(m, list(range(1, inside + 1))))
            if inside and interval.stage == "tie":
                points = [
                    stats.tie_point(m, r, interval.tau, _order(request), request.seed, [0], [0]) for r in (1, inside)
                ]
                entry.append(points)
        facts.append(entry)
    return facts


def _order(request: Sweep) -> int:
    return 1 if request.order == "index" else 0


def new_sweep_stats(request: Sweep, capacity: int) -> _cpu.SweepStats:
    """An accumulator for a request."""
    stage = {"key": 1, "tie": 2}
    i = request.intervals
    return _cpu.SweepStats(
        [0 if x is None else stage[x.stage] for x in i],
        [1 if x is None else x.lo for x in i],
        [1 if x is None else x.hi for x in i],
        [0 if x is None else x.tau for x in i],
        _order(request),
        capacity,
    )
