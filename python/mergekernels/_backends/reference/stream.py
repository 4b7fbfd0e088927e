"""`stream`, the specification: the fused element-wise pass, one plain torch operation per step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..._native import to_torch, torch_dtype
from ...ops.program import Program
from ...tensors import CANONICAL_BLOCK, DType, Piece, TensorView
from .combine import Merged, combine
from .common import block_sums, constant, delta, flat_index, load, to_dtype
from .rules import joint_mask, kept_mask, segment, table_values

if TYPE_CHECKING:
    from ..._cpu import StreamStats

__all__ = ["Steps", "canonical_nan", "evaluate", "stream"]

_NAN_BITS = {
    torch.bfloat16: 0x7FC0,
    torch.float16: 0x7E00,
    torch.float32: 0x7FC00000,
    torch.float64: 0x7FF8000000000000,
}
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Steps:
    """Everything that a program computes on its way, per element of a piece, in the terms of `Program`.

    g : flat indices. base : x0. models : xt. fisher : Ft. deltas : dt. masks : what is kept, zeros included. trimmed :
    et before `factors`. kept : et. weighted : wt. merged : see `Merged`. y : before the anchor is added.
    result : y in the end, in the compute dtype.
    """

    g: torch.Tensor
    base: torch.Tensor | None
    models: list[torch.Tensor]
    fisher: list[torch.Tensor]
    deltas: list[torch.Tensor]
    masks: list[torch.Tensor]
    trimmed: list[torch.Tensor]
    kept: list[torch.Tensor]
    weighted: list[torch.Tensor]
    merged: Merged
    y: torch.Tensor
    result: torch.Tensor


def evaluate(
    program: Program,
    piece: Piece,
    base: TensorView | None,
    models: Sequence[TensorView],
    compute: DType,
    marks: Sequence[TensorView | None] = (),
) -> Steps:
    """Run a program, keeping every step."""
    x0 = None if base is None else load(base, compute)
    inputs = [load(view, compute) for view in models]
    num_models = len(program.weights)
    xs, fisher = inputs[:num_models], inputs[num_models:]
    g = flat_index(piece, xs[0].device)
    if program.copy:
        y = xs[0] if program.scale == 1.0 else xs[0] * constant(program.scale, xs[0])
        same, everything = [y], torch.ones_like(y, dtype=torch.bool)
        merged = Merged(y, y, [~everything], y, y, None)
        return Steps(g, x0, xs, [], same, [everything], same, same, same, merged, y, y)

    deltas = [delta(x, x0 if program.subtract else None) for x in xs]
    masks, trimmed, kept = [], [], []
    joint = joint_mask(program, deltas, g)
    for t, d in enumerate(deltas):
        packed = marks[t] if t < len(marks) else None
        mask, divisor = kept_mask(program, t, d, g, None if packed is None else to_torch(packed).reshape(-1))
        mask = mask if joint is None else mask & joint
        e = torch.where(mask, d if divisor is None else d / divisor, torch.zeros_like(d))
        masks.append(mask)
        trimmed.append(e)
        factor = program.factors[t] if program.factors else 1.0
        kept.append(e if factor == 1.0 else e * constant(factor, e))
    w = _weights(program, g, xs[0])
    weighted = [wt * e for wt, e in zip(w, kept, strict=True)]
    merged = combine(program, w, deltas, kept, weighted, fisher)
    y = merged.q if program.scale == 1.0 else merged.q * constant(program.scale, merged.q)
    poison = merged.num if program.merge in ("importance", "balance") else merged.total
    y = torch.where(poison.isnan(), poison, y)
    result = y
    if x0 is not None:
        result = (x0 if program.anchor == "base" else xs[0]) + y
    return Steps(g, x0, xs, fisher, deltas, masks, trimmed, kept, weighted, merged, y, result)


def _weights(program: Program, g: torch.Tensor, like: torch.Tensor) -> list[torch.Tensor]:
    if program.table is None:
        return [constant(v, like) for v in program.weights]
    at, num_models = segment(program.table, program.seed, g), len(program.weights)
    return [table_values(program.table, num_models, t, at, like.dtype) for t in range(num_models)]


def stream(
    program: Program,
    piece: Piece,
    base: TensorView | None,
    models: Sequence[TensorView],
    out: TensorView | None,
    *,
    compute: DType,
    stats: StreamStats | None,
    threads: int,
    marks: Sequence[TensorView | None] = (),
) -> None:
    """See ops.program.Program. `threads` has no effect."""
    steps = evaluate(program, piece, base, models, compute, marks)
    result = None
    if out is not None:
        target = to_torch(out)
        if (
            program.copy
            and program.scale == 1.0
            and models[0].cast in (None, out.dtype)
            and models[0].dtype is out.dtype
        ):
            result = to_torch(models[0]).reshape(-1)
        else:
            result = canonical_nan(to_dtype(steps.result, torch_dtype(out.dtype)))
        target.copy_(result.reshape(target.shape))
    if stats is not None:
        _count(stats, piece, steps, result)


def canonical_nan(x: torch.Tensor) -> torch.Tensor:
    """X with every NaN replaced by the canonical bit pattern of its dtype."""
    bits = x.view(_BITS[x.element_size()])
    nan = torch.full_like(bits, _NAN_BITS[x.dtype])
    return torch.where(torch.isnan(x), nan, bits).view(x.dtype)


def _count(stats: StreamStats, piece: Piece, steps: Steps, result: torch.Tensor | None) -> None:
    positive = torch.zeros_like(steps.y, dtype=torch.bool)
    negative = torch.zeros_like(positive)
    for v in steps.weighted:
        positive, negative = positive | (v > 0), negative | (v < 0)
    stats.add(
        [int((e != 0).sum()) for e in steps.kept] + [0 for _ in steps.fisher],
        int((positive & negative).sum()),
        int((steps.merged.vote > 0).sum()),
        int((steps.merged.vote < 0).sum()),
    )
    # A weight of an entry below zero is as wrong as one that is not finite.
    bad = [~x.isfinite() for x in steps.models] + [~f.isfinite() | (f < 0) for f in steps.fisher]
    for source, found in enumerate([*bad, *(None if x is None else ~x.isfinite() for x in (steps.base, result))]):
        count = 0 if found is None else int(found.sum())
        if found is not None and count:
            stats.add_nonfinite(source, int(steps.g[found].min()), count)
    if stats.num_blocks and piece.numel:
        for m, d in enumerate(steps.deltas):
            stats.set_blocks(m, piece.g0 // CANONICAL_BLOCK, block_sums(d.double() * d.double()).cpu().numpy().data)
