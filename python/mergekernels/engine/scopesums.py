"""Folded sums of many tensors: what a wave of sums over the whole model yields, and its durable form."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence

from ..ops.sums import Sums

__all__ = ["ScopeSums"]

_COUNT = struct.Struct("<Q")


class ScopeSums:
    """Name of a tensor -> per slot, a number for each segment. `add` may be called by several threads."""

    def __init__(self) -> None:
        self._values: dict[str, tuple[array[float], ...]] = {}

    def add(self, name: str, values: tuple[array[float], ...]) -> None:
        """The sums of one tensor."""
        self._values[name] = values

    def merge(self, other: ScopeSums) -> None:
        """Adds the tensors of another file."""
        self._values.update(other._values)

    def sums(self, names: Sequence[str]) -> Sums:
        """The sums of these tensors, in this order."""
        return Sums(tuple(self._values[name] for name in names))

    def dump(self) -> bytes:
        """Per tensor the length of its name and the name, the number of slots, and for each slot a count and as many
        doubles; integers and doubles little endian.
        """
        parts = []
        for name, slots in self._values.items():
            raw = name.encode()
            parts += [_COUNT.pack(len(raw)), raw, _COUNT.pack(len(slots))]
            for numbers in slots:
                parts += [_COUNT.pack(len(numbers)), struct.pack(f"<{len(numbers)}d", *numbers)]
        return b"".join(parts)

    @staticmethod
    def load(data: bytes) -> ScopeSums:
        """The inverse of `dump`.

        Raises
        ------
        ValueError : not what `dump` writes.
        """
        result = ScopeSums()
        at = 0

        def take(size: int) -> bytes:
            nonlocal at
            if size > len(data) - at:
                raise ValueError("sums end early")
            at += size
            return data[at - size : at]

        def count() -> int:
            return int(_COUNT.unpack(take(_COUNT.size))[0])

        while at < len(data):
            name = take(count()).decode()
            slots = []
            for _ in range(count()):
                n = count()
                slots.append(array("d", struct.unpack(f"<{n}d", take(8 * n))))
            result.add(name, tuple(slots))
        return result
