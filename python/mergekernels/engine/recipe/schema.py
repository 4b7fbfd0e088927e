"""The shape of a recipe: which keys there are and of what type. Values of method parameters are checked later.

Checked by hand and not by a validation library, whose import alone takes a third of the command's start-up time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ...errors import MergeError, cut
from ..resolved import AdapterOutput
from . import values
from .source import Document
from .values import A_WRONG_VALUE, PLANNED, Loc, Reference, Wrong, nearest

__all__ = ["ModelEntry", "RecipeSchema", "SliceEntry", "SourceEntry", "ThenEntry", "validate"]


@dataclass(frozen=True)
class ModelEntry:
    """An entry of `models`."""

    model: Reference
    parameters: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class SourceEntry:
    """An entry of `sources`: layers first to end - 1 of a model."""

    model: Reference
    layer_range: tuple[int, int]
    parameters: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class SliceEntry:
    """An entry of `slices`."""

    sources: tuple[SourceEntry | None, ...]
    base_model: Reference | None = None
    parameters: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class ThenEntry:
    """An entry of `then`: a modifier and its parameters."""

    name: str
    parameters: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class RecipeSchema:
    """The top level. An entry that is wrong is None, here and in the lists of sources."""

    merge_method: str
    models: tuple[ModelEntry | None, ...] | None = None
    slices: tuple[SliceEntry | None, ...] | None = None
    base_model: Reference | None = None
    parameters: Mapping[str, Any] | None = None
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: Reference | None = None
    chat_template: str | None = None
    dialect: str = "default"
    seed: int = 0
    nan: Literal["error", "propagate"] = "error"
    layers: str | None = None
    then: tuple[ThenEntry | None, ...] = ()
    output: AdapterOutput | None = None


def validate(document: Document, *, lenient: bool) -> tuple[RecipeSchema, list[str], list[MergeError], bool]:
    """(the recipe as far as it is right, warnings, problems, whether the inputs and the method are named).

    lenient : unknown keys become warnings and are left out.

    Raises
    ------
    RecipeError : the recipe is not a mapping.
    """
    checker = _Checker(document, lenient)
    schema = checker.top()
    return schema, checker.warnings, checker.problems, checker.whole


def _show(value: Any) -> str:
    """A value as an error shows it."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        flat = all(isinstance(item, (int, float)) for item in value)
        return repr(value) if flat and len(value) <= 4 else f"a list of {len(value)}"
    if value is None:
        return "nothing"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


_Check = Callable[[Any, Loc], Any]


