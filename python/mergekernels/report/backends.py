"""The table of backends as text."""

from __future__ import annotations

from collections.abc import Sequence

from .._backends.status import BackendStatus
from .text import table

__all__ = ["backends_text"]


def backends_text(backends: Sequence[BackendStatus]) -> str:
    """One line per backend, in the order in which `auto` would choose them."""
    return table(((b.name, "yes" if b.available else "no", b.detail) for b in backends), ("backend", "runs here", ""))
