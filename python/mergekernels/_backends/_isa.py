"""The instruction set of the C++ CPU backend."""

from __future__ import annotations

import os

from .. import _cpu
from ..errors import BackendError

__all__ = ["isa"]


def isa() -> str:
    """The instruction set in use: MERGEKERNELS_CPU_ISA, else the best that this machine has."""
    available = _cpu.isas()
    asked = os.environ.get("MERGEKERNELS_CPU_ISA", "")
    if not asked:
        return available[0]
    if asked not in available:
        raise BackendError(
            "the instruction set asked for cannot run here",
            code="backend.isa",
            expected="MERGEKERNELS_CPU_ISA to be one of " + ", ".join(available),
            got=asked,
            hint="Unset the variable to let the machine decide.",
        )
    return asked
