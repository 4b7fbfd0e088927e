"""Merging the same adapters again with other weights: `prepare_adapters`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from .._methods.adapters.linear import roots
from .._methods.arguments import bind_matrix
from .._methods.matrix import Merged, Separable
from ..errors import ArgumentError
from .align import Place
from .cores import Core, core_of, cut_cores
from .cutting import Limits, cut_waiting
from .job import Job, plain
from .merged import MergedAdapter
from .model import Factors
from .opening import AdapterInput, check_numbers, open_job
from .peft_dialect import rslora_factor
from .result import asked_dtype, assemble, common_dtype
from .truncate import Cut, check_cut

if TYPE_CHECKING:
    import torch

    from ..formats.adapters import Base
    from ..tensors import DType

__all__ = ["Prepared", "prepare_adapters"]


@dataclass(frozen=True)
class _Terms:
    """A module whose merge is a sum of factors: of all adapters, the rows of A and of B as one matrix each."""

    place: Place
    a: torch.Tensor
    b: torch.Tensor
    rank: int

    def merged(self, on_a: tuple[float, ...], on_b: tuple[float, ...]) -> Factors:
        """The two weighted sums."""
        m, n = self.place.site.shape
        a = self.a.new_tensor(on_a) @ self.a
        b = self.b.new_tensor(on_b) @ self.b
        return Factors(b.reshape(m, self.rank), a.reshape(self.rank, n))


class Prepared:
    """Adapters whose weights can change: what does not depend on these is computed.

    Memory: about that of all factors, in float32. Made by `prepare_adapters`.
    """

    def __init__(self, job: Job, limits: Limits, stored: DType, parts: list[_Terms | Core | Place]) -> None:
        self._job = job
        self._limits = limits
        self._stored = stored
        self._parts = parts

    def merge(self, weights: Any = None, *, rank: int | None = None, energy: float | None = None) -> MergedAdapter:
        """What `merge_adapters` gives for these weights, to rounding.

        weights : one number, or one per adapter; default 1. rank, energy : instead of those of `prepare_adapters`.

        Raises
        ------
        ArgumentError : unusable weights, rank or energy. DataError : a result beyond the dtype.
        """
        started = time.perf_counter()
        job, limits = self._job, self._limits
        if rank is not None or energy is not None:
            check_cut(rank, energy, limits.spread)
            limits = replace(limits, rank=rank, energy=energy)
            if job.factor != 1.0:  # the rank enters what rsLoRA leaks
                job = replace(job, factor=rslora_factor(job.adapters, job.wants, rank, limits.largest)[0])
        given = {} if weights is None else {"weights": plain(weights)}
        known = {p.name: p for p in job.method.info.params}
        given |= {known[name].keyword: value for name, value in job.params.items() if name != "weight"}
        job = replace(job, params=bind_matrix(job.method, given, len(job.adapters), job.dialect))
        check_numbers(job)
        return assemble(job, limits, self._stored, self._items(job, limits), started)

    def _items(self, job: Job, limits: Limits) -> Iterator[tuple[Place, Merged, Cut]]:
        scale = job.scale
        waiting: list[tuple[Place, Merged]] = []
        cores = [part for part in self._parts if isinstance(part, Core)]
        yield from cut_cores(cores, job, limits)
        for part in self._parts:
            if isinstance(part, _Terms):
                delta = part.merged(*roots(job.spec(part.place)))
                merged = Merged(Factors(delta.b * scale, delta.a) if scale != 1.0 else delta)
                waiting.append((part.place, merged))
            elif isinstance(part, Place):
                waiting.append((part, job.merge(part, None)))
        yield from cut_waiting(waiting, job, limits)


def prepare_adapters(
    adapters: Iterable[AdapterInput],
    method: str = "svd",
    *,
    rank: int | None = None,
    energy: float | None = None,
    base: Base | None = None,
    dialect: str = "default",
    seed: int = 0,
    spread: Literal["b", "sqrt", "a"] = "b",
    out_dtype: str | torch.dtype | None = None,
    device: torch.device | str = "cpu",
    **params: Any,
) -> Prepared:
    """Prepare a merge that will be asked for with several weight vectors.

    Parameters
    ----------
    method : "svd" (orthonormal bases and a core per module; a merge is then one small decomposition per module),
        "linear", "magnitude_prune", "dare_linear", "ties" or "dare_ties" (pruned and elected factors; a merge is two
        weighted sums per module). The other parameters are those of `merge_adapters`.

    Where the ranks of a module add up to min(m, n) or more, nothing is gained by a basis: such modules are merged from
    their files each time, and the report of a merge says so.

    Raises
    ------
    ArgumentError : a method whose result cannot be separated from its weights. Others as `merge_adapters`.
    """
    asked = asked_dtype(out_dtype)
    job, limits = open_job(adapters, method, None, rank, energy, base, dialect, seed, spread, device, params)
    parts: list[_Terms | Core | Place] = []
    for place in job.aligned.places:
        parts.append(_part(job, place))
    return Prepared(job, limits, asked or common_dtype(job.adapters), parts)


def _part(job: Job, place: Place) -> _Terms | Core | Place:
    import torch

    if job.method.info.name == "svd":
        if sum(place.ranks) >= min(place.site.shape):
            return place
        return core_of(place, job.deltas(place))
    terms = job.method.separate(job.spec(place), job.deltas(place)) if isinstance(job.method, Separable) else None
    if terms is None:
        raise ArgumentError(
            f"{job.method.info.name} cannot be prepared",
            code="prepare.method",
            expected="svd, linear, magnitude_prune, dare_linear, ties or dare_ties",
            got=job.method.info.name,
        )
    count = len(terms)
    a = torch.stack([t.a for t in terms]).reshape(count, -1)
    b = torch.stack([t.b for t in terms]).reshape(count, -1)
    return _Terms(place, a, b, terms[0].rank)
