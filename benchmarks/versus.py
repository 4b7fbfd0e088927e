"""The yardstick of ops over matrices: ours and a peer in turn, the result asserted, beside the measured matrix rate."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

rows: list[dict[str, Any]] = []


@lru_cache(maxsize=4)
def matrix_rate(dtype: torch.dtype, size: int = 2048) -> float:
    """Multiplications and additions per second of torch's own product of two square matrices, best of 5."""
    x = torch.randn(size, size, dtype=dtype)
    best = min(_timed(lambda: x @ x)[0] for _ in range(5))
    return 2 * size**3 / best


def _timed(run: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    result = run()
    return time.perf_counter() - begin, result


class Versus:
    """Runs two functions in turn under pytest-benchmark and notes both times, the error, and the share of the rate.

    Five times, and twice where a peer takes more than three seconds; medians count.
    """

    def __init__(self, benchmark: Any, quick: bool) -> None:
        self.benchmark = benchmark
        self.rounds = 2 if quick else 5
        self.quick = quick

    def __call__(
        self,
        op: str,
        case: str,
        ours: Callable[[], Any],
        peers: dict[str, Callable[[], Any]],
        error: Callable[[Any, Any], float],
        bound: float,
        flops: float = 0.0,
        parts: int = 1,
    ) -> None:
        """One row per peer.

        op, case : what is measured, on what. ours, peers : no arguments; each must compute all of its result. error :
        distance of our result from a peer's, asserted to be at most `bound`. flops : float32 operations that our
        algorithm has to do, for its share of the measured matrix rate (0: not stated). parts : the peers do one of so
        many equal parts of our work; their times are multiplied by it.
        """
        mine = ours()
        errors, slowest = {}, 0.0
        for name, peer in peers.items():
            taken, theirs_result = _timed(peer)
            slowest = max(slowest, taken)
            errors[name] = error(mine, theirs_result)
            del theirs_result
            assert errors[name] <= bound, f"{op} {case}: {errors[name]:.2e} from {name}, promised {bound:.0e}"
        del mine
        theirs: dict[str, list[float]] = {name: [] for name in peers}

        def in_turn() -> None:
            for name, peer in peers.items():
                theirs[name].append(parts * _timed(peer)[0])

        self.benchmark.pedantic(ours, setup=in_turn, rounds=min(self.rounds, 2 if slowest > 3.0 else 5), iterations=1)
        seconds = self.benchmark.stats.stats.median
        for name, times in theirs.items():
            row = {
                "op": op,
                "case": case,
                "peer": name,
                "median_ms": round(1e3 * seconds, 2),
                "peer_ms": round(1e3 * statistics.median(times), 2),
                "times_faster": round(statistics.median(times) / seconds, 2),
                "error": float(f"{errors[name]:.2e}"),
            }
            if flops:
                row["percent_of_matrix_rate"] = round(100 * flops / seconds / matrix_rate(torch.float32), 1)
            rows.append(row)
        self.benchmark.extra_info.update(rows[-1])


def key(row: dict[str, Any]) -> tuple[str, str, str]:
    """What a row measures: one with the same key takes its place in the results."""
    return row["op"], row["case"], row["peer"]


def line(row: dict[str, Any]) -> str:
    """A row as the terminal shows it."""
    share = f"  {row['percent_of_matrix_rate']:5.1f} % of the matrix rate" if "percent_of_matrix_rate" in row else ""
    return (
        f"{row['op']:16} {row['case']:28} {row['median_ms']:10.2f} ms  {row['peer']:24} {row['peer_ms']:10.2f} ms  "
        f"{row['times_faster']:7.2f}x  error {row['error']:.1e}{share}"
    )
