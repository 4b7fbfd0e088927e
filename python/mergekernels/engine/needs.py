"""What a pass over one tensor needs before it can run: tile size, bytes of statistics, features of a backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .._keeping import kept_bytes
from .._methods.protocol import Coeffs, Method, Round, Spec, alone
from ..ops.program import Program, Table
from ..ops.selection import Selection
from ..ops.sums import Segments
from ..ops.sweeps import NUM_BINS
from ..tensors import CANONICAL_BLOCK
from .memory import ENTRY_BYTES, MIN_ENTRIES, WAVE_COPIES
from .tiling import least_of_gram, roomy_of_gram, slab_unit

__all__ = [
    "Needs",
    "first_measured",
    "is_sum",
    "num_slots",
    "of_coeffs",
    "of_program",
    "of_round",
    "of_scope",
    "of_tensor",
    "sum_segments",
]

_WORD = 8

_OBJECTS = 256
"""Bytes of the objects that hold the coefficients of one model in one tensor."""


@dataclass(frozen=True)
class Needs:
    """tile : elements of the smallest tile. roomy : elements of a tile beyond the usual size that are of use, or 0.

    statistics : bytes without which the pass cannot run. entries : bytes that it makes use of besides.
    features : see `Backend.FEATURES`.
    """

    tile: int
    roomy: int = 0
    statistics: int = 0
    entries: int = 0
    features: frozenset[str] = frozenset()

    def joined(self, other: Needs) -> Needs:
        """What serves both, one after the other."""
        return Needs(
            max(self.tile, other.tile),
            max(self.roomy, other.roomy),
            max(self.statistics, other.statistics),
            max(self.entries, other.entries),
            self.features | other.features,
        )


def is_sum(round_: Round) -> bool:
    """Whether a round yields sums of each tensor instead of one accumulator for all."""
    return round_.op in ("reduce", "gram", "divergence")


def num_slots(method: Method, spec: Spec, round_: Round) -> int:
    """How many sums a round takes over each segment."""
    if round_.op == "reduce":
        assert round_.reduce is not None
        return round_.reduce.num_slots(spec.num_models)
    return spec.num_models * (spec.num_models + 1) // 2 if round_.op == "gram" else 1


def sum_segments(spec: Spec, round_: Round) -> Segments:
    """The segments over which a round sums; a whole tensor is one segment of all its elements."""
    if round_.op == "gram":
        assert round_.gram is not None
        if round_.gram.segments.axis != "tensor":
            return round_.gram.segments
    if round_.op == "divergence":
        return Segments("rows", spec.n // round_.row_length, round_.row_length)
    return Segments("tensor", 1, spec.n)


def first_measured(method: Method, spec: Spec, state: Round | Coeffs) -> tuple[Method, Spec, Round | Coeffs]:
    """What measures a tensor first from `state` on: the method, the tensor as it sees it, and its state."""
    if isinstance(state, Round) and state.each is not None:
        spec = alone(spec)
        return state.each, spec, state.each.start(spec)
    return method, spec, state


def of_coeffs(method: Method, specs: Sequence[Spec], state: Round | Coeffs) -> int:
    """Bytes of the coefficients of single tensors that are held until all are written; 0 if they are common to all."""
    if not (isinstance(state, Round) and state.op == "each"):
        return 0
    total = 0
    for spec in specs:
        _, own, first = first_measured(method, spec, state)
        segments = sum_segments(own, first).count if isinstance(first, Round) and is_sum(first) else 1
        total += spec.num_models * (_OBJECTS + _WORD * segments)
    return total


def of_round(method: Method, spec: Spec, round_: Round, itemsize: int) -> Needs:
    """What one round over one tensor needs. itemsize : bytes of the widest source's elements."""
    if round_.op == "select":
        assert round_.selection is not None
        return _of_selection(round_.selection, spec)
    if round_.op == "divergence":
        rows = spec.n // round_.row_length
        return Needs(min(spec.n, round_.row_length), statistics=3 * _WORD * rows, features=frozenset({"divergence"}))
    segments, slots = sum_segments(spec, round_), num_slots(method, spec, round_)
    # The sums of blocks, and folded those of segments.
    size = _WORD * slots * segments.count * (_blocks(segments.length) + 1)
    if round_.op == "gram":
        tile, roomy = least_of_gram(segments, spec.n), roomy_of_gram(segments, spec.n, itemsize)
        return Needs(tile, roomy, size, features=frozenset({"gram"}))
    assert round_.coeffs is not None
    program = method.apply(spec, round_.coeffs)
    needs = of_program(program, spec)
    if round_.op == "votes":
        return needs
    # What it keeps can only wait for the writing pass of a tensor that is its own scope.
    kept = kept_bytes(program, spec.n) if round_.scope == "tensor" else 0
    return Needs(needs.tile, 0, size + needs.statistics, kept, needs.features | {"reduce"})


