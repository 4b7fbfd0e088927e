"""What all measuring passes over one tensor share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator

from .._methods.protocol import Spec
from ..tensors import Piece, TensorView
from .context import Context, OpenTensor, Worker
from .tiling import Tiling

__all__ = ["Measure", "refuse"]


class Measure(ABC):
    """One pass over one tensor.

    tiles : how many tasks it is cut into; 0 if a sample has nothing to visit here. visited : elements it looks at.
    """

    def __init__(self, ctx: Context, source: OpenTensor, spec: Spec, tiling: Tiling) -> None:
        self.ctx = ctx
        self.source = source
        self.spec = spec
        self.tiling = tiling
        self.tiles = tiling.count
        self.visited = source.n
        source.check_room(tiling)

    @property
    def sampled(self) -> bool:
        """True if this pass looks at a part of the tensor."""
        return self.visited < self.source.n

    @property
    def nbytes(self) -> int:
        """Bytes that the pass reads, about."""
        return self.source.nbytes * self.visited // max(1, self.source.n)

    @abstractmethod
    def run(self, worker: Worker, index: int) -> None:
        """One tile."""

    def nonfinite(self) -> Iterator[tuple[int, int, int]]:
        """(source, first scope index, count) for each source in which this pass saw NaN or Inf."""
        return iter(())

    def load(self, worker: Worker, piece: Piece) -> tuple[TensorView | None, list[TensorView]]:
        """(base, models) of a piece."""
        views = [self.source.load(worker, m, piece) for m in range(len(self.source.streams))]
        return (views.pop() if self.source.has_base else None), views


def refuse(source: OpenTensor, found: Iterable[tuple[int, int, int]]) -> None:
    """Ends the run at the first source in which there is NaN or Inf.

    Raises
    ------
    DataError
    """
    for number, first, count in sorted(found):
        if first >= 0:
            raise source.refuse_nonfinite(number, first, count)
