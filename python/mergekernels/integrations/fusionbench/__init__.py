"""FusionBench with these kernels: classes for the `_target_` of its configurations, or its own functions replaced.

Classes: SimpleAverage, TaskArithmetic, TIES, DareSimpleAverage, DareTaskArithmetic, DareTIES, TSVM, IsoC, IsoCTS, OPCM,
OPCMForCLIP, RegMean, RegMeanForCLIP, RegMeanForGPT2. Each takes the parameters of FusionBench's own. FusionBench is
imported when a class is asked for, or by :func:`enable`.
"""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._stats import Calls

if TYPE_CHECKING:
    from .dare import DareSimpleAverage, DareTaskArithmetic, DareTIES
    from .linear import SimpleAverage, TaskArithmetic
    from .opcm import OPCM, OPCMForCLIP
    from .regmean import RegMean, RegMeanForCLIP, RegMeanForGPT2
    from .spectral import TSVM, IsoC, IsoCTS
    from .ties import TIES

__all__ = [
    "OPCM",
    "TIES",
    "TSVM",
    "DareSimpleAverage",
    "DareTIES",
    "DareTaskArithmetic",
    "IsoC",
    "IsoCTS",
    "OPCMForCLIP",
    "RegMean",
    "RegMeanForCLIP",
    "RegMeanForGPT2",
    "SimpleAverage",
    "TaskArithmetic",
    "config_path",
    "disable",
    "enable",
    "enabled",
    "reset_stats",
    "stats",
]

_HOME = {
    "OPCM": "opcm",
    "TIES": "ties",
    "TSVM": "spectral",
    "DareSimpleAverage": "dare",
    "DareTIES": "dare",
    "DareTaskArithmetic": "dare",
    "IsoC": "spectral",
    "IsoCTS": "spectral",
    "OPCMForCLIP": "opcm",
    "RegMean": "regmean",
    "RegMeanForCLIP": "regmean",
    "RegMeanForGPT2": "regmean",
    "SimpleAverage": "linear",
    "TaskArithmetic": "linear",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def enable() -> None:
    """Serves FusionBench's own algorithms from now on, in all threads: the functions of TSV-M, Iso-C, Iso-CTS, TIES
    and RegMean.

    Raises :class:`mergekernels.errors.ToolError` if FusionBench is not one that is known; it is then left untouched.
    """
    from .seams import Options, integration

    integration.enable(Options())


def disable() -> None:
    """Puts FusionBench's own functions back."""
    from .seams import integration

    integration.disable()


def enabled() -> AbstractContextManager[None]:
    """Enabled inside a ``with``, and as before afterwards."""
    from .seams import Options, integration

    return integration.enabled(Options())


def stats() -> Calls:
    """What was served here and what went to FusionBench's own code, and why, since :func:`enable`: one call is one
    tensor, of TIES one merge.
    """
    from .seams import integration

    return integration.calls()


def reset_stats() -> None:
    """All counts back to zero."""
    from .seams import integration

    integration.stats.reset()


def config_path() -> str:
    """The folder of the configurations that come with this package, for ``hydra.searchpath``."""
    return str(Path(__file__).parent / "config")
