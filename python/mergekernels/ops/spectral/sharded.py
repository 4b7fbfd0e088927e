"""Matrices as the spectral ops take them: one tensor, or its row or column shards; and the checks of both."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Union

from ..._checks import check_tensor
from ...errors import ArgumentError, DataError

if TYPE_CHECKING:
    import torch

__all__ = ["BLOCK", "Matrix", "Sharded", "blocks", "check_matrix", "cut_like", "dense", "moderate", "widen"]

BLOCK = 4096
"""Rows of one canonical block. Statistics are computed block by block from row 0, so no cut into shards shows."""


@dataclass(frozen=True)
class Sharded:
    """A matrix cut into shards along one dimension.

    parts : 2-D tensors, in order; equal sizes along the other dimension, one dtype. They may lie on several devices;
    small results are computed on the first part's.
    dim : 0 for row shards, 1 for column shards.
    Errors: ArgumentError if the parts do not fit together.
    """

    parts: Sequence[torch.Tensor]
    dim: int

    def __post_init__(self) -> None:
        if self.dim not in (0, 1):
            raise ArgumentError("dim is not 0 or 1", code="shards.dimension", got=str(self.dim))
        if not self.parts:
            raise ArgumentError("no shards", code="shards.empty", expected="at least one part")
        first = self.parts[0]
        for i, part in enumerate(self.parts):
            if part.ndim != 2 or part.shape[1 - self.dim] != first.shape[1 - self.dim] or part.dtype != first.dtype:
                raise ArgumentError(
                    f"shard {i} does not fit shard 0",
                    code="shards.cuts",
                    expected=f"2-D, {first.dtype}, size {first.shape[-1 - self.dim]} along dimension {1 - self.dim}",
                    got=f"{tuple(part.shape)} {part.dtype}",
                )

    @property
    def sizes(self) -> list[int]:
        """Sizes of the parts along `dim`."""
        return [int(p.shape[self.dim]) for p in self.parts]

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the whole."""
        other = int(self.parts[0].shape[1 - self.dim])
        return (sum(self.sizes), other) if self.dim == 0 else (other, sum(self.sizes))

    @property
    def dtype(self) -> torch.dtype:
        """Of all parts."""
        return self.parts[0].dtype

    @property
    def device(self) -> torch.device:
        """Of the first part, where small results are computed."""
        return self.parts[0].device

    @property
    def mT(self) -> Sharded:
        """The transpose, a view."""
        return Sharded([p.mT for p in self.parts], 1 - self.dim)

    def dense(self) -> torch.Tensor:
        """The whole matrix on the first part's device: a copy."""
        import torch

        return torch.cat([p.to(self.device) for p in self.parts], self.dim)


Matrix = Union["torch.Tensor", Sharded]
"""A 2-D tensor, or its shards."""


def check_matrix(x: Any, what: str, finite: bool = True) -> Matrix:
    """`x` as a finite matrix in float32 or float64 (16-bit input is widened, exactly).

    finite : False leaves the values unread, for callers that check many at once.
    Errors: ArgumentError for what is not a matrix, DataError for NaN, Inf, or float64
    entries whose squares leave its range; all name `what`.
    """
    import torch

    if isinstance(x, Sharded):
        parts = [check_matrix(p, f"shard {i} of {what}", finite) for i, p in enumerate(x.parts)]
        return Sharded([p for p in parts if isinstance(p, torch.Tensor)], x.dim)
    plain = check_tensor(x, what, what)
    if plain.ndim != 2:
        raise ArgumentError(
            f"{what} is not a matrix", code="matrix.dimension", tensor=what, expected="2-D", got=str(tuple(plain.shape))
        )
    if finite and plain.numel():
        low, high = torch.stack(torch.aminmax(plain)).tolist()
        if not (math.isfinite(low) and math.isfinite(high)):
            raise DataError(f"{what} holds NaN or Inf", code="data.nonfinite", tensor=what, hint="Repair the input.")
        size = max(high, -low) if plain.dtype == torch.float64 else 1.0
        if size > 0 and not 1e-140 < size < 1e140:
            raise DataError(
                f"{what} is so small or large that its squares leave the range of float64",
                code="data.range",
                tensor=what,
                expected="a largest entry between 1e-140 and 1e140",
                got=f"{size:.3g}",
                hint="Scale it.",
            )
    return widen(plain)


def moderate(x: torch.Tensor) -> bool:
    """Whether products of two entries of a float32 matrix, and sums of them, stay far inside the range of float32."""
    size = float(x.abs().max()) if x.numel() else 1.0
    return size == 0.0 or 1e-12 < size < 1e12


def widen(x: torch.Tensor) -> torch.Tensor:
    """float16 and bfloat16 as float32; others as they are."""
    import torch

    return x if x.dtype == torch.float64 else x.to(torch.float32)


def dense(x: Matrix) -> torch.Tensor:
    """The matrix as one tensor."""
    return x.dense() if isinstance(x, Sharded) else x


def cut_like(y: Matrix, x: Matrix) -> Matrix:
    """`y`, cut as `x` is: the same sizes along the same dimension, on the same devices; one tensor if x is one."""
    if not isinstance(x, Sharded):
        return dense(y)
    if isinstance(y, Sharded) and y.dim == x.dim:
        return y
    pieces = dense(y).split(x.sizes, x.dim)  # type: ignore[no-untyped-call]
    return Sharded([p.to(q.device) for p, q in zip(pieces, x.parts, strict=True)], x.dim)


def blocks(x: Matrix, dtype: torch.dtype, height: int = BLOCK) -> Iterator[torch.Tensor]:
    """The canonical blocks of `height` rows, each contiguous in `dtype` on the device of the first part.

    The values, layout and alignment of a block do not depend on how x is cut, so neither does what is computed from
    it. A block is valid until the next one is asked for.
    """
    import torch

    rows, cols = x.shape
    device = x.device
    buffer = torch.empty((min(rows, height), cols), dtype=dtype, device=device)
    for start in range(0, rows, height):
        stop = min(start + height, rows)
        block = buffer[: stop - start]
        _fill(block, x, start)
        yield block


def _fill(block: torch.Tensor, x: Matrix, start: int) -> None:
    """Writes rows [start, start + len(block)) of x into the block."""
    stop = start + block.shape[0]
    if not isinstance(x, Sharded):
        block.copy_(x[start:stop])
        return
    offset = 0
    for part, size in zip(x.parts, x.sizes, strict=True):
        if x.dim == 1:
            block[:, offset : offset + size].copy_(part[start:stop])
        else:
            low, high = max(start, offset), min(stop, offset + size)
            if low < high:
                block[low - start : high - start].copy_(part[low - offset : high - offset])
        offset += size
