"""Tensor ops on a GPU, beside tensor operations of torch on the same GPU in the same run.

    python benchmarks/bench_gpu_tensor.py --out results.json

cp_als: 50 sweeps of cores that are there, one start each. "chip": cores of 8 adapters x 224 modules, in one launch.
"fleet": 100 adapters of rank 16 x 224 modules at 64 terms, whose cores of 1600 x 1600 take the batched route; its
target is 3 s.
mttkrp: the three modes, by the CUDA module, by Triton, and by torch in float32. Results are compared before timing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from bench_gpu import milliseconds

from mergekernels._backends import _tensor, _triton_mttkrp, cuda_small
from mergekernels.ops.tensor import _als, _fused
from mergekernels.ops.tensor._sweeps import Batch
from mergekernels.ops.tensor.mttkrp import _by_triton
from mergekernels.ops.tensor.stack import Stack
from mergekernels.ops.tensor.tasks import Tasks

SWEEPS = 50
CHIP = ((8, 8, 16), (8, 16, 16), (8, 16, 32))
"""Adapters, rank, terms."""

PRODUCTS = ((1, 4096, 4096, 100, 16, 64), (224, 1024, 1024, 8, 8, 16))
"""Modules, rows, columns, adapters, rank, columns of the factors."""


def cores(modules: int, adapters: int, rank: int) -> Batch:
    """Cores of updates that share half of their terms, triangular as those of a QR would be."""
    draw = torch.Generator("cuda").manual_seed(adapters * rank)
    side = adapters * rank
    sides = []
    for _ in range(2):
        shared = torch.randn(modules, side, rank // 2, generator=draw, device="cuda", dtype=torch.float64)
        own = torch.randn(modules, side, adapters, rank, generator=draw, device="cuda", dtype=torch.float64)
        own[..., : rank // 2] = shared[:, :, None] * (0.5 + torch.rand(adapters, 1, generator=draw, device="cuda"))
        sides.append(own.flatten(2) / side**0.5)
    tasks = Tasks((rank,) * adapters)
    norm2 = torch.zeros(modules, device="cuda", dtype=torch.float64)
    for i in range(modules):  # one by one, for the sake of memory
        norm2[i] = (sides[0][i] * tasks.within(sides[0][i], sides[1][i])).sum()
    return Batch(sides[0], sides[1], tasks, norm2)


def start(batch: Batch, terms: int) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator("cuda").manual_seed(3)
    modules, side = batch.b.shape[:2]
    u, v = (torch.randn(modules, 1, side, terms, generator=draw, device="cuda", dtype=torch.float64) for _ in range(2))
    return torch.zeros(modules, 1, len(batch.tasks), terms, device="cuda", dtype=torch.float64), u, v


def chip(modules: int) -> dict[str, Any]:
    """Cores that fit: one launch, beside the batched route."""
    found: dict[str, Any] = {}
    options = _als.Options(SWEEPS, 0.0, 0.0, 1e-6, False)
    for adapters, rank, terms in CHIP:
        batch = cores(modules, adapters, rank)
        given = start(batch, terms)
        c, u, v = given
        side = adapters * rank
        far = _tensor.room((adapters, side, side, side, terms), 0)
        if far is None:
            print(f"cp_als {adapters} x {rank}, {terms} terms: does not fit on this chip")
            continue
        ours, theirs = _fused.run(batch, c, u, v, options), _als.run(batch, c, u, v, options)
        apart = max(
            abs(x - y) for o, t in zip(ours, theirs, strict=True) for x, y in zip(o.history, t.history, strict=True)
        )
        assert apart <= 1e-9, f"histories differ by {apart}"
        mine = milliseconds(lambda b=batch, g=given: _fused.run(b, *g, options), repeats=5)
        peer = milliseconds(lambda b=batch, g=given: _als.run(b, *g, options), repeats=3)
        ratio = peer["median_ms"] / mine["median_ms"]
        name = f"cp_als {adapters} x rank {rank}, {terms} terms, {modules} modules"
        print(f"{name:48} {mine['median_ms']:9.2f} ms  batched {peer['median_ms']:9.2f} ms  {ratio:6.2f} x")
        found[name] = {"ours": mine, "batched": peer, "times_faster": ratio, "cores_in_global_memory": far}
    return found


def fleet(modules: int, adapters: int = 100, rank: int = 16, terms: int = 64) -> dict[str, Any]:
    """Cores that do not fit: the batched route, as many modules at once as `cp_als` would take."""
    side = adapters * rank
    each = 8 * 2 * side * (side + 6 * terms) + 8 * 6 * side * terms
    together = max(1, min(modules, torch.cuda.mem_get_info()[0] // 8 // each))
    batch = cores(together, adapters, rank)
    given = start(batch, terms)
    options = _als.Options(SWEEPS, 0.0, 0.0, 1e-6, False)
    _als.run(batch, *given, _als.Options(2, 0.0, 0.0, 1e-6, False))
    torch.cuda.synchronize()
    seconds, done, history = 0.0, 0, []
    while done < modules:
        count = min(together, modules - done)
        part = batch.of(torch.arange(count, device="cuda")) if count < together else batch
        begin = time.perf_counter()
        history = _als.run(part, *(x[:count] for x in given), options)[0].history
        torch.cuda.synchronize()
        seconds += time.perf_counter() - begin
        done += count
    assert all(later <= before + 1e-9 for before, later in itertools.pairwise(history)), "the error rose"
    flops = 4.0 * side * terms * 2 * side * SWEEPS * modules
    print(f"cp_als {adapters} adapters x {modules} modules, {terms} terms, {SWEEPS} sweeps: {seconds:.2f} s")
    return {"seconds": seconds, "modules_together": together, "tflops": flops / seconds / 1e12, "target_seconds": 3.0}


def products() -> dict[str, Any]:
    """mttkrp of one large and of many small modules."""
    found: dict[str, Any] = {}
    draw = torch.Generator("cuda").manual_seed(9)
    for modules, m, n, adapters, rank, width in PRODUCTS:
        ranks = (rank,) * adapters
        stacks = []
        for _ in range(modules):
            b, at = (torch.randn(s, rank * adapters, generator=draw, device="cuda") for s in (m, n))
            factors = [
                torch.randn(s, width, generator=draw, device="cuda", dtype=torch.float64) for s in (adapters, m, n)
            ]
            stacks.append((b, at, ranks, factors))
        single = [(Stack(b, at, ranks, torch.float32), [f.float() for f in fs]) for b, at, _, fs in stacks]
        tasks = Tasks(ranks)

        def by_torch(mode: int, single: Any = single, tasks: Any = tasks) -> list[torch.Tensor]:
            results = []
            for stack, (c, u, v) in single:
                if mode == 0:
                    results.append(tasks.total((stack.at.mT @ v) * (stack.b.mT @ u)))
                elif mode == 1:
                    results.append(stack.b @ ((stack.at.mT @ v) * tasks.rows(c)))
                else:
                    results.append(stack.at @ ((stack.b.mT @ u) * tasks.rows(c)))
            return results

        for mode in range(3):
            ours = _tensor.mttkrp(stacks, mode, width)
            plain = by_torch(mode)
            assert all(float((x - y).norm() / x.norm()) <= 1e-5 for x, y in zip(ours, plain, strict=True)), "wrong"
            row: dict[str, Any] = {
                "cuda": milliseconds(lambda s=stacks, k=mode, w=width: _tensor.mttkrp(s, k, w), repeats=5),
                "torch": milliseconds(lambda k=mode, f=by_torch: f(k), repeats=5),
            }
            if _triton_mttkrp.serves(stacks[0][0]):
                row["triton"] = milliseconds(
                    lambda s=stacks, k=mode: [_by_triton(*x[:3], x[3], k) for x in s], repeats=5
                )
            name = f"mttkrp {modules} x ({m}, {n}), {adapters} x rank {rank}, {width} columns, mode {mode}"
            print(name, {k: round(v["median_ms"], 3) for k, v in row.items()})
            found[name] = row
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--modules", type=int, default=224)
    arguments = parser.parse_args()
    reason = cuda_small.why_not(torch.device("cuda:0"))
    if reason is not None:
        print(reason, file=sys.stderr)
        return 3
    torch.backends.cuda.matmul.allow_tf32 = False
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "sweeps": SWEEPS,
    }
    # Written after every part, so that a limit on the time takes only what is not there yet.
    parts = {"fleet": lambda: fleet(arguments.modules), "chip": lambda: chip(arguments.modules), "products": products}
    for name, part in parts.items():
        results[name] = part()
        torch.cuda.empty_cache()
        arguments.out.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
