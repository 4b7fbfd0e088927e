"""What a user may choose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..._backends.dispatch import NAMES
from ...ops.arguments import check_choice, check_integer

__all__ = ["Options", "options"]


@dataclass(frozen=True)
class Options:
    """See :func:`mergekernels.integrations.mergekit.enable`."""

    seed: int | None
    nan: Literal["error", "propagate"]
    backend: str | None
    threads: int | None


def options(seed: int | None, nan: str, backend: str | None, threads: int | None) -> Options:
    """The options, checked.

    Raises
    ------
    ArgumentError : one is not usable.
    """
    if seed is not None:
        check_integer(seed, 0, 1 << 64, "seed")
    check_choice(nan, ("error", "propagate"), "nan")
    if backend is not None:
        check_choice(backend, NAMES, "backend")
    if threads is not None:
        check_integer(threads, 1, 1025, "threads")
    if nan == "error":
        return Options(seed, "error", backend, threads)
    return Options(seed, "propagate", backend, threads)
