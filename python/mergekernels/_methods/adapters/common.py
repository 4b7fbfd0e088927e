"""Parameters that methods of adapters share."""

from __future__ import annotations

from ..common import LAMBDA
from ..permatrix import MANY
from ..protocol import Param

__all__ = ["FOLD_SCALE", "LAMBDA", "MANY", "WEIGHT"]

WEIGHT = Param("weight", "float", "weight of each adapter", python="weights", per_model=True, default=1.0)

FOLD_SCALE = Param(
    "fold_scale",
    "bool",
    "multiply each adapter by its alpha / r (rsLoRA: alpha / sqrt(r)); true, in the dialect code, which ignores it, "
    "false",
    default=None,
)
