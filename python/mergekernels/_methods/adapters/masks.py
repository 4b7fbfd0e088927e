"""Masks of B by exact thresholds over groups of modules, one per adapter and group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ...ops.keep import KEEP_NOTHING, Keep
from ...ops.selection import Scope, Selection
from ...tensors import tensor_id
from ..matrix import Again

if TYPE_CHECKING:
    import torch

    from ..._backends.dispatch import Backend
    from ...ops.inputs import Inputs

__all__ = ["Masking", "Sizes", "Thresholds", "begin", "measure_masks", "next_masks"]

Key = tuple[int, str]
"""(number of the adapter, group)."""


@dataclass(frozen=True)
class Sizes:
    """What is known of a module before the first pass. numel : of B of each adapter. dtype : of the factors."""

    group: str
    numel: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Thresholds:
    """The point that the kept entries of each adapter and group pass; None keeps everything.

    groups : module -> group. wide : whether the points are of float64 magnitudes.
    """

    groups: Mapping[str, str]
    points: Mapping[Key, Keep | None]
    wide: bool = False

    def mask(self, name: str, adapter: int, b: torch.Tensor) -> torch.Tensor:
        """B with the entries below its threshold zero."""
        from ...ops import Program, stream

        point = self.points.get((adapter, self.groups[name]))
        if point is None or b.numel() == 0:
            return b
        x = (b.double() if self.wide else b).contiguous()
        return stream([x], Program((1.0,), (point,), base=False), name=name, out_dtype=b.dtype)

    def warnings(self, name: str) -> list[str]:
        """Adapters of which nothing is kept here."""
        group = self.groups[name]
        empty = [t for (t, g), point in self.points.items() if g == group and point is KEEP_NOTHING]
        return [f"{name}: sparsity leaves adapter {t} no entry" for t in sorted(empty)]


@dataclass(frozen=True)
class Masking(Again):
    """Passes that are due. selections : those not done. wide : whether magnitudes are float64."""

    groups: Mapping[str, str]
    selections: Mapping[Key, Selection]
    wide: bool
    points: Mapping[Key, Keep | None] = field(default_factory=dict)


def begin(measured: Mapping[str, Sizes], keep: float) -> Masking | Thresholds:
    """The selections. keep : share of the entries that stay."""
    names = sorted(measured)
    members: dict[Key, list[str]] = {}
    for name in names:
        for t, numel in enumerate(measured[name].numel):
            if numel:
                members.setdefault((t, measured[name].group), []).append(name)
    wide = any(m.dtype == "torch.float64" for m in measured.values())
    selections: dict[Key, Selection] = {}
    points: dict[Key, Keep | None] = {}
    for key, inside in members.items():
        starts, n = [], 0
        for name in inside:
            starts.append(n)
            n += measured[name].numel[key[0]]
        k = int(keep * n)
        if 0 < k < n:
            scope = Scope(tuple(starts), tuple(tensor_id(name) for name in inside), n, "F64" if wide else "F32")
            selections[key] = Selection.of(((0, k),), scope, policy="all", seed=0, base=False)
        else:
            points[key] = KEEP_NOTHING if k == 0 else None
    return _next(Masking({name: measured[name].group for name in names}, selections, wide, points))


def _next(state: Masking) -> Masking | Thresholds:
    done = {key: s.points[0] for key, s in state.selections.items() if s.done}
    points = {**state.points, **done}
    rest = {key: s for key, s in state.selections.items() if not s.done}
    return replace(state, selections=rest, points=points) if rest else Thresholds(state.groups, points, state.wide)


def measure_masks(state: Masking, name: str, blocks: Sequence[torch.Tensor]) -> dict[Key, tuple[Any, int]]:
    """The passes that are due over the B of one module: key -> (statistics, entries visited)."""
    from ...ops.inputs import gather, num_threads
    from ...ops.select import new_stats, sweep_one

    found: dict[Key, tuple[Any, int]] = {}
    for t, b in enumerate(blocks):
        key = (t, state.groups[name])
        selection = state.selections.get(key)
        if selection is None or b.numel() == 0:
            continue
        inputs = gather([(b.double() if state.wide else b).contiguous()], None, name, 0)
        stats = new_stats(selection.sweep, max(1 << 16, min(b.numel(), 1 << 22)))
        # All equals of the threshold stay, so that the place of an entry in its scope does not matter.
        visited = sweep_one(selection, selection.sweep, stats, inputs, _backend(inputs), num_threads(None), 0)
        found[key] = (stats, visited)
    return found


def next_masks(state: Masking, measured: Mapping[str, Mapping[Key, tuple[Any, int]]]) -> Masking | Thresholds:
    """What follows from a pass over all modules."""
    from ...ops.select import new_stats

    advanced = {}
    for key, selection in state.selections.items():
        total = new_stats(selection.sweep, max(1 << 18, min(selection.scope.n // 16, 1 << 22)))
        visited = 0
        for name in sorted(measured):
            if key in measured[name]:
                stats, count = measured[name][key]
                total.merge(stats)
                visited += count
        advanced[key] = selection.advance(total, visited)
    return _next(replace(state, selections=advanced))


def _backend(inputs: Inputs) -> Backend:
    from ..._backends.dispatch import pick, requested

    return pick("stream", inputs.all_views, requested())[1]
