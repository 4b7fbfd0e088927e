"""Pieces that an exact sum or a row rank can take, out of shards that are cut anywhere.

Sums run over canonical blocks and ranks over whole rows. Shards that keep these whole are used in place; others are
completed by copying, a bounded tile at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import lcm
from typing import TYPE_CHECKING

from .._native import view_of
from ..tensors import CANONICAL_BLOCK, Piece, TensorView
from .inputs import Inputs

if TYPE_CHECKING:
    import torch

__all__ = ["Part", "alignment", "parts", "scatter"]

_TILE = 1 << 22
"""Elements of an assembled tile, at least one aligned run."""


@dataclass(frozen=True)
class Part:
    """Elements start .. start + count - 1 of the unsharded tensor. shard : of which they are all, None if assembled."""

    start: int
    count: int
    base: TensorView | None
    models: list[TensorView]
    shard: int | None

    @property
    def flat(self) -> Piece:
        """The part as a flat piece."""
        return Piece.flat(self.start, self.count)


def alignment(*units: int) -> int:
    """The smallest run of elements that keeps canonical blocks and each of `units` whole."""
    return lcm(CANONICAL_BLOCK, *units)


def parts(inputs: Inputs, align: int) -> Iterator[Part]:
    """The tensor in flat parts that begin at multiples of `align` elements and end there or with the tensor."""
    inputs = inputs.cut(align)
    pieces = inputs.pieces
    # Flat pieces follow one another: where all begin at multiples, all but the last end there.
    if all(_is_flat(p) and p.g0 % align == 0 for p in pieces):
        for shard, piece in enumerate(pieces):
            if piece.numel:
                base, models = inputs.views(shard)
                yield Part(piece.g0, piece.numel, base, models, shard)
        return
    tile = max(1, _TILE // align) * align
    for start in range(0, inputs.n, tile):
        count = min(tile, inputs.n - start)
        sources = zip(*inputs.tensors, strict=True)
        views = [view_of(_assemble(pieces, shards, start, count)) for shards in sources]
        base = views.pop() if inputs.has_base else None
        yield Part(start, count, base, views, None)


def scatter(inputs: Inputs, part: Part, values: torch.Tensor, outs: Sequence[torch.Tensor]) -> None:
    """Copy a part's results, flat, into the shards of the output."""
    for piece, out in zip(inputs.pieces, outs, strict=True):
        if piece.numel == 0:
            continue
        if _is_flat(piece):
            first, last = max(piece.g0, part.start), min(piece.g0 + piece.numel, part.start + part.count)
            if first < last:
                _assign(out, first - piece.g0, values[first - part.start : last - part.start])
            continue
        for row in range(part.start // piece.ld, -(-(part.start + part.count) // piece.ld)):
            if row >= piece.rows:
                break
            begin = piece.g0 + row * piece.ld
            first, last = max(begin, part.start), min(begin + piece.cols, part.start + part.count)
            if first < last:
                _assign(out, row * piece.cols + first - begin, values[first - part.start : last - part.start])


def _is_flat(piece: Piece) -> bool:
    return piece.rows <= 1 or piece.cols == piece.ld


def _assign(out: torch.Tensor, first: int, values: torch.Tensor) -> None:
    """Write elements first, first + 1, ... of the row-major order of `out`."""
    import torch

    if out.is_contiguous():
        out.view(-1)[first : first + values.numel()] = values
        return
    at = torch.arange(first, first + values.numel(), device=out.device)
    out[torch.unravel_index(at, out.shape)] = values


def _assemble(pieces: Sequence[Piece], shards: Sequence[torch.Tensor], start: int, count: int) -> torch.Tensor:
    """Elements start .. start + count - 1 of the unsharded tensor, dense."""
    import torch

    filled = [(p, t) for p, t in zip(pieces, shards, strict=True) if p.numel]
    if all(p.rows == 1 for p, _ in filled):
        found = []
        for piece, shard in filled:
            first, last = max(piece.g0, start), min(piece.g0 + piece.numel, start + count)
            if first < last:
                found.append(shard.reshape(-1)[first - piece.g0 : last - piece.g0])
        return torch.cat(found)
    ld = filled[0][0].ld
    top, bottom = start // ld, -(-(start + count) // ld)
    rows = torch.cat([t.reshape(p.rows, p.cols)[top:bottom] for p, t in filled], dim=1)
    return rows.reshape(-1)[start - top * ld :][:count]
