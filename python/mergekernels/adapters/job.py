"""One merge of adapters: the method bound to its parameters, and its modules one by one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from .._methods.adapters.sums import weighted_sum
from .._methods.arguments import bind_matrix
from .._methods.matrix import Asking, MatrixMethod, MatrixSpec, Merged, Together, Wants, folds_scale, measured_state
from .._methods.matrix_table import get_matrix
from .._methods.spectral.layout import layout_of, merge_plain
from ..errors import ArgumentError, DataError
from ..tensors import tensor_id
from .align import Aligned, Place
from .deltas import Deltas
from .model import Adapter, Factors

if TYPE_CHECKING:
    import torch

__all__ = ["Job", "batches", "bind_job", "plain", "wants_of"]

_BATCH_BYTES = 128 << 20
"""Factors of modules that are merged together."""


def wants_of(method: MatrixMethod, params: Mapping[str, Any], dialect: str) -> Wants:
    """What the method asks of its driver."""
    return method.wants(params, dialect) if isinstance(method, Asking) else Wants()


@dataclass(frozen=True)
class Job:
    """A method and what it is applied to.

    factor : what the merged task vectors are multiplied with, besides lambda. shapes : of the base's tensors by name,
    empty if no base is known.
    """

    method: MatrixMethod
    params: Mapping[str, Any]
    dialect: str
    seed: int
    wants: Wants
    adapters: Sequence[Adapter]
    device: torch.device | str = "cpu"
    factor: float = 1.0
    notes: tuple[str, ...] = ()
    aligned: Aligned = field(default_factory=lambda: Aligned(()))
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def spec(self, place: Place) -> MatrixSpec:
        """One module as the method sees it; its name is that of the base's weight."""
        name = place.site.weight
        return MatrixSpec(
            name=name,
            shape=place.site.shape,
            num_models=len(self.adapters),
            params=self.params,
            dialect=self.dialect,
            seed=self.seed,
            tensor=tensor_id(name),
            scales=place.scales,
            plain=layout_of(self.params, name, place.site.weight_shape).plain,
        )

    def deltas(self, place: Place) -> Deltas:
        """The task vectors of one module."""
        raw = self.wants.raw or not folds_scale(self.params, self.dialect)
        return Deltas(place.site, self.adapters, place.entries, raw=raw, device=self.device)

    def state(self) -> Any:
        """What the method needs to know of all modules before it merges the first."""

        def measure(state: Any) -> dict[str, Any]:
            specs = [(place, self.spec(place)) for place in self.aligned.places]
            return {
                spec.name: self.method.measure(spec, self.deltas(place), state)
                for place, spec in specs
                if not spec.plain or hasattr(self.method, "merge_plain")
            }

        return measured_state(self.method, self.params, self.dialect, measure)

    def merged(self) -> Iterator[tuple[Place, Merged]]:
        """The merged task vectors, lambda applied, modules of equal shape one after the other."""
        state = self.state()
        places = sorted(self.aligned.places, key=lambda p: (p.site.shape, sum(p.ranks)))
        method = self.method
        if not isinstance(method, Together) or state is not None:
            for place in places:
                yield place, self.merge(place, state)
            return
        for batch in batches(places):
            specs = [self.spec(place) for place in batch]
            try:
                if any(spec.plain for spec in specs):
                    found = [self.merge(place, state) for place in batch]
                else:
                    deltas = [self.deltas(place) for place in batch]
                    found = [_scaled(m, self.scale) for m in method.merge_together(specs, deltas)]
            except DataError:  # one by one the module is known
                found = [self.merge(place, state) for place in batch]
            yield from zip(batch, found, strict=True)

    def merge(self, place: Place, state: Any) -> Merged:
        """The merged task vector of one module, lambda applied."""
        spec = self.spec(place)
        try:
            merged = self._merge(spec, self.deltas(place), state)
        except DataError as error:
            if error.tensor in (spec.name, place.site.module):
                raise
            raise DataError(
                f"{self.method.info.name}: {error.message}",
                code=error.code,
                tensor=place.site.module,
                hint="The factors are finite, so the computation has overflown: use smaller weights or float64.",
            ) from error
        return _scaled(merged, self.scale)

    def _merge(self, spec: MatrixSpec, deltas: Deltas, state: Any) -> Merged:
        if not spec.plain:
            return self.method.merge(spec, deltas, state)
        if hasattr(self.method, "merge_plain"):
            return merge_plain(self.method, spec, deltas, state)
        weights = self.params.get("weight", (1.0,) * len(deltas))
        mean, why = weighted_sum(deltas, [w / len(deltas) for w in weights], spec.shape)
        return Merged(mean, {"route": f"mean; {why}" if why else "mean"})

    @property
    def scale(self) -> float:
        """What merged task vectors are multiplied with."""
        return float(self.params.get("lambda", 1.0)) * self.factor


def batches(places: Iterable[Place]) -> Iterator[list[Place]]:
    """Consecutive modules whose factors, in float32, take at most 128 MiB together; at least one each."""
    batch: list[Place] = []
    size = 0
    for place in places:
        own = 4 * sum(place.site.shape) * sum(place.ranks)
        if batch and size + own > _BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(place)
        size += own
    if batch:
        yield batch


def _scaled(merged: Merged, scale: float) -> Merged:
    if scale == 1.0:
        return merged
    delta = merged.delta
    return replace(merged, delta=Factors(delta.b * scale, delta.a) if isinstance(delta, Factors) else delta * scale)


def bind_job(
    method: str,
    arguments: Mapping[str, Any],
    weights: Any,
    adapters: Sequence[Adapter],
    dialect: str,
    seed: int,
    device: torch.device | str = "cpu",
) -> Job:
    """The method with its parameters, before the adapters are aligned.

    Raises
    ------
    ArgumentError : unknown method, parameter or dialect, unusable values, too few or too many adapters.
    """
    if not isinstance(method, str):
        raise ArgumentError("method is not a name", code="method.unknown", expected="a string", got=repr(method))
    chosen = get_matrix(method, "adapters")
    given = {name: plain(value) for name, value in arguments.items()}
    if weights is not None:
        given["weights"] = plain(weights)
    params = bind_matrix(chosen, given, len(adapters), dialect)
    wants = wants_of(chosen, params, dialect)
    notes: tuple[str, ...] = ()
    if wants.peft and dialect == "peft" and len(adapters) == 1 and chosen.info.name != "linear":
        notes = (f"dialect peft: a single adapter is merged by linear instead of {chosen.info.name}, at its own rank",)
        chosen = get_matrix("linear", "adapters")
        params = {p.name: params[p.name] for p in chosen.info.params if p.name in params}
        wants = wants_of(chosen, params, dialect)
    return Job(chosen, params, dialect, seed, wants, adapters, device, notes=notes)


def plain(value: Any) -> Any:
    """Numbers and lists out of arrays, array scalars and small tensors; anything else as it is."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        if value and all(isinstance(v, str) for v in value):
            return ",".join(value)  # patterns
        return [v.tolist() if hasattr(v, "tolist") else v for v in value]
    return value
