"""The memory of one worker: a tile of every source and one of the output, allocated once and reused for every
tensor.
"""

from __future__ import annotations

from .._cpu import Buffer
from ..tensors import DType, TensorView

__all__ = ["Tiles"]


class Tiles:
    """`slots` buffers of `nbytes` each; the last one is the output's.

    Views are made once per (slot, dtype, cast, count) and kept: tiles of one size come again and again.
    """

    def __init__(self, slots: int, nbytes: int) -> None:
        self.nbytes = nbytes
        self.buffers = [Buffer(nbytes) for _ in range(slots)]
        self.memory = [memoryview(b).cast("B") for b in self.buffers]
        self._views: dict[tuple[int, str, str, int], TensorView] = {}

    @property
    def out(self) -> memoryview:
        """The bytes of the output tile."""
        return self.memory[-1]

    def view(self, slot: int, dtype: DType, cast: DType | None, count: int) -> TensorView:
        """A flat view of the first `count` elements in buffer `slot` (-1 for the output)."""
        key = (slot, dtype.name, "" if cast is None else cast.name, count)
        view = self._views.get(key)
        if view is None:
            if len(self._views) > 4096:
                self._views.clear()
            buffer = self.buffers[slot]
            view = TensorView(buffer.ptr, (count,), (1,), dtype, buffer, cast)
            self._views[key] = view
        return view
