"""`stream`, the specification: the fused element-wise pass, one plain torch operation per step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..._native import to_torch, torch_dtype
from ...ops.keep import Keep
from ...ops.program import Program
from ...tensors import CANONICAL_BLOCK, DType, Piece, TensorView
from .common import delta, flat_index, keys, load, tie_words, to_dtype

if TYPE_CHECKING:
    from ..._cpu import StreamStats

__all__ = ["block_sums", "canonical_nan", "stream"]

_NAN_BITS = {
    torch.bfloat16: 0x7FC0,
    torch.float16: 0x7E00,
    torch.float32: 0x7FC00000,
    torch.float64: 0x7FF8000000000000,
}
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


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
) -> None:
    """See ops.program.Program. `threads` has no effect."""
    x0 = None if base is None else load(base, compute)
    xs = [load(view, compute) for view in models]
    g = flat_index(piece, xs[0].device)
    if program.copy:
        y = xs[0]
        if program.scale != 1.0:
            y = y * torch.tensor(program.scale, dtype=y.dtype, device=y.device)
        deltas, kept, weighted, total = [y], [y], [y], y
    else:
        w = [torch.tensor(v, dtype=xs[0].dtype, device=xs[0].device) for v in program.weights]
        deltas = [delta(x, x0) for x in xs]
        kept = [_trim(d, m, program, g) for m, d in enumerate(deltas)]
        weighted = [wt * e for wt, e in zip(w, kept, strict=True)]
        total = torch.zeros_like(xs[0])
        for v in weighted:
            total = total + v
        y = _combine(program, weighted, w, total)
        if program.scale != 1.0:
            y = y * torch.tensor(program.scale, dtype=y.dtype, device=y.device)
        if x0 is not None:
            y = x0 + y
        y = torch.where(torch.isnan(total), total, y)
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
            result = canonical_nan(to_dtype(y, torch_dtype(out.dtype)))
        target.copy_(result.reshape(target.shape))
    if stats is not None:
        _count(stats, piece, g, x0, xs, deltas, kept, weighted, total, result)


def _trim(d: torch.Tensor, model: int, program: Program, g: torch.Tensor) -> torch.Tensor:
    keep = program.keep[model]
    if not isinstance(keep, Keep):
        return d
    key = keys(d)
    limit = min(keep.tau, 2**63 - 1)
    tied = key == limit
    if keep.ties == "none":
        tied = torch.zeros_like(tied)
    elif keep.ties == "index":
        tied = tied & (g <= keep.index)
    elif keep.ties == "hash":
        word = tie_words(program.seed, program.tensor, model, g)
        tied = tied & ((word < keep.word) | ((word == keep.word) & (g <= keep.index)))
    return torch.where((key > limit) | tied, d, torch.zeros_like(d))


def _combine(
    program: Program, weighted: list[torch.Tensor], w: list[torch.Tensor], total: torch.Tensor
) -> torch.Tensor:
    zero = torch.zeros_like(total)
    num, div, count = total, zero, zero
    if program.vote == "weighted":
        # A zero vote takes the sign of the program; an elected 0 agrees with nobody.
        sign = torch.where(total > 0, 1, torch.where(total < 0, -1, program.zero_vote))
        num = zero
        for v, wt in zip(weighted, w, strict=True):
            agree = ((v > 0) & (sign > 0)) | ((v < 0) & (sign < 0))
            num = num + torch.where(agree, v, zero)
            div = div + torch.where(agree, wt, zero)
            count = count + agree.to(count.dtype)
    if program.divisor == "value":
        return num / torch.tensor(program.divisor_value, dtype=num.dtype, device=num.device)
    if program.divisor == "agreeing_weights":
        return num / torch.where(div == 0, torch.ones_like(div), div)
    if program.divisor == "agreeing_count":
        return num / count.clamp_min(1)
    return num


def canonical_nan(x: torch.Tensor) -> torch.Tensor:
    """X with every NaN replaced by the canonical bit pattern of its dtype."""
    bits = x.view(_BITS[x.element_size()])
    nan = torch.full_like(bits, _NAN_BITS[x.dtype])
    return torch.where(torch.isnan(x), nan, bits).view(x.dtype)


def block_sums(d: torch.Tensor) -> torch.Tensor:
    """Sums of d * d over canonical blocks, float64: lane i mod 256 in order, then a binary tree over the lanes."""
    blocks = -(-d.numel() // CANONICAL_BLOCK)
    padded = torch.zeros(blocks * CANONICAL_BLOCK, dtype=torch.float64, device=d.device)
    padded[: d.numel()] = d.double()
    rows = padded.view(blocks, CANONICAL_BLOCK // 256, 256)
    lanes = torch.zeros(blocks, 256, dtype=torch.float64, device=d.device)
    for i in range(rows.shape[1]):
        lanes = lanes + rows[:, i] * rows[:, i]
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]


def _count(
    stats: StreamStats,
    piece: Piece,
    g: torch.Tensor,
    x0: torch.Tensor | None,
    xs: list[torch.Tensor],
    deltas: list[torch.Tensor],
    kept: list[torch.Tensor],
    weighted: list[torch.Tensor],
    total: torch.Tensor,
    result: torch.Tensor | None,
) -> None:
    positive = torch.zeros_like(total, dtype=torch.bool)
    negative = torch.zeros_like(positive)
    for v in weighted:
        positive, negative = positive | (v > 0), negative | (v < 0)
    stats.add(
        [int((e != 0).sum()) for e in kept],
        int((positive & negative).sum()),
        int((total > 0).sum()),
        int((total < 0).sum()),
    )
    sources = [*xs, x0, result]
    for source, x in enumerate(sources):
        if x is None:
            continue
        bad = ~torch.isfinite(x)
        count = int(bad.sum())
        if count:
            stats.add_nonfinite(source, int(g[bad].min()), count)
    if stats.num_blocks and piece.numel:
        for m, d in enumerate(deltas):
            stats.set_blocks(m, piece.g0 // CANONICAL_BLOCK, block_sums(d).cpu().numpy().data)
