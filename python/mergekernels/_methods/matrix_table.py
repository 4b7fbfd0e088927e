"""The methods over matrices. Each is one file; this table is all that knows their names.

Methods of models and methods of adapters are two name spaces: `ties` of adapters is not `ties` of models.
"""

from __future__ import annotations

from typing import Literal

from ..errors import ArgumentError, nearest
from .adapters.cat import Cat, Svd
from .adapters.core_space import CoreSpace
from .adapters.from_norm import FromNorm
from .adapters.linear import Linear
from .adapters.lora_lego import LoraLego
from .adapters.lori import Lori
from .adapters.pruned import PRUNED
from .adapters.robust_merge import RobustMerge
from .adapters.shared_frame import CompressThenMerge, TuckerMerge
from .adapters.tc_lora import TcLora
from .matrix import MatrixMethod
from .spectral.iso import IsoC, IsoCts
from .spectral.knots import Knots
from .spectral.lore import Lore
from .spectral.low_rank import LowRankSum
from .spectral.opcm import Opcm
from .spectral.regmean import RegMean
from .spectral.star import Star
from .spectral.tsv_m import TsvM

__all__ = ["get_matrix", "matrix_names"]

# One line per method, in the order in which lists show them.
_ALL: tuple[MatrixMethod, ...] = (
    Cat(),
    Svd(),
    Linear(),
    *PRUNED,
    CoreSpace(),
    Knots(),
    RobustMerge(),
    Lori(),
    FromNorm(),
    Lore(),
    TcLora(),
    CompressThenMerge(),
    TuckerMerge(),
    LoraLego(),
    TsvM(),
    IsoC(),
    IsoCts(),
    Opcm(),
    Star(),
    LowRankSum(),
    RegMean(),
)


def matrix_names(takes: Literal["models", "adapters"]) -> list[str]:
    """The names of the methods over matrices that merge `takes`."""
    return [m.info.name for m in _ALL if takes in m.info.takes]


def get_matrix(name: str, takes: Literal["models", "adapters"]) -> MatrixMethod:
    """The method over matrices called `name` that merges `takes`.

    Raises
    ------
    ArgumentError : there is none; the message lists all and the nearest.
    """
    for method in _ALL:
        if method.info.name == name and takes in method.info.takes:
            return method
    known = matrix_names(takes)
    raise ArgumentError(
        f"unknown method for {takes}",
        code="method.unknown",
        expected="one of " + ", ".join(known),
        got=repr(name),
        hint=nearest(name, known) if isinstance(name, str) else None,
    )
