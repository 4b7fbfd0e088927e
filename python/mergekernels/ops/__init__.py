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
    from .spectral.cuts import rank_cut
    from .spectral.lowrank import LowRank, lowrank
    from .spectral.mix import Mix
    from .spectral.nuclear import nuclear_norm
    from .spectral.osrm import osrm_init
    from .spectral.polar_factor import Polar, polar
    from .spectral.projections import project
    from .spectral.qr import TallQR, tall_qr
    from .spectral.sharded import Sharded
    from .spectral.shrink import SoftThreshold, soft_threshold
    from .spectral.small import SmallEigh, SmallSVD, small_eigh, small_svd
    from .spectral.stacking import balance, stack
    from .spectral.subspace import Subspace, subspace
    from .spectral.tiles import FactorTiles

__all__ = [
    "FactorTiles",
    "Keep",
    "LowRank",
    "Mix",
    "Polar",
    "Program",
    "Sharded",
    "SmallEigh",
    "SmallSVD",
    "SoftThreshold",
    "Subspace",
    "TallQR",
    "balance",
    "combine",
    "concrete",
    "lowrank",
    "nuclear_norm",
    "osrm_init",
    "pcgrad",
    "polar",
    "project",
    "rank_cut",
    "seg_dot",
    "select",
    "small_eigh",
    "small_svd",
    "soft_threshold",
    "stack",
    "stream",
    "subspace",
    "tall_qr",
]

_SPECTRAL = {
    "FactorTiles": "tiles",
    "LowRank": "lowrank",
    "Mix": "mix",
    "Polar": "polar_factor",
    "Sharded": "sharded",
    "SmallEigh": "small",
    "SmallSVD": "small",
    "SoftThreshold": "shrink",
    "Subspace": "subspace",
    "TallQR": "qr",
    "balance": "stacking",
    "lowrank": "lowrank",
    "nuclear_norm": "nuclear",
    "osrm_init": "osrm",
    "polar": "polar_factor",
    "project": "projections",
    "rank_cut": "cuts",
    "small_eigh": "small",
    "small_svd": "small",
    "soft_threshold": "shrink",
    "stack": "stacking",
    "subspace": "subspace",
    "tall_qr": "qr",
}


def __getattr__(name: str) -> Any:
    if name not in _SPECTRAL:
        raise AttributeError(f"module 'mergekernels.ops' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(f".spectral.{_SPECTRAL[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
