"""Merged task vectors to factors, module by module, as soon as each is there."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from .._methods.matrix import Merged
from ..adapters.model import Factors, Site
from ..errors import InputError, MergeError
from ..tensors import F64
from .adapted import module_of
from .context import Context
from .matrixjob import plain
from .receipts import TensorRecord
from .sites import site_for
from .whole import all_threads

if TYPE_CHECKING:
    from ..adapters.model import Delta

__all__ = ["Collector", "Memory"]


class Memory:
    """Where the writing pass of one tensor goes instead of to a file: what jobs need of a `Unit`."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self.data = bytearray()
        self.record: TensorRecord | None = None

    def open(self) -> None:
        """Takes the memory."""
        self.data = bytearray(self._nbytes)

    def write(self, data: memoryview, offset: int) -> bool:
        """A tile at its place."""
        self.data[offset : offset + len(data)] = data
        return False

    def read_back(self, memory: memoryview, offset: int) -> memoryview:
        """Fills `memory` from what was written at `offset`."""
        memory[:] = memoryview(self.data)[offset : offset + len(memory)]
        return memory

    def finish(self, record: TensorRecord) -> bool:
        """The tensor is written."""
        self.record = record
        return True


class Collector:
    """Merged task vectors to factors; several workers at once."""

    def __init__(self, ctx: Context) -> None:
        assert ctx.plan.merge.output is not None
        self._ctx = ctx
        self._output = ctx.plan.merge.output
        self._lock = threading.Lock()
        self.factors: dict[Site, Factors] = {}
        self.report: dict[str, dict[str, Any]] = {}

    def site(self, name: str) -> Site:
        """Where the factors of a weight belong.

        Raises
        ------
        InputError : adapters disagree about its orientation.
        """
        merge = self._ctx.plan.merge
        tensor = next(t for t in merge.tensors if t.name == name)
        modules = [m for s in tensor.models if (m := module_of(merge.inputs[s.input], s.tensor)) is not None]
        if len({m.site.kind for m in modules}) > 1:
            raise InputError(
                "adapters disagree about the orientation of the weight",
                code="adapters.orientation",
                tensor=name,
                got=", ".join(sorted({m.site.kind for m in modules})),
            )
        if modules:
            return modules[0].site
        assert tensor.base is not None
        base = merge.inputs[tensor.base.input]
        found = site_for(base, name, base.tensors[tensor.base.tensor])
        assert found is not None
        return found

    def written(self, name: str, memory: Memory) -> None:
        """The result of a writing pass: the merged task vector as the weight is stored."""
        import torch

        site = self.site(name)
        kind = torch.float64 if self._ctx.plan.specs.compute_of(name) is F64 else torch.float32
        weight = torch.frombuffer(memory.data, dtype=kind).reshape(site.weight_shape)
        with all_threads(self._ctx.plan.budget.threads):
            self._cut(site, site.to_matrix(weight), Merged(weight))

    def merged(self, name: str, merged: Merged, flipped: bool, scale: float) -> None:
        """What a method over matrices gives. flipped : in the orientation of the site, not of the stored weight."""
        site = self.site(name)
        delta = _scaled(merged.delta, scale)
        if not isinstance(delta, Factors) and tuple(delta.shape) not in (site.shape, site.shape[::-1]):
            # No matrix to the method, as one row.
            delta, flipped = site.to_matrix(delta.reshape(site.weight_shape)), True
        if not flipped and site.kind in ("fan_in_fan_out", "embedding"):
            delta = Factors(delta.a.T, delta.b.T) if isinstance(delta, Factors) else delta.T
        self._cut(site, delta, merged)

    def _cut(self, site: Site, delta: Delta, merged: Merged) -> None:
        from ..ops.spectral.lowrank import lowrank

        output = self._output
        told = {key: plain(value) for key, value in merged.report.items()}
        if _is_zero(delta):
            with self._lock:
                self.report[site.module] = {**told, "rank": 0, "kept_energy": 1.0}
            return
        rank = None if output.rank is None else min(output.rank, *site.shape)
        try:
            found = lowrank(delta, rank, output.energy, output.spread)
        except MergeError as error:
            raise MergeError.from_dict({**error.to_dict(), "tensor": site.weight}) from error
        factors = found.factors if merged.finish is None else merged.finish(found.factors)
        kept = Factors(factors.b.cpu().contiguous(), factors.a.cpu().contiguous())
        with self._lock:
            self.factors[site] = kept
            self.report[site.module] = {
                **told,
                "rank": kept.rank,
                "kept_energy": found.kept_energy,
                "cut": found.route,
            }


def _scaled(delta: Delta, scale: float) -> Delta:
    if scale == 1.0:
        return delta
    return Factors(delta.b * scale, delta.a) if isinstance(delta, Factors) else delta * scale


def _is_zero(delta: Delta) -> bool:
    if isinstance(delta, Factors):
        return delta.rank == 0 or not bool(delta.b.any()) or not bool(delta.a.any())
    return not bool(delta.any())
