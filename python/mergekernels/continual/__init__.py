"""Merging a stream of models (OPCM): a state on disk into which the next model is merged."""

from .state import Continual
from .step import continual_merge

__all__ = ["Continual", "continual_merge"]
