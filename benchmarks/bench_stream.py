"""`stream`: the fused elementwise pass of three methods, three models and a base.

Bytes: every stream is read once and the output written once. Beside it: the same arithmetic in eager torch, float32
between loading and the final cast.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from yardsticks import Family

from mergekernels.ops.keep import Keep
from mergekernels.ops.program import Program
from mergekernels.ops.select import select
from mergekernels.ops.stream import stream
from mergekernels.tensors import tensor_id

NAME = "model.layers.0.mlp.up_proj.weight"
DENSITY = 0.2
WEIGHTS = (0.5, 0.3, 0.2)


def _linear(family: Family, points: list[Keep]) -> tuple[Program, Callable[[], torch.Tensor]]:
    def eager() -> torch.Tensor:
        total = torch.zeros_like(family.base, dtype=torch.float32)
        for weight, model in zip(WEIGHTS, family.models, strict=True):
            total += weight * model.float()
        return (total / sum(WEIGHTS)).to(family.base.dtype)

    program = Program(WEIGHTS, (None,) * 3, base=False, divisor="value", divisor_value=sum(WEIGHTS))
    return program, eager


def _task_arithmetic(family: Family, points: list[Keep]) -> tuple[Program, Callable[[], torch.Tensor]]:
    def eager() -> torch.Tensor:
        base = family.base.float()
        total = torch.zeros_like(base)
        for weight, model in zip(WEIGHTS, family.models, strict=True):
            total += weight * (model.float() - base)
        return (base + 0.7 * total).to(family.base.dtype)

    return Program(WEIGHTS, (None,) * 3, scale=0.7), eager


def _ties(family: Family, points: list[Keep]) -> tuple[Program, Callable[[], torch.Tensor]]:
    thresholds = [torch.tensor(point.tau, dtype=torch.int32).view(torch.float32) for point in points]

    def eager() -> torch.Tensor:
        base = family.base.float()
        weighted = []
        for weight, model, threshold in zip(WEIGHTS, family.models, thresholds, strict=True):
            delta = model.float() - base
            weighted.append(weight * torch.where(delta.abs() >= threshold, delta, 0.0))
        sign = torch.where(weighted[0] + weighted[1] + weighted[2] >= 0, 1.0, -1.0)
        total, divisor = torch.zeros_like(base), torch.zeros_like(base)
        for weight, term in zip(WEIGHTS, weighted, strict=True):
            agrees = term * sign > 0
            total += torch.where(agrees, term, 0.0)
            divisor += weight * agrees
        divisor[divisor == 0] = 1
        return (base + total / divisor).to(family.base.dtype)

    keep = tuple(points)
    return Program(WEIGHTS, keep, vote="weighted", divisor="agreeing_weights", tensor=tensor_id(NAME)), eager


@pytest.mark.parametrize("method", [_linear, _task_arithmetic, _ties], ids=["linear", "task_arithmetic", "ties"])
def test_stream(method: Any, family: Family, record: Any, threads: int, request: pytest.FixtureRequest) -> None:
    k = int(DENSITY * family.base.numel())
    points = select(family.models, k, base=family.base, name=NAME, threads=threads) if method is _ties else []
    program, eager = method(family, points)
    streams = family.streams if program.base else family.models
    base = family.base if program.base else None
    out = torch.empty_like(family.base)
    stream(family.models, program, base=base, out=out, name=NAME, threads=threads)
    small = family.prefix()
    expected = stream(small.models, program, base=small.base if program.base else None, name=NAME, backend="reference")
    assert torch.equal(out[: small.base.numel()], expected)
    # Eager torch keeps all ties and leaves multiplication and division in other hands: close, not equal.
    difference = (eager().float() - out.float()).abs()
    assert float((difference > 0).float().mean()) < 0.02
    record(
        f"stream {request.node.callspec.id.split('-')[-1]}",
        streams,
        out,
        lambda: stream(family.models, program, base=base, out=out, name=NAME, threads=threads),
        eager,
    )
