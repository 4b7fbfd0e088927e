"""The public list of methods."""

from __future__ import annotations

from . import get, names
from .protocol import MethodInfo

__all__ = ["methods"]


def methods() -> dict[str, MethodInfo]:
    """The descriptions of all methods: name -> purpose, formula, parameters, dialects, deviations, passes, source."""
    return {name: get(name).info for name in names()}
