"""Cases of counting passes, with their check against the reference."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch

from feature_programs import (
    KINDS,
    MIXES,
    Setting,
    balances,
    row_table,
    setting,
)
from feature_shared import (
    FAR,
    Cut,
    parts_of,
    sizes_up_to,
    view_on,
)
from mergekernels import _cpu
from mergekernels._backends import reference
from mergekernels._backends.reference.common import flat_index, keys
from mergekernels._backends.reference.rules import balance, importance, variance
from mergekernels._native import view_of
from mergekernels.ops.keep import MAX_KEY
from mergekernels.ops.program import Balance, Table
from mergekernels.ops.selection import Selection
from mergekernels.ops.sweeps import Interval, Key, Sweep
from mergekernels.tensors import F16, DType, Piece, compute_dtype


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
    found, mixes, sizes = [], list(MIXES), sizes_up_to(largest)
    keys_: tuple[Key, ...] = ("delta", "variance", "importance", "balance", "drawn")
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
            draws = tuple(rng.choice((0, 1 << 31, 3 << 30, 1 << 32)) for _ in range(s.num_models))
            draws = draws if key == "drawn" else ()
            seed = rng.getrandbits(64)
            request = Sweep(tuple(intervals), order, s.base is not None, seed, key, rows, rules, draws)
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
    for part in parts_of(piece, 1, cut, 1):
        first = (part.g0 - piece.g0) // piece.ld * piece.cols if piece.rows > 1 else part.g0 - piece.g0
        span = slice(first, first + part.numel)
        shape = (part.rows, part.cols) if piece.rows > 1 else (part.numel,)
        views = [view_on(x[span].view(shape), device, False, c) for x, c in zip(case.models, casts[1:], strict=False)]
        base = None if case.base is None else view_on(case.base[span].view(shape), device, False, casts[0])
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
