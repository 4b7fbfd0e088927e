"""SHA-256 of a tensor whose tiles finish in any order."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable

__all__ = ["OrderedDigest"]


class OrderedDigest:
    """Takes tiles as they finish and hashes them in order.

    A tile whose turn it is is hashed from memory while it is in the caches. One that is early is left; whoever hashes
    its predecessor reads it again from what was written. At most one thread hashes a tensor, and none waits.
    """

    def __init__(self, tiles: int) -> None:
        self._sha = hashlib.sha256()
        self._lock = threading.Lock()
        self._written = bytearray(tiles)
        self._cursor = 0
        self._busy = False

    def add(self, index: int, data: memoryview, again: Callable[[int], memoryview]) -> None:
        """Tile `index` has been written; `data` is its bytes.

        again : gives the bytes of another written tile, possibly in the memory of `data`.
        """
        with self._lock:
            self._written[index] = 1
            if self._busy or not self._written[self._cursor]:
                return
            self._busy = True
        # Nobody hashed when this tile came, so it is the one whose turn it is. From then on `data` may be overwritten.
        self._sha.update(data)
        while True:
            with self._lock:
                self._cursor += 1
                turn = self._cursor
                if turn == len(self._written) or not self._written[turn]:
                    self._busy = False
                    return
            self._sha.update(again(turn))

    def hexdigest(self) -> str:
        """The digest, after all tiles."""
        assert self._cursor == len(self._written)
        return self._sha.hexdigest()
