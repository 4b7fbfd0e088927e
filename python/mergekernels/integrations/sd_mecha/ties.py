"""TIES as sd-mecha has it: trimmed per tensor, signs elected by count or value, optionally a stock factor per row."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ...ops import Keep, Program, select, stream
from .._hooks import NotServed

if TYPE_CHECKING:
    import torch

__all__ = ["elected", "kept_count", "stock_factor", "ties", "wide"]


def ties(models: Sequence[torch.Tensor], k: float, vote_sgn: bool) -> torch.Tensor:
    """The mean of the trimmed deltas that agree with the elected sign; 0 where none is elected.

    models : tensors of one shape that is not empty. k : share that is kept of each. vote_sgn : the sum elects, not the
    number of signs. Returns float32, or float64 for float64 models, as sd-mecha does.
    """
    return stream(models, _program(models, k, vote_sgn), out_dtype=wide(models[0]))


def elected(models: Sequence[torch.Tensor], k: float, vote_sgn: bool, cos_eps: float) -> torch.Tensor:
    """`ties`, each row of it times the stock factor of its rows."""
    import torch

    program = _program(models, k, vote_sgn)
    dtype, count = wide(models[0]), len(models)
    agreeing = []
    for t in range(count):
        alone = replace(program, weights=tuple(float(i == t) for i in range(count)), divisor="none")
        agreeing.append(stream(models, alone, out_dtype=dtype))
    factor = stock_factor(agreeing, cos_eps)
    result = stream(models, program, out_dtype=dtype).mul_(factor)
    return torch.nan_to_num_(result, nan=0, posinf=0, neginf=0)


def stock_factor(deltas: Sequence[torch.Tensor], eps: float) -> torch.Tensor:
    """The factor n c / (1 + (n - 1) c) of each row, [..., 1]: c is the mean cosine of neighbours, row by row.

    Raises :class:`NotServed` for what has no pair or no rows.
    """
    import torch

    n = len(deltas)
    if n < 2 or deltas[0].dim() == 0:
        raise NotServed("a stock factor of one model or of numbers")
    norms = [torch.linalg.vector_norm(d, dim=-1).clamp_(min=eps) for d in deltas]
    pairs = [torch.linalg.vecdot(deltas[i], deltas[i + 1]) / (norms[i] * norms[i + 1]) for i in range(n - 1)]
    c = pairs[0] if n == 2 else torch.stack(pairs).mean(0)
    return (n * c / (1 + (n - 1) * c)).unsqueeze(-1)


def wide(tensor: torch.Tensor) -> torch.dtype:
    """The dtype in which sd-mecha answers: its masks are float32."""
    import torch

    return torch.promote_types(tensor.dtype, torch.float32)


def kept_count(n: int, k: float) -> int:
    """How many of n entries are kept, equals aside: sd-mecha cuts below the max(1, int((1 - k) n))-th smallest."""
    return n - max(int((1 - k) * n), 1) + 1


def _program(models: Sequence[torch.Tensor], k: float, vote_sgn: bool) -> Program:
    return Program(
        (1.0,) * len(models),
        _points(models, k),
        base=False,
        vote="plain" if vote_sgn else "count",
        zero_vote=0,
        divisor="agreeing_count",
    )


def _points(models: Sequence[torch.Tensor], k: float) -> tuple[Keep | None, ...]:
    """Where each model is cut; everything that equals the threshold stays."""
    n = models[0].numel()
    count = kept_count(n, k)
    if count < 1:
        raise NotServed("k below 0")
    # In float64 the threshold is rounded to float32, which may cut even the entry that it comes from.
    double = wide(models[0]).itemsize == 8
    cut = [t for t, m in enumerate(models) if (count < n or double) and _some_cut(m, count)]
    if not cut:
        return (None,) * len(models)
    found = dict(zip(cut, select([models[t] for t in cut], count, policy="all"), strict=True))
    if double:
        found = {t: _in_float32(point) for t, point in found.items()}
    return tuple(found.get(t) for t in range(len(models)))


def _some_cut(model: torch.Tensor, count: int) -> bool:
    """False if the threshold is zero: nothing but zeros would be cut."""
    import torch

    return int(torch.count_nonzero(model)) >= count


def _in_float32(point: Keep) -> Keep:
    """The threshold that sd-mecha finds in float64 tensors: rounded to float32."""
    value = struct.unpack("d", struct.pack("Q", point.tau))[0]
    try:
        rounded = struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError as error:
        raise NotServed("float64 values beyond float32") from error
    return Keep(struct.unpack("Q", struct.pack("d", rounded))[0], "all")
