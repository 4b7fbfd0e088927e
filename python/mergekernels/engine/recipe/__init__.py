"""The recipe language: mergekit's YAML to a :class:`~mergekernels.engine.resolved.ResolvedMerge`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .load import Recipe, load_recipe

if TYPE_CHECKING:
    from ..resolved import ResolvedMerge

__all__ = ["Recipe", "load_recipe", "resolve"]


def resolve(recipe: Recipe, *, seed: int | None = None, located: Mapping[str, Path] | None = None) -> ResolvedMerge:
    """Reads the headers of all inputs and resolves `recipe` to numbers; raises PlanError with all problems at once.

    located : where models are, by their name in the recipe; the others are looked for.
    """
    from .resolution import resolve as run

    return run(recipe, seed=seed, located=located)
