"""What a measuring pass kept, remembered until the writing pass: one bit per element and model.

Random and ranked rules cost more than the rest of a pass. Where a method sums over what they keep before it writes, the
summing pass leaves the bits here and the writing pass reads them instead of drawing and ranking again.
"""

from __future__ import annotations

from dataclasses import replace

from ._backends.dispatch import Backend
from ._cpu import Buffer
from .ops.keep import Draw, KeepRule, Marked, RankBand, RankDraw
from .ops.program import Program
from .tensors import DType, Piece, TensorView

__all__ = ["Kept", "kept_bytes"]

_U8 = DType("U8", "uint8", 1)


def _costly(rule: KeepRule | None) -> bool:
    if isinstance(rule, RankDraw):
        return not rule.divide
    return isinstance(rule, (Draw, RankBand))


def kept_bytes(program: Program, n: int) -> int:
    """Memory for what a program keeps of n elements, 0 if it is not worth remembering."""
    return sum(_costly(rule) for rule in program.keep) * -(-n // 8)


class Kept:
    """The bits of one tensor."""

    def __init__(self, program: Program, n: int) -> None:
        self._rules = program.keep
        size = -(-n // 8)
        self._buffers = [Buffer(size) if _costly(rule) else None for rule in program.keep]

    @staticmethod
    def of(backend: Backend, program: Program, n: int, room: int) -> Kept | None:
        """Memory for the bits if the backend writes them, the program is worth it and `room` bytes hold them."""
        size = kept_bytes(program, n)
        return Kept(program, n) if "reduce:kept" in backend.FEATURES and 0 < size <= room else None

    def views(self, piece: Piece) -> list[TensorView | None]:
        """Per model the bits of a flat piece that begins at a multiple of 8."""
        size = -(-piece.numel // 8)
        return [None if b is None else TensorView(b.ptr + piece.g0 // 8, (size,), (1,), _U8, b) for b in self._buffers]

    def marked(self, program: Program) -> Program:
        """The program, keeping by the bits what it would keep by the rules they were made with."""
        if program.keep != self._rules:
            return program
        pairs = zip(program.keep, self._buffers, strict=True)
        keep = tuple(rule if buffer is None else Marked() for rule, buffer in pairs)
        ranked = any(isinstance(rule, (RankDraw, RankBand)) for rule in keep)
        return replace(program, keep=keep, rows=program.rows if ranked else None)
