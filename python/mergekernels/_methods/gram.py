"""The skeleton of methods whose coefficients follow from the dot products of the inputs: measure once, write once.

Every iterate of such a method is a linear combination of the inputs, so all of its norms and angles follow from their
Gram matrix, in float64 on the host; memory is read twice, whatever the number of iterations.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from ..ops.program import Program, Table
from ..ops.sums import Gram, Segments, Sums, pair_slot
from .protocol import Coeffs, MethodInfo, Round, Spec, Stats

__all__ = ["RESOLUTION", "Combination", "Combine", "Rule", "combination", "cosine", "exact_sum", "norm_of", "symmetric"]

RESOLUTION = 2.0**-46
"""What float64 sums cannot tell from zero, relative to the magnitudes that went into them."""

Rule = Callable[[Sequence[float]], Sequence[float]]
"""From the dot products of the pairs i <= j, row by row (all finite), to one coefficient per input."""


@dataclass(frozen=True)
class Combination(Coeffs):
    """The coefficients of a linear combination: model by model, for each its segments. axis, length : see `Table`."""

    values: array[float] = field(default_factory=lambda: array("d"))
    axis: Literal["tensor", "rows", "columns"] = "tensor"
    length: int = 1


class Combine(ABC):
    """A method that combines its inputs (with a base: adds a combination of the deltas to it) by a rule on their Gram.

    A subclass gives the rule, and segments where it does not serve the whole tensor at once.
    """

    info: MethodInfo

    def check(self, params: Mapping[str, Any], dialect: str, nan: str) -> list[str]:
        """Every combination works."""
        return []

    def scope(self, params: Mapping[str, Any], dialect: str) -> Literal["tensor", "model"]:
        """Each tensor by itself."""
        return "tensor"

    def segments(self, spec: Spec) -> Segments:
        """One rule for the whole tensor."""
        return Segments("tensor", 1, spec.n)

    @abstractmethod
    def rule(self, spec: Spec) -> Rule:
        """The rule for the parameters of `spec`."""

    def start(self, spec: Spec) -> Round | Coeffs:
        """The Gram of the inputs, or of their deltas where there is a base."""
        if spec.scope.n == 0:
            return Combination(values=array("d", [0.0] * spec.num_models))
        return Round("gram", self.scope(spec.params, spec.dialect), gram=Gram(self.segments(spec), spec.has_base))

    def resolve(self, spec: Spec, round_: Round, stats: Stats, visited: int) -> Round | Coeffs:
        """The rule, for each segment."""
        assert round_.gram is not None
        segments = round_.gram.segments
        sums = cast(Sums, stats)
        slots = spec.num_models * (spec.num_models + 1) // 2
        if len(sums.values) > 1:  # the tensors of a model, whose sums add up exactly rounded
            tensors = range(len(sums.values))
            totals = [exact_sum([sums.number(slot, i) for i in tensors]) for slot in range(slots)]
            dots = [array("d", [total]) for total in totals]
        else:
            dots = [sums.segments(slot) for slot in range(slots)]
        rule = self.rule(spec)
        unknown = (math.nan,) * spec.num_models
        rows = []
        for entries in zip(*dots, strict=True):
            total = sum(entries)
            # A NaN or an infinity spoils its segment and no other.
            rows.append(_ruled(rule, entries, unknown) if total - total == 0.0 else unknown)
        values = array("d")
        for column in zip(*rows, strict=True):
            values.extend(column)
        length = segments.length if segments.axis == "rows" else segments.count
        return Combination(values=values, axis=segments.axis, length=length)

    def apply(self, spec: Spec, coeffs: Coeffs) -> Program:
        """The combination, on top of the base if there is one."""
        return combination(spec, coeffs)


def _ruled(rule: Rule, entries: Sequence[float], unknown: Sequence[float]) -> Sequence[float]:
    """The coefficients of one segment; `unknown` where numbers on the way to them leave the range of doubles."""
    try:
        return rule(entries)
    except (ArithmeticError, ValueError):  # math's errors: too large a number, or no number at all
        return unknown


def combination(spec: Spec, coeffs: Coeffs, scale: float = 1.0) -> Program:
    """The program of a `Combination`."""
    assert isinstance(coeffs, Combination)
    keep = (None,) * spec.num_models
    weights = (1.0,) * spec.num_models
    if coeffs.axis == "tensor":
        if all(map(math.isfinite, coeffs.values)):
            return Program(tuple(coeffs.values), keep, base=spec.has_base, scale=scale)
        # The weights of a program are finite; a table spreads a NaN over the tensor as `nan: propagate` asks.
        table = Table("rows", max(1, spec.n), coeffs.values)
    else:
        table = Table(coeffs.axis, coeffs.length, coeffs.values)
    return Program(weights, keep, base=spec.has_base, table=table, scale=scale)


def symmetric(entries: Sequence[float], num_models: int) -> list[list[float]]:
    """The full matrix."""
    return [[entries[pair_slot(i, j, num_models)] for j in range(num_models)] for i in range(num_models)]


def norm_of(coefficients: Sequence[float], gram: Sequence[Sequence[float]]) -> tuple[float, float]:
    """(norm of a combination, what rounding of the sums alone may make of a norm of zero)."""
    terms = [
        a * b * g for a, row in zip(coefficients, gram, strict=True) for b, g in zip(coefficients, row, strict=True)
    ]
    magnitude = math.fsum(map(abs, terms))
    return math.sqrt(max(0.0, math.fsum(terms))), math.sqrt(RESOLUTION * magnitude)


def cosine(dot: float, norm_a: float, norm_b: float) -> float:
    """Dot / (norm_a * norm_b), in [-1, 1], without overflow of the product."""
    return max(-1.0, min(1.0, dot / norm_a / norm_b))


def exact_sum(terms: Sequence[float]) -> float:
    """The sum, rounded once; NaN where it has none."""
    try:
        return math.fsum(terms)
    except (OverflowError, ValueError):  # infinities of both signs, or too large a sum
        return math.nan
