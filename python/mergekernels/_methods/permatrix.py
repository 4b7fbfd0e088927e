"""What methods over matrices share that merge one matrix after the other without measuring any."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from .matrix import MatrixSpec, Merged
from .protocol import MethodInfo

if TYPE_CHECKING:
    from ..adapters.model import Delta

__all__ = ["MANY", "PerMatrix"]

MANY = 1 << 20
"""max_models of methods that have no limit of their own: adapters may be many, models are at most 64 per call."""


class PerMatrix(ABC):
    """A method that merges one matrix after the other; subclasses with scope "model" override the rest."""

    info: MethodInfo

    def check(self, params: Mapping[str, Any], dialect: str) -> list[str]:
        """Every combination works."""
        return []

    def scope(self, params: Mapping[str, Any], dialect: str) -> Literal["tensor", "model"]:
        """One matrix at a time."""
        return "tensor"

    def measure(self, spec: MatrixSpec, deltas: Sequence[Delta], state: Any = None) -> Any:
        """Never called: nothing is measured."""
        return None

    def resolve(self, params: Mapping[str, Any], measured: Mapping[str, Any], state: Any = None) -> Any:
        """Never called: nothing is measured."""
        return None

    @abstractmethod
    def merge(self, spec: MatrixSpec, deltas: Sequence[Delta], state: Any = None) -> Merged:
        """The merged task vector of one matrix."""
