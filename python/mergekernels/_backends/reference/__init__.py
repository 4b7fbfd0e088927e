"""The reference backend: plain torch, slow and short. Where a backend and this differ, the backend is wrong."""

from __future__ import annotations

from collections.abc import Sequence

from ...tensors import TensorView
from .learned import mask_merge, mask_sum, seg_dot
from .select import sweep
from .stream import stream
from .sums import divergence, gram, mark, reduce

__all__ = [
    "FEATURES",
    "divergence",
    "gram",
    "mark",
    "mask_merge",
    "mask_sum",
    "reduce",
    "seg_dot",
    "stream",
    "sweep",
    "why_not",
]

FEATURES = frozenset(
    {
        *("band", "draw", "rank", "marked", "joint", "importance_key", "factors", "table", "groups", "subtract"),
        *(
            "key:variance",
            "key:importance",
            "key:balance",
            "key:drawn",
            "gram",
            "reduce",
            "reduce:kept",
            "divergence",
            "mark",
        ),
        *("vote", "merge", "divisor", "alone", "limit", "useful", "balance", "importance", "anchor"),
        *("seg_dot", "concrete"),
    }
)
"""See dispatch.Backend."""


def why_not(op: str, views: Sequence[TensorView]) -> str | None:
    """The reference serves everything that torch can hold."""
    return None
