"""Loading a recipe: text to a checked form that still names its models and lines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

from ...errors import MergeError, PlanError
from .source import Document, read

if TYPE_CHECKING:
    from .schema import RecipeSchema

__all__ = ["Recipe", "load_recipe"]


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. data : as written, for the manifest.

    problems : what is wrong with keys and types, if that was to be collected. whole : models, slices, base and method
    are there all the same, so that the inputs can be checked too.
    """

    schema: RecipeSchema
    document: Document
    lenient: bool = False
    warnings: tuple[str, ...] = ()
    problems: tuple[MergeError, ...] = ()
    whole: bool = True

    @property
    def data(self) -> Mapping[str, Any]:
        """The recipe as plain data."""
        data: Mapping[str, Any] = self.document.data
        return data

    @property
    def file(self) -> str:
        """The file that it came from, "" for a text or a mapping."""
        return self.document.file


def load_recipe(
    source: str | PathLike[str] | Mapping[str, Any], *, lenient: bool = False, collect: bool = False
) -> Recipe:
    """Reads and checks a recipe; opens no model.

    Parameters
    ----------
    source : path of a YAML file, YAML text (a string with a line break or ": "), or a mapping.
    lenient : unknown keys and parameters become warnings.
    collect : wrong keys and types are not raised; `resolve` raises them with what is wrong with the inputs.

    Raises
    ------
    RecipeError : names file, line, what was expected, what came and the nearest valid name.
    PlanError : several such problems at once.
    InputError : the file cannot be read.
    """
    from .schema import validate

    document = read(source)
    schema, warnings, problems, whole = validate(document, lenient=lenient)
    if problems and not collect:
        raise problems[0] if len(problems) == 1 else PlanError(problems)
    return Recipe(schema, document, lenient, tuple(warnings), tuple(problems), whole)
