"""Public tensor functions. Each checks its arguments, picks a backend and calls it; none knows a file or a method.

Functions over whole matrices are in `spectral`, over stacks of low-rank updates in `tensor`; they need torch and load
on first use.
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
    from .tensor.cluster import Clusters, cluster
    from .tensor.cp import CP, cp_als
    from .tensor.mttkrp import mttkrp
    from .tensor.tiled import TileStack
    from .tensor.tucker import Tucker, tucker

__all__ = [
    "CP",
    "Clusters",
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
    "TileStack",
    "Tucker",
    "balance",
    "cluster",
    "combine",
    "concrete",
    "cp_als",
    "lowrank",
    "mttkrp",
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
    "tucker",
]

_HOME = {
    "CP": "tensor.cp",
    "Clusters": "tensor.cluster",
    "FactorTiles": "spectral.tiles",
    "LowRank": "spectral.lowrank",
    "Mix": "spectral.mix",
    "Polar": "spectral.polar_factor",
    "Sharded": "spectral.sharded",
    "SmallEigh": "spectral.small",
    "SmallSVD": "spectral.small",
    "SoftThreshold": "spectral.shrink",
    "Subspace": "spectral.subspace",
    "TallQR": "spectral.qr",
    "TileStack": "tensor.tiled",
    "Tucker": "tensor.tucker",
    "balance": "spectral.stacking",
    "cluster": "tensor.cluster",
    "cp_als": "tensor.cp",
    "lowrank": "spectral.lowrank",
    "mttkrp": "tensor.mttkrp",
    "nuclear_norm": "spectral.nuclear",
    "osrm_init": "spectral.osrm",
    "polar": "spectral.polar_factor",
    "project": "spectral.projections",
    "rank_cut": "spectral.cuts",
    "small_eigh": "spectral.small",
    "small_svd": "spectral.small",
    "soft_threshold": "spectral.shrink",
    "stack": "spectral.stacking",
    "subspace": "spectral.subspace",
    "tall_qr": "spectral.qr",
    "tucker": "tensor.tucker",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mergekernels.ops' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
