"""Merged task vectors to the factors of a result, truncated in batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from .._methods.matrix import Merged
from ..errors import DataError
from .align import Place
from .job import Job
from .model import Factors
from .truncate import Cut, Spread, exact_factors, truncated

__all__ = ["Limits", "cut_all", "cut_waiting"]

_BATCH_BYTES = 128 << 20
"""Merged task vectors that wait for one batched truncation."""


@dataclass(frozen=True)
class Limits:
    """How results are truncated.

    rank, energy : as asked for, None if not. largest : the rank where the method truncates and nothing is asked for.
    spread : where singular values go.
    """

    rank: int | None
    energy: float | None
    largest: int
    spread: Spread

    @property
    def asked(self) -> bool:
        """Whether the caller gave a rank or an energy."""
        return self.rank is not None or self.energy is not None


def cut_all(job: Job, limits: Limits) -> Iterator[tuple[Place, Merged, Cut]]:
    """All modules of a job with their factors."""
    return cut_waiting(job.merged(), job, limits)


def cut_waiting(items: Iterable[tuple[Place, Merged]], job: Job, limits: Limits) -> Iterator[tuple[Place, Merged, Cut]]:
    """Merged task vectors with their factors, truncated as many at a time as fit a batch."""
    waiting: list[tuple[Place, Merged]] = []
    size = 0
    for place, merged in items:
        delta = merged.delta
        if isinstance(delta, Factors) and delta.rank == 0:
            yield place, merged, Cut(delta, 1.0, "zero")
        elif not limits.asked and _kept(job, merged):
            yield place, merged, exact_factors(delta)
        else:
            _refuse_overflow(place, merged)
            waiting.append((place, merged))
            size += _bytes(merged)
        if size >= _BATCH_BYTES:
            yield from _cut_batch(waiting, limits)
            waiting, size = [], 0
    yield from _cut_batch(waiting, limits)


def _kept(job: Job, merged: Merged) -> bool:
    """Whether a result stays as it is where nothing is asked for."""
    return job.wants.rank == "exact" or (job.wants.rank == "given" and isinstance(merged.delta, Factors))


def _cut_batch(waiting: list[tuple[Place, Merged]], limits: Limits) -> Iterator[tuple[Place, Merged, Cut]]:
    if not waiting:
        return
    rank = limits.rank if limits.asked else limits.largest
    cuts = truncated([merged.delta for _, merged in waiting], rank, limits.energy, limits.spread)
    for (place, merged), cut in zip(waiting, cuts, strict=True):
        if merged.finish is not None:
            cut = replace(cut, factors=merged.finish(cut.factors))
        yield place, merged, cut


def _refuse_overflow(place: Place, merged: Merged) -> None:
    """Inputs are finite, so that what is not finite here has overflown."""
    import torch

    delta = merged.delta
    for tensor in (delta.b, delta.a) if isinstance(delta, Factors) else (delta,):
        # The sum is finite unless an element is not, or it overflows itself.
        if not bool(torch.isfinite(tensor.sum())) and not bool(torch.isfinite(tensor).all()):
            raise DataError(
                f"the merged delta is beyond the range of {str(tensor.dtype).removeprefix('torch.')}",
                code="overflow",
                tensor=place.site.module,
                hint="Use smaller weights, or float64 adapters.",
            )


def _bytes(merged: Merged) -> int:
    delta = merged.delta
    tensors = (delta.b, delta.a) if isinstance(delta, Factors) else (delta,)
    return sum(t.numel() * t.element_size() for t in tensors)
