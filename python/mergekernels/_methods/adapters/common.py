"""What methods of adapters share: their parameters, and methods that merge module by module without measuring."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from ..common import LAMBDA
from ..matrix import MatrixSpec, Merged
from ..protocol import MethodInfo, Param

if TYPE_CHECKING:
    from ...adapters.model import Delta

__all__ = ["FOLD_SCALE", "LAMBDA", "MANY", "WEIGHT", "PerModule"]

MANY = 1 << 20
"""max_models of methods that have no limit of their own."""

WEIGHT = Param("weight", "float", "weight of each adapter", python="weights", per_model=True, default=1.0)

FOLD_SCALE = Param(
    "fold_scale",
    "bool",
    "multiply each adapter by its alpha / r (rsLoRA: alpha / sqrt(r)); true, in the dialect code, which ignores it, "
    "false",
    default=None,
)


class PerModule(ABC):
    """A method that merges one module after the other and measures nothing first."""

    info: MethodInfo

    def check(self, params: Mapping[str, Any], dialect: str) -> list[str]:
        """Every combination works."""
        return []

    def scope(self, params: Mapping[str, Any], dialect: str) -> Literal["tensor", "model"]:
        """One module at a time."""
        return "tensor"

    def measure(self, spec: MatrixSpec, deltas: Sequence[Delta], state: Any = None) -> Any:
        """Never called: nothing is measured."""
        return None

    def resolve(self, params: Mapping[str, Any], measured: Mapping[str, Any], state: Any = None) -> Any:
        """Never called: nothing is measured."""
        return None

    @abstractmethod
    def merge(self, spec: MatrixSpec, deltas: Sequence[Delta], state: Any = None) -> Merged:
        """The merged task vector of one module."""
