"""What a GPU backend brings: its launches, which the host side in `_gpu` and `_gpu_sums` turns into results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from ..ops.program import Program
from ..ops.sweeps import Sweep
from ..tensors import DType, Piece
from ._device import Operands

if TYPE_CHECKING:
    import torch

__all__ = ["SLOTS", "Extras", "Launches"]

SLOTS = 32
"""Copies of the counters of `stream`, so that blocks do not queue at one address."""


@dataclass(frozen=True)
class Extras:
    """What a program needs beside its inputs; dense, on the device of the inputs, None where it does not need it.

    marks : per model, uint8: packed bits of the piece for `Marked`. Such a piece is flat and begins at bit g0 % 8 of
        the first byte. Empty if no rule is `Marked`.
    masks : uint8 [T, n]: 1 where a rank rule keeps the element at that place of the (flat) piece, written by
        `launch_rank_masks`. Rows of models with another rule hold nothing.
    thresholds : uint32 bits as int32 [T, n]: threshold - 1 of `RankDraw`, where masks is 1; for rules with `divide`.
    table : compute dtype [T, segments]: the values of `Program.table`.
    importance : compute dtype [segments]: the values of `Program.importance`.
    """

    marks: tuple[torch.Tensor | None, ...] = ()
    masks: torch.Tensor | None = None
    thresholds: torch.Tensor | None = None
    table: torch.Tensor | None = None
    importance: torch.Tensor | None = None


class Launches(Protocol):
    """The kernels of a backend; none of them waits. Tensors are dense and on one device; the caller initialises
    counters.

    Programs: T = len(program.weights) models; inputs.models has program.num_inputs entries, all there. An element of a
    piece is at place r * cols + c of the dense inputs; n is the number of elements of the piece.
    """

    def launch_sweep(
        self,
        request: Sweep,
        inputs: Operands,
        piece: Piece,
        compute: DType,
        tensor: int,
        offset: int,
        counters: torch.Tensor,
        entries: torch.Tensor,
        bins: torch.Tensor | None,
        numbers: torch.Tensor | None,
    ) -> None:
        """One counting pass for the S searches of the request whose interval is not None.

        inputs.models : with a joint key all T models, search s looks at number intervals[s].model; else one tensor per
        search, None where the interval is None. Ties are ordered by the Philox stream of intervals[s].model.
        counters : int64 [4 S + 2]: elements ahead; inside; non-finite values per search and base; their first indices.
        With a joint key a search counts the elements where any model is not finite.
        entries : int64 [2, S, capacity]: ordinals and scope indices, those beyond the capacity are only counted.
        bins : int64 [S, NUM_BINS]; if given, only these are filled.
        numbers : compute dtype; key "importance": [segments], the value of each row; "balance": [T, 5], the fields of
        `Balance` in their order.
        """
        ...

    def launch_stream(
        self,
        program: Program,
        inputs: Operands,
        piece: Piece,
        compute: DType,
        out: torch.Tensor | None,
        out_dtype: DType,
        counters: torch.Tensor | None,
        raw: bool,
        extras: Extras,
    ) -> None:
        """The fused pass.

        counters : int64 [SLOTS, 3 K + 7] with K = program.num_inputs: kept per model (and 0 for what follows the
        models); conflicts, positive, negative; non-finite values per input (for F: negative ones too), base and result;
        their first indices. raw : a copy keeps the bits.
        """
        ...

    def launch_reduce(
        self,
        program: Program,
        quantities: tuple[str, ...],
        inputs: Operands,
        piece: Piece,
        compute: DType,
        sums: torch.Tensor,
        extras: Extras,
    ) -> None:
        """Sums over canonical blocks of what a program computes: float64 [slots, blocks], slots as in `Reduce`.

        The piece is flat and begins at a canonical block. With `copy`, "squares" are those of what the copy writes.
        """
        ...

    def launch_mark(
        self,
        program: Program,
        kind: Literal["kept", "agreeing", "useful"],
        inputs: Operands,
        piece: Piece,
        compute: DType,
        marks: Sequence[torch.Tensor],
        extras: Extras,
    ) -> None:
        """Packed bits, uint8 [(n + 7) // 8] per model; the bits beyond n are 0. The piece is flat, g0 % 8 == 0."""
        ...

    def launch_rank_masks(
        self,
        program: Program,
        inputs: Operands,
        piece: Piece,
        compute: DType,
        masks: torch.Tensor,
        thresholds: torch.Tensor | None,
    ) -> None:
        """Writes `Extras.masks` and, if given, `Extras.thresholds` for every model with a rank rule.

        The piece is flat and holds whole slabs.
        """
        ...

    def launch_gram(
        self,
        subtract: bool,
        columns: bool,
        inputs: Operands,
        rows: int,
        cols: int,
        compute: DType,
        sums: torch.Tensor,
    ) -> None:
        """Sums of vi * vj over canonical blocks: float64 [pairs i <= j row by row, segments, blocks].

        A segment is a row of the box (rows, cols) of the dense inputs, or with `columns` a column; its first element is
        the first of a block. A sum over a whole tensor comes as one row.
        """
        ...

    def launch_divergence(
        self,
        inputs: Operands,
        rows: int,
        cols: int,
        compute: DType,
        maxima: torch.Tensor,
        totals: torch.Tensor | None,
        sums: torch.Tensor,
    ) -> None:
        """One of the two passes of `Backend.divergence` over the one model and the base.

        maxima : compute dtype [2, rows]: the largest value of each row, of the model and of the base.
        totals : None in the first pass: sums, float64 [2, rows, blocks], receives the block sums of e. In the second
        compute dtype [2, rows], Z: sums, float64 [1, rows, blocks], receives those of the terms.
        """
        ...