class _Checker:
    """Walks a recipe and notes everything that is wrong."""

    def __init__(self, document: Document, lenient: bool) -> None:
        self.document = document
        self.lenient = lenient
        self.problems: list[MergeError] = []
        self.warnings: list[str] = []
        self.whole = True

    def top(self) -> RecipeSchema:
        """The recipe as far as it is right."""
        data = self.document.data
        if not isinstance(data, dict):
            message = "a recipe is a mapping of keys"
            raise self.document.error((), message, expected="merge_method: ...", got=_show(data))
        fields = self.fields(
            data,
            (),
            {
                "merge_method": values.string,
                "models": self.list_of(self.model),
                "slices": self.list_of(self.slice),
                "base_model": values.reference,
                "parameters": values.mapping,
                "dtype": values.dtype,
                "out_dtype": values.dtype,
                "tokenizer_source": values.reference,
                "chat_template": values.string,
                "dialect": values.string,
                "seed": values.seed,
                "nan": values.nan,
                "layers": values.layers,
                "then": self.list_of(self.modifier),
                "output": values.output,
            },
            ("merge_method",),
        )
        names = ("merge_method", "models", "slices", "base_model", "layers", "then", "output")
        if fields is None or any(data.get(name) is not None and name not in fields for name in names):
            self.whole = False
        fields = {"merge_method": "", **(fields or {})}
        if (data.get("models") is None) == (data.get("slices") is None):
            got = "both" if data.get("models") is not None else "neither"
            loc: Loc = ("slices",) if got == "both" else ()
            self.problems.append(self.document.error(loc, "a recipe has either models or slices", got=got))
            self.whole = False
        return RecipeSchema(**fields)

    def model(self, value: Any, loc: Loc) -> ModelEntry | None:
        """An entry of `models`."""
        fields = self.fields(value, loc, {"model": values.reference, "parameters": values.mapping}, ("model",))
        return None if fields is None else ModelEntry(**fields)

    def modifier(self, value: Any, loc: Loc) -> ThenEntry | None:
        """An entry of `then`."""
        if not isinstance(value, dict) or len(value) != 1:
            self._wrong(loc, value, Wrong(A_WRONG_VALUE, "one modifier with its parameters, as in lines: {alpha: 0.2}"))
            return None
        ((name, parameters),) = value.items()
        if not isinstance(parameters, (dict, type(None))):
            self._wrong((*loc, name), parameters, Wrong(A_WRONG_VALUE, "a mapping of parameters"))
            return None
        return ThenEntry(name, parameters)

    def slice(self, value: Any, loc: Loc) -> SliceEntry | None:
        """An entry of `slices`."""
        checks: dict[str, _Check] = {
            "sources": self.list_of(self.source),
            "base_model": values.reference,
            "parameters": values.mapping,
        }
        fields = self.fields(value, loc, checks, ("sources",))
        return None if fields is None else SliceEntry(**fields)

    def source(self, value: Any, loc: Loc) -> SourceEntry | None:
        """An entry of `sources`."""
        checks: dict[str, _Check] = {
            "model": values.reference,
            "layer_range": values.layer_range,
            "parameters": values.mapping,
        }
        fields = self.fields(value, loc, checks, ("model", "layer_range"))
        return None if fields is None else SourceEntry(**fields)

    def list_of(self, check: _Check) -> _Check:
        """The check of a list with at least one entry."""

        def checked(value: Any, loc: Loc) -> Any:
            if not isinstance(value, list):
                raise Wrong(A_WRONG_VALUE, "a list")
            if not value:
                raise Wrong(A_WRONG_VALUE, "at least one entry")
            found = tuple(check(item, (*loc, i)) for i, item in enumerate(value))
            if any(item is None for item in found):
                self.whole = False
            return found

        return checked

    def fields(
        self, value: Any, loc: Loc, checks: Mapping[str, _Check], required: tuple[str, ...]
    ) -> dict[str, Any] | None:
        """The checked values of a mapping's keys, without wrong ones; None if a required one is not among them."""
        if not isinstance(value, dict):
            self._wrong(loc, value, Wrong(A_WRONG_VALUE, "a mapping"))
            return None
        where = ".".join(str(part) for part in loc)
        under = f" under '{where}'" if where else ""
        for name in required:
            if value.get(name) is None:
                message = f"required key '{name}' is missing{under}"
                self.problems.append(self.document.error(loc, message, "recipe.missing-key"))
        found: dict[str, Any] = {}
        for name, item in value.items():
            here = (*loc, name)
            if name not in checks:
                self._unknown(here, under, checks)
            elif item is not None:
                try:
                    found[name] = checks[name](item, here)
                except Wrong as wrong:
                    self._wrong(here, item, wrong)
        return found if all(name in found for name in required) else None

    def _wrong(self, loc: Loc, value: Any, wrong: Wrong) -> None:
        full = ".".join(str(part) for part in loc)
        separator = " " if str(wrong) == A_WRONG_VALUE else ": "
        message = f"'{full}'{separator}{wrong}"
        self.problems.append(
            self.document.error(loc, message, expected=wrong.expected, got=_show(value), hint=wrong.hint)
        )

    def _unknown(self, loc: Loc, under: str, known: Mapping[str, _Check]) -> None:
        name = str(loc[-1])
        if name in PLANNED:
            message = f"'{name}' is not supported: {PLANNED[name]}"
            self.problems.append(self.document.error(loc, message, "recipe.planned"))
            return
        message = f"unknown key '{cut(name)}'{under}"
        expected = "one of " + ", ".join(known)
        error = self.document.error(loc, message, "recipe.unknown-key", expected=expected, hint=nearest(name, known))
        if self.lenient:
            self.warnings.append(str(error))
        else:
            self.problems.append(error)
