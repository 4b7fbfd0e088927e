"""What the cases of all features share: ids, views, cuts into pieces, comparison of bits."""

from __future__ import annotations

import struct
from array import array
from itertools import pairwise
from math import lcm
from typing import Any, Literal

import torch

from gpu_matrix import bits
from mergekernels import _cpu
from mergekernels._native import view_of
from mergekernels.tensors import BF16, F16, F32, F64, DType, Piece, TensorView

# The tensors are small: two threads of torch that wait for each other cost more than they save.
torch.set_num_threads(1)

Cut = Literal["whole", "cut"]
DTYPES = (BF16, F16, F32, F64)


def by_name(case: Any) -> str:
    """The id of a case."""
    return str(case.name)


FAR = (Piece(3, 7, 100, 100), Piece(2**32 + 5, 7, 100, 12345), Piece(2**33 + 4096, 1, 700, 700))


def sizes_up_to(largest: int) -> list[int]:
    """Sizes of whole tensors: nothing, less than a vector, blocks and some more."""
    return [n for n in (5000, 255, 4096, 7, 1, 9000, 0, 70000) if n <= largest]


def view_on(x: torch.Tensor, device: str, strided: bool, cast: DType | None = None) -> TensorView:
    """A view on a device; strided : every third element of a wider tensor."""
    moved = x.to(device)
    if strided:
        wide = torch.full((*x.shape, 3), 9.0, dtype=x.dtype, device=device)
        wide[..., 1] = moved
        moved = wide[..., 1]
    view = view_of(moved)
    return TensorView(view.ptr, view.shape, view.strides, view.dtype, view.owner, cast, view.device)


def parts_of(piece: Piece, slab: int, cut: Cut, unit: int) -> list[Piece]:
    """The piece, or parts of it: runs of whole units and slabs, or of rows, uneven ones and an empty one."""
    if cut == "whole" or not piece.numel:
        return [piece]
    if piece.rows > 1:
        steps = [0, 1, 1, piece.rows // 2, piece.rows]
        rows = pairwise(steps)
        return [Piece(piece.g0 + a * piece.ld, b - a, piece.cols, piece.ld) for a, b in rows]
    step = lcm(slab, unit)
    count = -(-piece.cols // step)
    cuts = [min(c * step, piece.cols) for c in sorted({0, count // 3, count // 2, count})]
    return [Piece.flat(piece.g0 + a, b - a) for a, b in pairwise(cuts)]


def exact_bits(x: float) -> str:
    """The bits of a sum; the sign of a NaN is the machine's affair."""
    return "nan" if x != x else struct.pack("<d", x).hex()


def same_bits(expected: torch.Tensor, got: torch.Tensor) -> None:
    """Fails with the first difference."""
    differ = (bits(expected) != bits(got)).reshape(-1).nonzero().reshape(-1)
    assert not differ.numel(), (
        f"{differ.numel()} of {expected.numel()} elements differ, first at {int(differ[0])}: "
        f"{expected.reshape(-1)[differ[0]]!r} expected, {got.reshape(-1)[differ[0]]!r} found"
    )


def plain_view(x: torch.Tensor, device: str) -> TensorView:
    """A view on a device, with the strides of x on the host."""
    return view_of(x if device == "cpu" else x.to(device))


def folded_bits(sums: _cpu.BlockSums, slots: int) -> list[list[str]]:
    """Per slot and segment the bits of the sum."""
    return [[exact_bits(x) for x in array("d", sums.fold(slot))] for slot in range(slots)]
