"""Inputs of element-wise passes that are products of factors: tiles of each are formed when a pass comes to them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .._native import view_of
from ..tensors import F32, F64, Piece, TensorView, tensor_id
from .inputs import Inputs

if TYPE_CHECKING:
    import torch

    from ..adapters.model import Factors
    from .spectral.tiles import FactorTiles

__all__ = ["ProductInputs", "product_inputs"]

_SIDE = 512
"""Tiles are cut at multiples of this, at which products are formed."""

_TILE_BYTES = 16 << 20
"""The tiles of all models at one place, together."""


@dataclass(frozen=True)
class ProductInputs(Inputs):
    """One tensor of a merge whose models are products b_t a_t: each piece is a box, its tiles are formed on demand."""

    tiles: FactorTiles | None = None
    memory: dict[int, torch.Tensor] = field(default_factory=dict)

    def views(self, shard: int) -> tuple[TensorView | None, list[TensorView]]:
        """(None, the tile of every model) of a box; the views of the box before are overwritten."""
        assert self.tiles is not None
        rows, cols = self.box(shard)
        if self.tiles.at_once:
            return None, [view_of(tile) for tile in self.tiles.tiles(rows, cols)]
        size = (rows[1] - rows[0], cols[1] - cols[0])
        return None, [view_of(self.tiles.tile(rows, cols, t, self._space(t, size))) for t in range(self.num_models)]

    def _space(self, model: int, size: tuple[int, int]) -> torch.Tensor:
        """Memory for one tile, the same every time."""
        import torch

        assert self.tiles is not None
        count = size[0] * size[1]
        if model not in self.memory or self.memory[model].numel() < count:
            self.memory[model] = torch.empty(count, dtype=self.tiles.dtype, device=self.tiles.device)
        return self.memory[model][:count].view(size)

    @property
    def all_views(self) -> list[TensorView]:
        """A view like those of a box, for a backend to say whether it can serve them."""
        import torch

        assert self.tiles is not None
        return [view_of(torch.empty((1, 1), dtype=self.tiles.dtype, device=self.tiles.device))]

    def box(self, shard: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """(rows, columns) of a piece."""
        piece, width = self.pieces[shard], self.shape[1]
        top, left = divmod(piece.g0, width)
        return (top, top + piece.rows), (left, left + piece.cols)

    def boxes_of(self, out: torch.Tensor) -> list[torch.Tensor]:
        """The parts of a matrix into which a pass over all pieces writes."""
        boxes = (self.box(i) for i in range(len(self.pieces)))
        return [out[rows[0] : rows[1], cols[0] : cols[1]] for rows, cols in boxes]


def product_inputs(factors: Sequence[Factors], name: str, labels: Sequence[str] = ()) -> ProductInputs:
    """The products of `factors` (1 to 64, of one shape and device) as the models of a tensor called `name`.

    Every pass forms the tiles anew, with the same bits; at any time the tiles of one box are in memory, at most 16 MiB
    (or 512 x 512 elements of every model).
    """
    import torch

    from .spectral.tiles import FactorTiles

    tiles = FactorTiles(factors)
    m, n = tiles.shape
    names = tuple(labels) or tuple(f"model {i}" for i in range(len(factors)))
    return ProductInputs(
        name,
        tensor_id(name),
        m * n,
        len(factors),
        False,
        F64 if tiles.dtype == torch.float64 else F32,
        True,
        tuple(_boxes(m, n, len(factors))),
        (),
        (m, n),
        names,
        tiles,
    )


def _boxes(m: int, n: int, models: int) -> Iterator[Piece]:
    """Bands of rows, cut into columns only where a band of all models is too large."""
    width = max(_SIDE, _TILE_BYTES // (4 * models * _SIDE) // _SIDE * _SIDE)
    height = _SIDE * max(1, _TILE_BYTES // (4 * models * _SIDE * n)) if width >= n else _SIDE
    for top in range(0, m, height):
        rows = min(height, m - top)
        for left in range(0, n, width):
            cols = min(width, n - left)
            start = top * n + left
            yield Piece(start, rows, cols, n)
