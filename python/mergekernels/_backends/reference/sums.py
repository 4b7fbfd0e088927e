"""`gram`, `reduce`, `divergence` and `mark`, the specification: exact sums over canonical blocks, and packed bits."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch

from ..._native import to_torch
from ...errors import ArgumentError
from ...ops.program import Program
from ...ops.sums import Gram, Reduce, Segments
from ...tensors import CANONICAL_BLOCK, DType, Piece, TensorView
from .common import block_sums, delta, flat_index, load, ordered_sum
from .stream import Steps, evaluate
from .transcendental import exp, in_compute, log

if TYPE_CHECKING:
    from ..._cpu import BlockSums

__all__ = ["divergence", "gram", "mark", "reduce"]


def gram(
    request: Gram,
    sums: BlockSums,
    piece: Piece,
    base: TensorView | None,
    models: Sequence[TensorView],
    *,
    compute: DType,
    threads: int,
) -> None:
    """See ops.sums.Gram. `threads` has no effect."""
    x0 = None if base is None or not request.subtract else load(base, compute)
    vectors = [delta(load(view, compute), x0).double() for view in models]
    g = flat_index(piece, vectors[0].device)
    slot = 0
    for i, v in enumerate(vectors):
        for other in vectors[i:]:
            _add(sums, slot, request.segments, g, v * other)
            slot += 1


def _add(sums: BlockSums, slot: int, segments: Segments, g: torch.Tensor, products: torch.Tensor) -> None:
    """Set the block sums of products whose flat indices are g."""
    if not g.numel():
        return
    if segments.axis == "tensor":
        segment, index = torch.zeros_like(g), g
    elif segments.axis == "rows":
        segment, index = g // segments.length, g % segments.length
    else:
        segment, index = g % segments.count, g // segments.count
    first, block = int(segment.min()), int(index.min()) // CANONICAL_BLOCK
    start = block * CANONICAL_BLOCK
    dense = products.new_zeros(int(segment.max()) - first + 1, int(index.max()) - start + 1)
    dense[segment - first, index - start] = products
    for s, row in enumerate(block_sums(dense)):
        sums.set(slot, first + s, block, row.cpu().numpy().data)


def reduce(
    program: Program,
    request: Reduce,
    sums: BlockSums,
    piece: Piece,
    base: TensorView | None,
    models: Sequence[TensorView],
    *,
    compute: DType,
    threads: int,
    kept: Sequence[TensorView | None] = (),
) -> None:
    """See ops.sums.Reduce and dispatch.Backend.reduce. `threads` has no effect."""
    steps = evaluate(program, piece, base, models, compute)
    slot = 0
    for name in request.quantities:
        for i, values in enumerate(_quantity(name, steps)):
            _add(sums, slot + i, Segments("tensor", 1, 0), steps.g, values)
        slot += Reduce((name,)).num_slots(len(program.weights))
    for t, target in enumerate(kept):
        if target is not None:
            _pack(steps.masks[t] & (steps.deltas[t] != 0), target)


def _quantity(name: str, steps: Steps) -> list[torch.Tensor]:
    """The float64 numbers whose sums are asked for, per slot."""
    q = steps.merged.q.double().abs()
    if name == "abs":
        return [d.double().abs() for d in steps.deltas]
    if name == "squares":
        return [d.double() * d.double() for d in steps.deltas]
    if name == "kept_abs":
        return [e.double().abs() for e in steps.trimmed]
    if name == "kept_squares":
        return [e.double() * e.double() for e in steps.trimmed]
    if name == "agreeing_abs":
        return [torch.where(agree, q, torch.zeros_like(q)) for agree in steps.merged.agree]
    if name == "importance_squares":
        return [f.double() * f.double() for f in steps.fisher]
    if name == "kept_count":
        return [(e != 0).double() for e in steps.kept]
    if name == "alone_count":
        one = torch.stack([e != 0 for e in steps.kept]).sum(0) == 1
        return [(one & (e != 0)).double() for e in steps.kept]
    if name == "negative_count":
        return [(f < 0).double() for f in steps.fisher]
    if name == "total_abs":
        return [ordered_sum(steps.deltas).double().abs()]
    return [steps.y.double().abs()]


def mark(
    program: Program,
    kind: Literal["kept", "agreeing", "useful"],
    piece: Piece,
    base: TensorView | None,
    models: Sequence[TensorView],
    marks: Sequence[TensorView],
    *,
    compute: DType,
    threads: int,
) -> None:
    """See dispatch.Backend. `threads` has no effect."""
    steps = evaluate(program, piece, base, models, compute)
    useful = steps.merged.useful
    if kind == "useful" and useful is None:
        raise ArgumentError(
            "kind is not usable", code="mark.kind", expected="a program with `useful`, for useful", got="none"
        )
    found = {"kept": steps.masks, "agreeing": steps.merged.agree, "useful": useful or []}[kind]
    for bits, view in zip(found, marks, strict=True):
        _pack(bits, view)


def _pack(bits: torch.Tensor, view: TensorView) -> None:
    """One bit per element, the first in bit 0 of the first byte."""
    padded = bits.new_zeros(-(-bits.numel() // 8) * 8, dtype=torch.int64)
    padded[: bits.numel()] = bits.to(torch.int64)
    places = torch.arange(8, device=bits.device)
    to_torch(view).copy_((padded.view(-1, 8) << places).sum(1).to(torch.uint8).reshape(view.shape))


def divergence(
    row_length: int,
    piece: Piece,
    base: TensorView,
    model: TensorView,
    *,
    compute: DType,
    threads: int,
) -> array[float]:
    """See dispatch.Backend. `threads` has no effect."""
    p, q = (_softmax(load(view, compute).reshape(-1, row_length)) for view in (model, base))
    terms = p * in_compute(log, p / q)
    total = _tree(block_sums(terms.double()))
    return array("d", torch.where(total < 0, torch.zeros_like(total), total).tolist())


def _softmax(x: torch.Tensor) -> torch.Tensor:
    """C(e / Z) + C(1e-8) per row."""
    e = in_compute(exp, x - x.amax(1, keepdim=True))
    z = _tree(block_sums(e.double())).to(x.dtype)
    return e / z[:, None] + torch.tensor(1e-8, dtype=torch.float64).to(x)


def _tree(blocks: torch.Tensor) -> torch.Tensor:
    """The binary tree over block numbers, along the last axis."""
    while blocks.shape[-1] > 1:
        pairs = blocks[..., : blocks.shape[-1] // 2 * 2]
        rest = blocks[..., pairs.shape[-1] :]
        blocks = torch.cat([pairs[..., ::2] + pairs[..., 1::2], rest], -1)
    return blocks[..., 0]
