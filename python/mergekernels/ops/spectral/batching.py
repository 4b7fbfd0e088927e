"""Lists of matrices: one or many arguments, and threads over the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

__all__ = ["one_or_many"]

A = TypeVar("A")
R = TypeVar("R")


def one_or_many(x: Any, each: Callable[[Any, str], R]) -> Any:
    """each(x, "X") for one matrix, the list of each(x[i], "X[i]") for a list or tuple of them."""
    if isinstance(x, (list, tuple)):
        return [each(item, f"X[{i}]") for i, item in enumerate(x)]
    return each(x, "X")


def in_order(items: Sequence[A], each: Callable[[A], R]) -> list[R]:
    """The results of all items."""
    return [each(item) for item in items]
