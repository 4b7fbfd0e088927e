"""Small decompositions and factor tiles on a GPU, beside torch on the same GPU in the same run.

    python benchmarks/bench_gpu_spectral.py --out results.json

small_svd and small_eigh: batches as adapters' cores give them, float64, beside torch.linalg.svd and torch.linalg.eigh
on the stacked batch. Factor tiles: eight products of rank 16 at 4096 x 14336, beside a matrix product each; the bytes
are those of the tiles written. Every result is checked before it is timed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from bench_gpu import copy_bandwidth, milliseconds

from mergekernels._backends import cuda_small
from mergekernels.adapters.model import Factors
from mergekernels.ops import FactorTiles

BATCHES = ((2000, 16, 16), (1000, 32, 32), (264, 64, 64), (132, 128, 64), (132, 128, 128))
BOUND = 1e-13


def graded(count: int, p: int, s: int) -> torch.Tensor:
    """Matrices with singular values from 1 to 1e-6, float64."""
    draw = torch.Generator("cuda").manual_seed(p * s)
    u = torch.linalg.qr(torch.randn(count, p, s, generator=draw, device="cuda", dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(count, s, s, generator=draw, device="cuda", dtype=torch.float64)).Q
    values = torch.logspace(0, -6, s, dtype=torch.float64, device="cuda")
    return u * values @ v.mT


def pair(name: str, ours: Callable[[], Any], theirs: Callable[[], Any], work: dict[str, Any]) -> dict[str, Any]:
    """Times of both, and the ratio."""
    mine, peer = milliseconds(ours, repeats=7), milliseconds(theirs, repeats=5)
    ratio = peer["median_ms"] / mine["median_ms"]
    print(f"{name:32} {mine['median_ms']:9.3f} ms  torch {peer['median_ms']:9.3f} ms  {ratio:6.2f} x")
    return {**work, "ours": mine, "torch": peer, "times_faster": ratio}


def decompositions() -> dict[str, Any]:
    """SVDs and eigenproblems of every batch."""
    found: dict[str, Any] = {}
    for count, p, s in BATCHES:
        m = graded(count, p, s)
        batch = list(m)
        results = cuda_small.small_svd_batch(batch)
        sweeps = [r[3].sweeps for r in results]
        assert min(sweeps) > 0, f"{p} x {s}: no convergence"
        for a, (u, values, vh, _) in zip(batch, results, strict=True):
            assert u is not None and vh is not None
            assert float((u * values @ vh - a).norm() / a.norm()) <= BOUND, f"{p} x {s}: wrong"
        name = f"small_svd {count} x {p} x {s}"
        work = {"count": count, "p": p, "s": s, "most_sweeps": max(sweeps)}
        found[name] = pair(
            name,
            lambda batch=batch: cuda_small.small_svd_batch(batch),
            lambda m=m: torch.linalg.svd(m, full_matrices=False),
            work,
        )
        g = m.mT @ m
        squares = list((g + g.mT) / 2)
        for a, (v, values, info) in zip(squares, cuda_small.small_eigh_batch(squares), strict=True):
            assert info.sweeps > 0 and float((v * values @ v.mT - a).norm() / a.norm()) <= BOUND, f"eigh {s}: wrong"
        name = f"small_eigh {count} x {s}"
        found[name] = pair(
            name, lambda x=squares: cuda_small.small_eigh_batch(x), lambda g=g: torch.linalg.eigh(g), {"count": count}
        )
    return found


def factor_tiles(bandwidth: float) -> dict[str, Any]:
    """Whole products tile by tile: bands of rows, as a pass over them asks for."""
    m, n, rank, models, band = 4096, 14336, 16, 8, 128
    draw = torch.Generator("cuda").manual_seed(1)
    factors = [
        Factors(
            torch.randn(m, rank, generator=draw, device="cuda"), torch.randn(rank, n, generator=draw, device="cuda")
        )
        for _ in range(models)
    ]
    tiles = FactorTiles(factors)
    for f, tile in zip(factors, tiles.tiles((0, band)), strict=True):
        exact = f.b[:band].double() @ f.a.double()
        assert float((tile.double() - exact).norm() / exact.norm()) <= 1e-6, "factor tiles: wrong"

    def ours() -> None:
        for top in range(0, m, band):
            tiles.tiles((top, top + band))

    def theirs() -> None:
        for top in range(0, m, band):
            for f in factors:
                torch.matmul(f.b[top : top + band], f.a)

    moved = 4 * m * n * models
    result = pair("factor tiles 8 x 4096 x 14336", ours, theirs, {"least_bytes": moved, "one_launch": tiles.at_once})
    # A copy reads what it writes; here nearly everything is written.
    result["percent_of_copy"] = 100 * moved / result["ours"]["median_ms"] / 1e6 / bandwidth
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    reason = cuda_small.why_not(torch.device("cuda:0"))
    if reason is not None:
        print(reason, file=sys.stderr)
        return 3
    torch.backends.cuda.matmul.allow_tf32 = False
    bandwidth = copy_bandwidth()
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "copy_gb_per_s": bandwidth,
        "shared_memory_bytes": cuda_small.launches.native().jacobi_limit(0),
        "decompositions": decompositions(),
        "factor_tiles": factor_tiles(bandwidth),
    }
    arguments.out.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
