"""What the backends share of reading requests."""

from __future__ import annotations

from collections.abc import Sequence

from ..ops.keep import Keep
from ..ops.program import Program
from ..ops.sweeps import Sweep
from ..tensors import TensorView

__all__ = ["per_search", "points"]


def per_search(request: Sweep, models: Sequence[TensorView | None]) -> list[TensorView | None]:
    """The tensor that each search looks at, None for a search that is left out."""
    return [None if i is None else models[i.model] for i in request.intervals]


def points(program: Program) -> list[Keep | None]:
    """The rules of a program that has points only."""
    return [k if isinstance(k, Keep) else None for k in program.keep]
