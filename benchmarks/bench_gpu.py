"""TIES on a GPU: stream, select and the whole merge of one 4096 x 14336 matrix, three models and a base, bfloat16.

    python benchmarks/bench_gpu.py --out results.json

Each backend's result is compared with the reference's, bit for bit, before it is timed. Beside it: TIES in eager torch
on the same GPU, and the bandwidth of a plain copy measured in the same run. Bytes are the least that must move: every
input once, the output once. Learned coefficients and masks over the same matrix follow, see bench_gpu_learned.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from bench_gpu_learned import Learned

import mergekernels as mk
from mergekernels._backends.dispatch import load
from mergekernels._native import view_of
from mergekernels.errors import MergeError
from mergekernels.ops import Program, select, stream
from mergekernels.tensors import tensor_id

SHAPE = (4096, 14336)
NAME = "model.layers.0.mlp.up_proj.weight"
DENSITY = 0.2
WEIGHTS = (0.5, 0.3, 0.2)


def milliseconds(call: Callable[[], Any], repeats: int = 20) -> dict[str, float]:
    """Wall time of a call with the device idle before and after: median, 20th and 80th percentile."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    times.sort()
    return {
        "median_ms": statistics.median(times),
        "p20_ms": times[len(times) // 5],
        "p80_ms": times[len(times) * 4 // 5],
    }


def inputs() -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A base with deviation 0.02 and fine-tunes that differ by about 0.001, as in the other benchmarks."""
    draw = torch.Generator("cuda").manual_seed(7)
    n = SHAPE[0] * SHAPE[1]
    base = (0.02 * torch.randn(n, generator=draw, device="cuda")).bfloat16()
    models = []
    for _ in range(3):
        noise = torch.randn(n, generator=draw, device="cuda")
        noise *= (torch.randn(n, generator=draw, device="cuda").abs() + 1) * 0.001
        models.append((base.float() + noise).bfloat16().view(SHAPE))
    return base.view(SHAPE), models


def eager_ties(base: torch.Tensor, models: list[torch.Tensor]) -> torch.Tensor:
    """TIES as one writes it in torch: top-k by magnitude, sign of the weighted sum, mean over those that agree."""
    x0 = base.float()
    weighted = []
    for weight, model in zip(WEIGHTS, models, strict=True):
        delta = (model.float() - x0).flatten()
        kept = delta.abs().topk(int(DENSITY * delta.numel()), sorted=False).indices
        sparse = torch.zeros_like(delta)
        sparse[kept] = delta[kept]
        weighted.append(weight * sparse.view(SHAPE))
    sign = torch.where(sum(weighted) >= 0, 1.0, -1.0)
    total, divisor = torch.zeros_like(x0), torch.zeros_like(x0)
    for weight, term in zip(WEIGHTS, weighted, strict=True):
        agrees = term * sign > 0
        total += torch.where(agrees, term, 0.0)
        divisor += weight * agrees
    divisor[divisor == 0] = 1
    return (x0 + total / divisor).bfloat16()


def copy_bandwidth() -> float:
    """Bytes read plus written per second by a copy of 1 GiB, in GB/s."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / milliseconds(lambda: target.copy_(source))["median_ms"] / 1e6


def measure(
    backend: str, base: torch.Tensor, models: list[torch.Tensor], expected: dict[str, Any], bandwidth: float
) -> dict[str, Any]:
    """Correctness, then times, of one backend."""
    n = base.numel()
    k = int(DENSITY * n)

    def points() -> Any:
        return select(models, k, base=base, name=NAME, backend=backend, nan="propagate")

    def one_pass() -> torch.Tensor:
        return stream(models, expected["program"], base=base, out=out, name=NAME, backend=backend, nan="propagate")

    def whole() -> torch.Tensor:
        merged = mk.merge(models, "ties", base=base, weights=WEIGHTS, density=DENSITY, name=NAME, backend=backend)
        assert isinstance(merged, torch.Tensor)
        return merged

    out = torch.empty_like(base)
    assert points() == expected["points"], f"{backend}: select differs from the reference"
    same = one_pass().view(torch.int16).cpu()
    assert torch.equal(same, expected["stream"]), f"{backend}: stream differs from the reference"
    assert torch.equal(whole().view(torch.int16).cpu(), expected["merge"]), (
        f"{backend}: merge differs from the reference"
    )
    moved = {"stream": 5 * base.nbytes, "select": 4 * base.nbytes, "merge": 5 * base.nbytes}
    result: dict[str, Any] = {}
    for name, call in (("stream", one_pass), ("select", points), ("merge", whole)):
        timing = milliseconds(call)
        rate = moved[name] / timing["median_ms"] / 1e6
        result[name] = {
            **timing,
            "least_bytes": moved[name],
            "gb_per_s": rate,
            "percent_of_copy": 100 * rate / bandwidth,
        }
        print(f"{backend:8} {name:7} {timing['median_ms']:9.3f} ms  {rate:7.0f} GB/s  {100 * rate / bandwidth:5.1f} %")
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU is visible to torch", file=sys.stderr)
        return 3
    base, models = inputs()
    host = base.cpu(), [m.cpu() for m in models]
    k = int(DENSITY * base.numel())
    # The reference would sort for minutes: the cpu backend, which is tested against it, finds the points.
    points = select(host[1], k, base=host[0], name=NAME, backend="cpu", nan="propagate")
    program = Program(
        WEIGHTS, tuple(points), vote="weighted", divisor="agreeing_weights", tensor=tensor_id(NAME), scale=1.0
    )
    expected = {
        "points": points,
        "program": program,
        "stream": stream(host[1], program, base=host[0], name=NAME, backend="reference").view(torch.int16),
        "merge": mk.merge(
            host[1], "ties", base=host[0], weights=WEIGHTS, density=DENSITY, name=NAME, backend="cpu"
        ).view(torch.int16),
    }
    bandwidth = copy_bandwidth()
    print(f"copy {bandwidth:.0f} GB/s")
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "shape": SHAPE,
        "copy_gb_per_s": bandwidth,
        "not_run": {},
        "backends": {},
    }
    eager = milliseconds(lambda: eager_ties(base, models), repeats=5)
    results["eager_torch"] = {"merge": eager}
    print(f"eager    merge   {eager['median_ms']:9.3f} ms")
    learned = Learned(base, models)
    eager = milliseconds(learned.eager, repeats=5)
    results["eager_torch"]["concrete and its backward"] = eager
    print(f"eager    concrete and its backward {eager['median_ms']:9.3f} ms")
    failed = False
    for name in ("triton", "cuda"):
        reason = load(name).why_not("stream", [view_of(base)])
        if reason is not None:
            results["not_run"][name] = reason
            print(f"{name}: {reason}")
            continue
        try:
            results["backends"][name] = measure(name, base, models, expected, bandwidth)
            results["backends"][name] |= learned.measure(name, bandwidth, milliseconds)
        except (AssertionError, MergeError, RuntimeError) as error:
            results["not_run"][name] = f"failed: {error}"
            print(f"{name} failed: {error}", file=sys.stderr)
            failed = True
    arguments.out.write_text(json.dumps(results, indent=2) + "\n")
    return 1 if failed or not results["backends"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
