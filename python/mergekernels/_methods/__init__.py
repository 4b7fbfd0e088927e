"""The methods. Each is one file over shared ops; this table is all that knows their names."""

from __future__ import annotations

from ..errors import ArgumentError, nearest
from .arcee_fusion import ArceeFusion
from .breadcrumbs import Breadcrumbs, BreadcrumbsTies
from .consensus import Consensus, TallMask
from .dare import DareLinear, DareTies
from .della import Della, DellaLinear
from .deme import Deme
from .emr import Emr
from .expo import Expo
from .fisher import Fisher
from .from_norm import FromNorm
from .karcher import Karcher
from .linear import Linear
from .magmax import Magmax
from .model_stock import ModelStock
from .multislerp import Multislerp
from .nearswap import Nearswap
from .nuslerp import Nuslerp
from .passthrough import Passthrough
from .pcb import Pcb
from .pcgrad import Pcgrad
from .protocol import Method
from .ram import Ram, RamPlus
from .sce import Sce
from .slerp import Slerp
from .task_arithmetic import TaskArithmetic
from .ties import Ties

__all__ = ["get", "names"]

_ALL: tuple[Method, ...] = (
    Linear(),
    TaskArithmetic(),
    Ties(),
    DareLinear(),
    DareTies(),
    DellaLinear(),
    Della(),
    Breadcrumbs(),
    BreadcrumbsTies(),
    Sce(),
    Ram(),
    RamPlus(),
    Nearswap(),
    ArceeFusion(),
    Magmax(),
    Emr(),
    Consensus(),
    TallMask(),
    Expo(),
    Deme(),
    Pcb(),
    Fisher(),
    Passthrough(),
    Slerp(),
    Nuslerp(),
    Multislerp(),
    Karcher(),
    ModelStock(),
    Pcgrad(),
    FromNorm(),
)
_METHODS: dict[str, Method] = {m.info.name: m for m in _ALL}


def names() -> list[str]:
    """The names of all methods, as recipes write them."""
    return list(_METHODS)


def get(name: str) -> Method:
    """The method called `name`.

    Raises
    ------
    ArgumentError : there is none; the message lists all and the nearest.
    """
    method = _METHODS.get(name) if isinstance(name, str) else None
    if method is None:
        from .matrix_table import matrix_names  # which imports this package

        known = [*_METHODS, *matrix_names("models")]
        raise ArgumentError(
            "unknown merge method",
            code="method.unknown",
            expected="one of " + ", ".join(known),
            got=repr(name),
            hint=nearest(name, known) if isinstance(name, str) else None,
        )
    return method
