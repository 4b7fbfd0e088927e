"""Cases for the GPU backends: programs and sweeps with nasty values, and statistics that record what is reported."""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mergekernels._backends import reference
from mergekernels._backends.reference.common import delta, keys, load, tie_words
from mergekernels._native import to_torch, torch_dtype, view_of
from mergekernels.ops.keep import KEEP_NOTHING, MAX_KEY, Keep
from mergekernels.ops.program import Program
from mergekernels.ops.sweeps import NUM_BINS, Interval, Sweep, bin_shift
from mergekernels.tensors import BF16, F16, F32, F64, DType, Piece, TensorView, compute_dtype

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPES = (BF16, F16, F32, F64)
SEED = 0x9E3779B97F4A7C15
TENSOR = 0xDEADBEEF


@dataclass
class RecordedStream:
    """Takes what a backend adds to StreamStats, for comparison."""

    num_models: int
    num_blocks: int
    kept: list[int] = field(default_factory=list)
    counts: tuple[int, int, int] = (0, 0, 0)
    bad: dict[int, tuple[int, int]] = field(default_factory=dict)
    sums: dict[int, tuple[int, list[bytes]]] = field(default_factory=dict)

    def add(self, kept: list[int], conflicts: int, positive: int, negative: int) -> None:
        assert not self.kept
        self.kept = list(kept)
        self.counts = (conflicts, positive, negative)

    def add_nonfinite(self, source: int, first: int, count: int) -> None:
        assert source not in self.bad
        self.bad[source] = (first, count)

    def set_blocks(self, model: int, first_block: int, sums: Any) -> None:
        assert memoryview(sums).format == "d"
        # The sign of a NaN sum is the machine's affair.
        self.sums[model] = (first_block, [struct.pack("d", v if v == v else math.nan) for v in sums])


@dataclass
class RecordedSweep:
    """Takes what a backend adds to SweepStats; entries beyond the capacity become a histogram, as natively."""

    sweep: Sweep
    capacity: int
    found: dict[int, tuple[int, int]] = field(default_factory=dict)
    entries: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    bins: dict[int, list[int]] = field(default_factory=dict)
    bad: dict[int, tuple[int, int]] = field(default_factory=dict)

    def inside(self, model: int) -> int:
        return self.found.get(model, (0, 0))[1]

    def overflowed(self, model: int) -> bool:
        return model in self.bins

    def add(self, model: int, before: int, ordinals: Any, indices: Any) -> None:
        assert model not in self.found
        pairs = sorted(zip(ordinals, indices, strict=True))
        self.found[model] = (before, len(pairs))
        if len(pairs) <= self.capacity:
            self.entries[model] = pairs
            return
        interval = self.sweep.intervals[model]
        assert interval is not None
        counts = [0] * NUM_BINS
        for ordinal, _ in pairs:
            counts[(ordinal - interval.lo) >> bin_shift(interval.lo, interval.hi)] += 1
        self.bins[model] = counts

    def add_histogram(self, model: int, before: int, bins: Any) -> None:
        assert model not in self.found
        self.bins[model] = list(bins)
        self.found[model] = (before, sum(bins))
        assert self.found[model][1] > self.capacity

    def add_nonfinite(self, source: int, first: int, count: int) -> None:
        assert source not in self.bad
        self.bad[source] = (first, count)


def values(n: int, dtype: DType, seed: int, kind: str) -> torch.Tensor:
    """Values: "weights" looks like a network, "ties" has few distinct values, "nasty" every special value there is."""
    rng = torch.Generator().manual_seed(seed)
    t = torch_dtype(dtype)
    if kind == "ties":
        return (torch.randint(-2, 3, (n,), generator=rng).double() * 0.25).to(t)
    x = (torch.randn(n, generator=rng, dtype=torch.float64) * 0.02).to(t)
    if kind == "nasty" and n:
        bits = BITS[dtype.itemsize]
        info = torch.iinfo(bits)
        random_bits = torch.randint(info.min, info.max, (n,), generator=rng, dtype=bits)
        tiny = torch.finfo(t)
        special = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), tiny.max, tiny.min, tiny.tiny, -tiny.tiny]
        special += [tiny.smallest_normal / 2, 1.0, -1.0]
        table = torch.tensor(special, dtype=torch.float64).to(t)
        choice = torch.randint(0, 4, (n,), generator=rng)
        picks = table[torch.randint(0, len(special), (n,), generator=rng)]
        x = torch.where(choice == 0, picks, torch.where(choice == 1, random_bits.view(t), x))
    return x


def inputs(
    n: int, dtype: DType, num_models: int, kind: str, seed: int = 0, *, base: bool = True
) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """A base and models that are near it (so that deltas are small and tie), of n elements."""
    x0 = values(n, dtype, seed, kind)
    models = []
    for m in range(num_models):
        x = values(n, dtype, seed + 1 + m, kind)
        if kind == "weights":
            x = (x0.double() + 0.01 * x.double()).to(x0.dtype)
        models.append(x)
    return (x0 if base else None), models


def tau_of(x: torch.Tensor, x0: torch.Tensor | None, compute: DType, density: float) -> int:
    """A key near the given density, one that occurs."""
    d = delta(load(view_of(x), compute), None if x0 is None else load(view_of(x0), compute))
    ordered = keys(d).sort(descending=True).values
    return int(ordered[min(len(ordered) - 1, int(density * len(ordered)))])