def _of_selection(selection: Selection, spec: Spec) -> Needs:
    searches = sum(s is not None for s in selection.searches)
    entries = 0
    if selection.scope.n == spec.n:
        # Ties are common, so that an interval of keys may hold several percent of a tensor.
        entries = ENTRY_BYTES * searches * min(spec.n, spec.n // 20 + (1 << 17))
    features = frozenset() if selection.key == "delta" else frozenset({f"key:{selection.key}"})
    least = searches * (_WORD * NUM_BINS + ENTRY_BYTES * MIN_ENTRIES) + _table(selection.rows)
    return Needs(min(spec.n, CANONICAL_BLOCK), 0, least, entries, features)


def of_program(program: Program, spec: Spec) -> Needs:
    """What the writing pass needs: block sums for the norms, its tables, and pieces of whole slabs."""
    size = _WORD * len(program.weights) * _blocks(spec.n) + _table(program.table) + _table(program.importance)
    return Needs(min(spec.n, slab_unit(program)), 0, size, features=program.features)


def of_tensor(method: Method, spec: Spec, state: Round | Coeffs, itemsize: int) -> Needs:
    """What a tensor needs from `state` on, as far as it shows; later rounds are allowed for by their usual size."""
    if isinstance(state, Coeffs):
        return of_program(method.apply(spec, state), spec)
    if state.op == "each":
        needs = of_tensor(*first_measured(method, spec, state), itemsize)
        # The sums that follow: |sum of the models|, |result|.
        size = needs.statistics + 2 * _WORD * (_blocks(spec.n) + 1)
        return needs.joined(Needs(needs.tile, statistics=size, features=frozenset({"reduce"})))
    needs = of_round(method, spec, state, itemsize)
    models, blocks = spec.num_models, _blocks(spec.n)
    # The norms of the writing pass, a reduction of four quantities of each model, a second selection.
    later = max(_WORD * (4 * models + 2) * blocks, models * (_WORD * NUM_BINS + ENTRY_BYTES * MIN_ENTRIES))
    entries = 0
    if state.op == "gram":
        # Coefficients by segment follow from dot products by segment.
        later = _WORD * models * (blocks + 2 * sum_segments(spec, state).count)
    elif state.op == "divergence":
        later += needs.statistics
        entries = 4 * ENTRY_BYTES * min(spec.n, spec.n // 20 + (1 << 17))
    return needs.joined(Needs(min(spec.n, CANONICAL_BLOCK), 0, later, entries))


def of_scope(method: Method, specs: Sequence[Spec], round_: Round) -> int:
    """Bytes of statistics that a round over a whole model can fill, all copies together."""
    if round_.op == "votes":
        return 0
    if round_.op == "each":
        # The sums that follow: |sum of the models|, |result|.
        return WAVE_COPIES * _WORD * 2 * len(specs)
    if round_.op == "select":
        assert round_.selection is not None
        searches = sum(s is not None for s in round_.selection.searches)
        most = max(round_.selection.scope.n, MIN_ENTRIES)
        return WAVE_COPIES * searches * (_WORD * NUM_BINS + ENTRY_BYTES * most)
    numbers = sum(num_slots(method, s, round_) * sum_segments(s, round_).count for s in specs)
    return WAVE_COPIES * _WORD * numbers


def _blocks(n: int) -> int:
    return -(-n // CANONICAL_BLOCK)


def _table(table: Table | None) -> int:
    return 0 if table is None else _WORD * len(table.values)
