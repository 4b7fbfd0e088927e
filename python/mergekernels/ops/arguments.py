"""Checks of plain arguments: each error names the argument, what was expected and what came."""

from __future__ import annotations

import math
import operator
import struct
from collections.abc import Iterable, Sequence
from typing import Any

from ..errors import ArgumentError, nearest
from ..tensors import DType

__all__ = ["check_bool", "check_choice", "check_integer", "check_number", "check_range", "in_compute"]


def _refusal(name: str, expected: str, value: Any, tensor: str, hint: str | None = None) -> ArgumentError:
    got = repr(value)
    return ArgumentError(
        f"{name} is not usable",
        code=name.partition("[")[0],
        tensor=tensor or None,
        expected=expected,
        got=got if len(got) <= 80 else got[:77] + "...",
        hint=hint,
    )


def check_choice(value: Any, choices: Sequence[str], name: str, tensor: str = "") -> None:
    """Refuse what is not one of `choices` (two or more), with the nearest of them as a hint."""
    if not isinstance(value, str) or value not in choices:
        known = [repr(c) for c in choices]
        hint = nearest(value, choices) if isinstance(value, str) else None
        raise _refusal(name, ", ".join(known[:-1]) + f" or {known[-1]}", value, tensor, hint)


def check_bool(value: Any, name: str, tensor: str = "") -> None:
    """Refuse what is neither True nor False."""
    if not isinstance(value, bool):
        raise _refusal(name, "True or False", value, tensor)


def check_integer(value: Any, low: int, stop: int, name: str, tensor: str = "") -> int:
    """The value as an int in [low, stop); integers of other libraries count, booleans and floats do not."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or not low <= number < stop:
        end = f"2**{stop.bit_length() - 1})" if stop >= 1 << 32 else f"{stop - 1}]"
        raise _refusal(name, f"an integer in [{low}, {end}", value, tensor)
    return number


def check_number(value: Any, name: str, tensor: str = "") -> None:
    """Refuse what is not a finite int or float."""
    try:
        usable = not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value)
    except OverflowError:  # an int that no double holds
        usable = False
    if not usable:
        raise _refusal(name, "a finite number", value, tensor)


def in_compute(value: float, compute: DType) -> float:
    """A double rounded once to the compute dtype, F32 or F64; infinite beyond its range."""
    if compute.name == "F64":
        return value
    try:
        return float(struct.unpack("f", struct.pack("f", value))[0])
    except OverflowError:
        return math.copysign(math.inf, value)


def check_range(values: Iterable[float], compute: DType, name: str, tensor: str = "") -> None:
    """Refuse finite numbers that the compute dtype turns into infinities."""
    for value in values:
        if math.isinf(in_compute(value, compute)):
            raise ArgumentError(
                f"{name} is beyond the range of {compute}, in which these tensors are merged",
                code="range",
                tensor=tensor or None,
                expected="a magnitude below 2**128",
                got=repr(value),
                hint="Use a smaller number, or float64 inputs.",
            )