def a_keep(rng: random.Random, x: torch.Tensor, x0: torch.Tensor | None, compute: DType, n: int) -> Keep | None:
    """A random point for one model, with a key that occurs and a cut among its ties."""
    kind = rng.choice(["hash", "hash", "index", "all", "none", None, "nothing"])
    if kind is None:
        return None
    if kind == "nothing":
        return KEEP_NOTHING
    tau = tau_of(x, x0, compute, rng.choice([0.0, 0.05, 0.3, 0.5, 0.99]))
    return Keep(tau, kind, rng.getrandbits(32), rng.randrange(-1, n))


def bits(x: torch.Tensor) -> torch.Tensor:
    """The bit patterns of a tensor, on the host."""
    return x.cpu().view(BITS[x.element_size()])


def on(device: str, x: torch.Tensor | None, cast: DType | None = None) -> TensorView | None:
    """A view of x on a device."""
    if x is None:
        return None
    view = view_of(x if device == "cpu" else x.to(device))
    return TensorView(view.ptr, view.shape, view.strides, view.dtype, view.owner, cast, view.device)


def check_stream(
    backend: Any,
    device: str,
    program: Program,
    base: torch.Tensor | None,
    models: Sequence[torch.Tensor],
    out_dtype: DType,
    *,
    piece: Piece | None = None,
    casts: Sequence[DType | None] | None = None,
    norms: bool = True,
    stats: bool = True,
) -> torch.Tensor:
    """Runs `stream` by the backend and by the reference and compares every bit of output and statistics."""
    n = models[0].numel()
    piece = piece or Piece.flat(0, n)
    casts = casts or [None] * (len(models) + 1)
    compute = compute_dtype([v.dtype for v in map(view_of, [*models, *([base] if base is not None else [])])])
    results, records = [], []
    for run, where in ((reference.stream, "cpu"), (backend.stream, device)):
        # Guard bands on both sides: the output is the middle of a larger tensor.
        shape = tuple(models[0].shape)
        guard = torch.full((n + 64,), 7.0, dtype=torch_dtype(out_dtype), device=where)
        out = guard[32 : 32 + n].view(shape)
        out.fill_(float("nan"))
        record = RecordedStream(len(models), -(-n // 4096) if norms else 0) if stats else None
        views = [on(where, x, c) for x, c in zip([base, *models], casts, strict=True)]
        before = [None if v is None else bits(to_torch(v)).clone() for v in views]
        run(program, piece, views[0], views[1:], view_of(out), compute=compute, stats=record, threads=1)
        for v, b in zip(views, before, strict=True):
            assert v is None or b is None or torch.equal(bits(to_torch(v)), b), "an input was changed"
        assert (guard[:32] == 7).all() and (guard[32 + n :] == 7).all(), "written outside the output"
        results.append(out.cpu())
        records.append(record)
    expected, got = results
    differ = (bits(expected) != bits(got)).reshape(-1).nonzero().reshape(-1)
    assert differ.numel() == 0, (
        f"{differ.numel()} of {n} elements differ, first at {int(differ[0])}: "
        f"{expected.reshape(-1)[differ[0]]} != {got.reshape(-1)[differ[0]]}"
    )
    assert n == 0 or records[0] == records[1]
    return got


def check_sweep(
    backend: Any,
    device: str,
    request: Sweep,
    base: torch.Tensor | None,
    models: Sequence[torch.Tensor],
    *,
    capacity: int = 1 << 20,
    piece: Piece | None = None,
    offset: int = 0,
    casts: Sequence[DType | None] | None = None,
) -> RecordedSweep:
    """Runs `sweep` by the backend and by the reference and compares counts, entries, bins and non-finite values."""
    n = models[0].numel()
    piece = piece or Piece.flat(0, n)
    casts = casts or [None] * (len(models) + 1)
    compute = compute_dtype([v.dtype for v in map(view_of, [*models, *([base] if base is not None else [])])])
    records = []
    for run, where in ((reference.sweep, "cpu"), (backend.sweep, device)):
        record = RecordedSweep(request, capacity)
        views = [on(where, x, c) for x, c in zip([base, *models], casts, strict=True)]
        run(request, record, piece, views[0], views[1:], compute=compute, tensor=TENSOR, offset=offset, threads=1)
        records.append(record)
    assert n == 0 or records[0] == records[1]
    return records[1]


def programs() -> Iterator[tuple[str, dict[str, Any]]]:
    """The fields of programs other than weights and keep, by name."""
    yield "linear", {}
    yield "linear_mean", {"divisor": "value", "divisor_value": 3.7}
    yield "task_arithmetic", {"scale": 0.3}
    yield "ties", {"vote": "weighted", "divisor": "agreeing_weights", "scale": 1.1}
    yield "ties_count", {"vote": "weighted", "divisor": "agreeing_count", "zero_vote": -1}
    yield "ties_sum", {"vote": "weighted", "zero_vote": 0, "scale": 0.7}
    yield "agreeing_nobody", {"vote": "weighted", "divisor": "agreeing_weights", "zero_vote": 0}
    yield "ties_value", {"vote": "weighted", "divisor": "value", "divisor_value": 3.0}


def key_interval(x: torch.Tensor, x0: torch.Tensor | None, compute: DType, high: float, low: float) -> Interval:
    """The interval of keys between two densities, high < low."""
    return Interval("key", max(1, tau_of(x, x0, compute, low)), max(1, tau_of(x, x0, compute, high)))


def whole_interval(compute: DType) -> Interval:
    """All keys but zero."""
    return Interval("key", 1, MAX_KEY[compute.name])


def words_of(x: torch.Tensor, model: int) -> torch.Tensor:
    """The tie words of a flat tensor that begins at index 0."""
    return tie_words(SEED, TENSOR, model, torch.arange(x.numel()))
