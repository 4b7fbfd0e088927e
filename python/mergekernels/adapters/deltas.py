"""The task vectors of one module, loaded when they are asked for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, overload

from ..errors import DataError
from .model import Factors, Module, Site

if TYPE_CHECKING:
    import torch

    from .model import Adapter, Delta

__all__ = ["Deltas", "chunks", "ranks_of"]

_KEEP_BYTES = 64 << 20
"""Factors of one module up to this size stay loaded; of more, each is loaded anew whenever it is asked for."""


class Deltas(Sequence["Delta"]):
    """The factors of one module in every adapter, in float32 or float64, checked for NaN and Inf.

    adapters, entries : the adapters and their modules, None where one lacks it (factors of rank 0).
    raw : without the adapters' scales. device : where they go.
    """

    def __init__(
        self,
        site: Site,
        adapters: Sequence[Adapter],
        entries: Sequence[Module | None],
        *,
        raw: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        self.site = site
        self.ranks = tuple(0 if e is None else e.rank for e in entries)
        self._adapters = adapters
        self._entries = entries
        self._raw = raw
        self._device = device
        self._wide = any(e is not None and e.dtype == "F64" for e in entries)
        m, n = site.shape
        size = (m + n) * sum(self.ranks) * (8 if self._wide else 4)
        self._kept: dict[int, Factors] | None = {} if size <= _KEEP_BYTES else None

    def __len__(self) -> int:
        return len(self._entries)

    @overload
    def __getitem__(self, index: int) -> Factors: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Delta]: ...

    def __getitem__(self, index: int | slice) -> Factors | Sequence[Delta]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        if self._kept is None:
            return self._load(index)
        if index not in self._kept:
            self._kept[index] = self._load(index)
        return self._kept[index]

    def __iter__(self) -> Iterator[Factors]:
        return (self[i] for i in range(len(self)))

    def _load(self, index: int) -> Factors:
        import torch

        entry = self._entries[index]
        wide = torch.float64 if self._wide else torch.float32
        m, n = self.site.shape
        if entry is None:
            empty = torch.zeros((m, 0), dtype=wide, device=self._device)
            return Factors(empty, torch.zeros((0, n), dtype=wide, device=self._device))
        loaded = entry.factors(fold_scale=False)
        label = self._adapters[index].label
        b, a = loaded.b.to(self._device, wide), loaded.a.to(self._device, wide)
        _refuse_nonfinite(b, "lora_B", self.site.module, label)
        _refuse_nonfinite(a, "lora_A", self.site.module, label)
        if not self._raw and entry.scale != 1.0:
            b = b * entry.scale
            _refuse_nonfinite(b, "lora_B times its scale", self.site.module, label)
        return Factors(b, a)


def _refuse_nonfinite(tensor: torch.Tensor, which: str, module: str, label: str) -> None:
    import torch

    # A sum is one pass without a temporary; only where it is not finite every element is looked at.
    if math.isfinite(float(tensor.sum())):
        return
    bad = ~torch.isfinite(tensor)
    count = int(bad.sum())
    if count:
        first = int(bad.reshape(-1).nonzero()[0])
        raise DataError(
            f"{which} of {label} has {count} values that are not finite",
            code="nonfinite",
            tensor=module,
            expected="finite numbers",
            got=f"{float(tensor.reshape(-1)[first])} at index {first}",
        )


def ranks_of(deltas: Sequence[Delta]) -> list[int]:
    """The ranks of task vectors in factors, of `Deltas` without loading them; a dense one has min(m, n)."""
    if isinstance(deltas, Deltas):
        return list(deltas.ranks)
    return [d.rank if isinstance(d, Factors) else min(d.shape) for d in deltas]


def chunks(ranks: Sequence[int], limit: int) -> Iterator[range]:
    """Runs of consecutive adapters whose ranks add up to at most `limit` (at least one adapter each)."""
    start = total = 0
    for i, rank in enumerate(ranks):
        if i > start and total + rank > limit:
            yield range(start, i)
            start, total = i, 0
        total += rank
    if start < len(ranks):
        yield range(start, len(ranks))
