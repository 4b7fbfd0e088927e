"""Checks of the arguments that `lowrank` and `subspace` share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...errors import ArgumentError
from ._maps import Map

__all__ = ["check_size", "per_matrix"]


def per_matrix(x: Any, size: Any, name: str) -> tuple[bool, Sequence[Any], list[int | None]]:
    """Whether one matrix came, the list of matrices, and one size for each."""
    single = not isinstance(x, (list, tuple))
    items: Sequence[Any] = [x] if single else x
    sizes = list(size) if isinstance(size, Sequence) else [size] * len(items)
    if len(sizes) != len(items):
        raise ArgumentError(
            f"{name} must be one number or one per matrix",
            code=f"argument.{name}",
            expected=str(len(items)),
            got=str(len(sizes)),
        )
    return single, items, sizes


def check_size(x: Map, size: int | None, energy: float | None, name: str) -> int:
    """The largest number of values allowed, after checking it and the energy."""
    least = min(x.shape)
    if size is None and energy is None:
        raise ArgumentError(f"neither {name} nor energy is given", code=f"argument.{name}", expected="one or both")
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= least):
        raise ArgumentError(
            f"{name} is out of range",
            code=f"argument.{name}",
            expected=f"an integer from 0 to {least}, the smaller side of {x.shape[0]} x {x.shape[1]}",
            got=str(size),
        )
    if energy is not None and not 0.0 < energy <= 1.0:
        raise ArgumentError("energy is out of range", code="argument.energy", expected="(0, 1]", got=str(energy))
    return least if size is None else size
