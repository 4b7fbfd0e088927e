"""The reference backend: plain torch, slow and short. Where a backend and this differ, the backend is wrong."""

from __future__ import annotations

from collections.abc import Sequence

from ...tensors import TensorView
from .select import sweep
from .stream import stream

__all__ = ["FEATURES", "stream", "sweep", "why_not"]

FEATURES: frozenset[str] = frozenset()
"""See dispatch.Backend."""


def why_not(op: str, views: Sequence[TensorView]) -> str | None:
    """The reference serves everything that torch can hold."""
    return None
