"""Data and yardsticks of the op benchmarks: a family of tensors, the bandwidth of a plain read, the recorder."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

PREFIX = 1 << 18
records: list[dict[str, Any]] = []


@dataclass(frozen=True)
class Family:
    """A base and three fine-tunes of it, each one tensor; `streams` are all four."""

    base: torch.Tensor
    models: list[torch.Tensor]

    @property
    def streams(self) -> list[torch.Tensor]:
        return [self.base, *self.models]

    def prefix(self, count: int = PREFIX) -> Family:
        """The first `count` elements of every stream, for comparison with the reference."""
        return Family(self.base[:count], [m[:count] for m in self.models])


def read_bandwidth(streams: list[torch.Tensor], repeat: int = 5) -> float:
    """Bytes per second of a plain read of the streams: the fastest of several reductions of torch, best run."""
    reductions: list[Callable[[torch.Tensor], object]] = [
        lambda t: t.view(torch.int64).sum(),
        lambda t: t.view(torch.int32).max(),
        lambda t: t.view(torch.float32).max(),
    ]
    best = float("inf")
    for reduction in reductions:
        for _ in range(repeat):
            begin = time.perf_counter()
            for stream in streams:
                reduction(stream)
            best = min(best, time.perf_counter() - begin)
    return sum(s.nbytes for s in streams) / best


class Recorder:
    """Runs a function under pytest-benchmark and notes bytes, bandwidth and rival beside the time."""

    def __init__(self, benchmark: Any, quick: bool) -> None:
        self.benchmark = benchmark
        self.rounds = 3 if quick else 7

    def __call__(
        self,
        op: str,
        streams: list[torch.Tensor],
        out: torch.Tensor | None,
        run: Callable[[], object],
        eager: Callable[[], object] | None,
    ) -> float:
        """Times `run`, which reads `streams` and writes `out`, then `eager` (if any) beside it, best of 2; seconds."""
        peak = read_bandwidth(streams)
        nbytes = sum(s.nbytes for s in streams) + (0 if out is None else out.nbytes)
        numel = streams[0].numel()
        self.benchmark.pedantic(run, rounds=self.rounds, warmup_rounds=1, iterations=1)
        seconds = self.benchmark.stats.stats.median
        peak = max(peak, read_bandwidth(streams))
        entry: dict[str, Any] = {
            "op": op,
            "dtype": str(streams[0].dtype).removeprefix("torch."),
            "elements": numel,
            "streams": len(streams),
            "median_ms": round(1e3 * seconds, 3),
            "ns_per_element": round(1e9 * seconds / numel, 4),
            "bytes": nbytes,
            "gb_per_s": round(nbytes / seconds / 1e9, 2),
            "plain_read_gb_per_s": round(peak / 1e9, 2),
            "percent_of_plain_read": round(100 * nbytes / seconds / peak, 1),
        }
        if eager is not None:
            rival = min(_timed(eager) for _ in range(2))
            entry["torch_eager_ms"] = round(1e3 * rival, 3)
            entry["times_faster_than_eager"] = round(rival / seconds, 1)
        self.benchmark.extra_info.update(entry)
        records.append(entry)
        return seconds


def _timed(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin
