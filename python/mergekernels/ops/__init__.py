"""Public tensor functions. Each checks its arguments, picks a backend and calls it; none knows a file or a method.

Functions over whole matrices are in `spectral` and load on first use: they need torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .combine import combine, concrete, seg_dot
from .keep import Keep
from .program import Program
from .select import select
from .stream import stream
from .surgery import pcgrad

if TYPE_CHECKING:
    from .spectral.lowrank import LowRank, lowrank
    from .spectral.mix import Mix
    from .spectral.osrm import osrm_init
    from .spectral.projections import project
    from .spectral.stacking import balance, stack
    from .spectral.subspace import Subspace, subspace
    from .spectral.tiles import FactorTiles

__all__ = [
    "FactorTiles",
    "Keep",
    "LowRank",
    "Mix",
    "Program",
    "Subspace",
    "balance",
    "combine",
    "concrete",
    "lowrank",
    "osrm_init",
    "pcgrad",
    "project",
    "seg_dot",
    "select",
    "stack",
    "stream",
    "subspace",
]

_SPECTRAL = {
    "FactorTiles": "tiles",
    "LowRank": "lowrank",
    "Mix": "mix",
    "Subspace": "subspace",
    "balance": "stacking",
    "lowrank": "lowrank",
    "osrm_init": "osrm",
    "project": "projections",
    "stack": "stacking",
    "subspace": "subspace",
}


def __getattr__(name: str) -> Any:
    if name not in _SPECTRAL:
        raise AttributeError(f"module 'mergekernels.ops' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(f".spectral.{_SPECTRAL[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
