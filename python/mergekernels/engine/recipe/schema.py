"""The shape of a recipe: which keys there are and of what type. Values of method parameters are checked later.

Checked by hand and not by a validation library, whose import alone takes a third of the command's start-up time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

from ...errors import MergeError, PlanError, RecipeError
from ...tensors import FLOAT_DTYPES
from .source import Document

__all__ = ["ModelEntry", "RecipeSchema", "Reference", "SliceEntry", "SourceEntry", "nearest", "validate"]

Loc = tuple[str | int, ...]

PLANNED = {
    "tokenizer": "building a vocabulary (`tokenizer:`) is planned with row-wise gathers of embeddings; "
    "use tokenizer_source: base or a model, which copies that tokenizer",
    "modules": "recipes for models of several modules are planned; use models: or slices: for the whole checkpoint",
    "residual_weight": "mergekit reads residual_weight and never uses it; remove it",
    "name": "named results of recipes with several documents are planned; run one recipe per document",
    "then": "modifiers of the merged task vector are planned",
    "output": "adapters as results are planned; the result is a full checkpoint",
    "lora": "adapters as inputs (model+adapter) are planned; merge the adapter into its model first",
    "override_architecture": "there is no table of architectures here; remove it",
}
"""Keys of the language that this version refuses by name."""


@dataclass(frozen=True)
class Reference:
    """A model as a recipe names it. exact : `path` came as a mapping, and `@` and `+` in it mean nothing."""

    path: str
    revision: str | None = None
    exact: bool = False

    def __str__(self) -> str:
        return f"{self.path}@{self.revision}" if self.revision else self.path


def nearest(name: str, known: Any) -> str | None:
    """A hint with the known name most like `name`, if there is one."""
    near = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"Did you mean '{near[0]}'?" if near else None


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

    sources: tuple[SourceEntry, ...]
    base_model: Reference | None = None
    parameters: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class RecipeSchema:
    """The top level."""

    merge_method: str
    models: tuple[ModelEntry, ...] | None = None
    slices: tuple[SliceEntry, ...] | None = None
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


def validate(document: Document, *, lenient: bool) -> tuple[RecipeSchema, list[str]]:
    """The checked recipe, and warnings.

    lenient : unknown keys become warnings and are left out.

    Raises
    ------
    RecipeError : one thing is wrong. PlanError : several are.
    """
    checker = _Checker(document, lenient)
    schema = checker.top()
    if len(checker.problems) == 1:
        raise checker.problems[0]
    if schema is None or checker.problems:
        raise PlanError(checker.problems)
    return schema, checker.warnings


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


class _Wrong(Exception):
    """A value that is not usable."""

    def __init__(self, message: str, expected: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.expected = expected
        self.hint = hint


_A_WRONG_VALUE = "has a wrong value"
_Check = Callable[[Any, Loc], Any]


class _Checker:
    """Walks a recipe and notes everything that is wrong."""

    def __init__(self, document: Document, lenient: bool) -> None:
        self.document = document
        self.lenient = lenient
        self.problems: list[MergeError] = []
        self.warnings: list[str] = []

    def error(self, loc: Loc, message: str, code: str = "recipe.value", **fields: str | None) -> RecipeError:
        """A problem at a place in the recipe."""
        return RecipeError(message, code=code, file=self.document.file or None, line=self.document.line(loc), **fields)

    def top(self) -> RecipeSchema | None:
        """The recipe; None after noting what is wrong."""
        data = self.document.data
        if not isinstance(data, dict):
            message = "a recipe is a mapping of keys"
            self.problems.append(self.error((), message, expected="merge_method: ...", got=_show(data)))
            return None
        fields = self.fields(
            data,
            (),
            {
                "merge_method": _string,
                "models": self.list_of(self.model),
                "slices": self.list_of(self.slice),
                "base_model": _reference,
                "parameters": _mapping,
                "dtype": _dtype,
                "out_dtype": _dtype,
                "tokenizer_source": _reference,
                "chat_template": _string,
                "dialect": _string,
                "seed": _seed,
                "nan": _nan,
                "layers": _layers,
            },
            ("merge_method",),
        )
        if (data.get("models") is None) == (data.get("slices") is None):
            got = "both" if data.get("models") is not None else "neither"
            loc: Loc = ("slices",) if got == "both" else ()
            self.problems.append(self.error(loc, "a recipe has either models or slices", got=got))
        return RecipeSchema(**fields) if fields is not None and not self.problems else None

    def model(self, value: Any, loc: Loc) -> ModelEntry | None:
        """An entry of `models`."""
        fields = self.fields(value, loc, {"model": _reference, "parameters": _mapping}, ("model",))
        return None if fields is None else ModelEntry(**fields)

    def slice(self, value: Any, loc: Loc) -> SliceEntry | None:
        """An entry of `slices`."""
        checks: dict[str, _Check] = {
            "sources": self.list_of(self.source),
            "base_model": _reference,
            "parameters": _mapping,
        }
        fields = self.fields(value, loc, checks, ("sources",))
        return None if fields is None else SliceEntry(**fields)

    def source(self, value: Any, loc: Loc) -> SourceEntry | None:
        """An entry of `sources`."""
        checks: dict[str, _Check] = {"model": _reference, "layer_range": _layer_range, "parameters": _mapping}
        fields = self.fields(value, loc, checks, ("model", "layer_range"))
        return None if fields is None else SourceEntry(**fields)

    def list_of(self, check: _Check) -> _Check:
        """The check of a list with at least one entry."""

        def checked(value: Any, loc: Loc) -> Any:
            if not isinstance(value, list):
                raise _Wrong(_A_WRONG_VALUE, "a list")
            if not value:
                raise _Wrong(_A_WRONG_VALUE, "at least one entry")
            return tuple(check(item, (*loc, i)) for i, item in enumerate(value))

        return checked

    def fields(
        self, value: Any, loc: Loc, checks: Mapping[str, _Check], required: tuple[str, ...]
    ) -> dict[str, Any] | None:
        """The checked values of a mapping's keys; None after noting that one is wrong."""
        if not isinstance(value, dict):
            self._wrong(loc, value, _Wrong(_A_WRONG_VALUE, "a mapping"))
            return None
        where = ".".join(str(part) for part in loc)
        under = f" under '{where}'" if where else ""
        count = len(self.problems)
        for name in required:
            if value.get(name) is None:
                message = f"required key '{name}' is missing{under}"
                self.problems.append(self.error(loc, message, "recipe.missing-key"))
        found: dict[str, Any] = {}
        for name, item in value.items():
            here = (*loc, name)
            if name not in checks:
                self._unknown(here, under, checks)
            elif item is not None:
                try:
                    found[name] = checks[name](item, here)
                except _Wrong as wrong:
                    self._wrong(here, item, wrong)
        return found if len(self.problems) == count else None

    def _wrong(self, loc: Loc, value: Any, wrong: _Wrong) -> None:
        full = ".".join(str(part) for part in loc)
        separator = " " if str(wrong) == _A_WRONG_VALUE else ": "
        message = f"'{full}'{separator}{wrong}"
        self.problems.append(self.error(loc, message, expected=wrong.expected, got=_show(value), hint=wrong.hint))

    def _unknown(self, loc: Loc, under: str, known: Mapping[str, _Check]) -> None:
        name = str(loc[-1])
        if name in PLANNED:
            message = f"'{name}' is not supported: {PLANNED[name]}"
            self.problems.append(self.error(loc, message, "recipe.planned"))
            return
        message = f"unknown key '{name}'{under}"
        expected = "one of " + ", ".join(known)
        error = self.error(loc, message, "recipe.unknown-key", expected=expected, hint=nearest(name, known))
        if self.lenient:
            self.warnings.append(str(error))
        else:
            self.problems.append(error)


def _string(value: Any, loc: Loc) -> str:
    if not isinstance(value, str):
        raise _Wrong(_A_WRONG_VALUE, "a string")
    return value


def _mapping(value: Any, loc: Loc) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _Wrong(_A_WRONG_VALUE, "a mapping")
    return value


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _seed(value: Any, loc: Loc) -> int:
    if not _is_integer(value) or not 0 <= value < 2**64:
        raise _Wrong(_A_WRONG_VALUE, f"an integer from 0 to {2**64 - 1}")
    return int(value)


def _nan(value: Any, loc: Loc) -> str:
    if value not in ("error", "propagate"):
        raise _Wrong(_A_WRONG_VALUE, "'error' or 'propagate'")
    return str(value)


def _layer_range(value: Any, loc: Loc) -> tuple[int, int]:
    if isinstance(value, list) and len(value) == 2 and all(_is_integer(v) for v in value):
        first, end = value
        if 0 <= first < end:
            return first, end
    raise _Wrong(f"{_A_WRONG_VALUE}", "[first, end], two integers with 0 <= first < end")


def _dtype(value: Any, loc: Loc) -> str:
    names = [d.torch for d in FLOAT_DTYPES]
    if value in names:
        return str(value)
    text = value if isinstance(value, str) else ""
    integer = text.startswith(("int", "uint"))
    hint = "Integer arithmetic would round every weight" if integer else nearest(text, names)
    raise _Wrong("not a dtype that a merge can have", "one of " + ", ".join(names), hint)


def _layers(value: Any, loc: Loc) -> str:
    if not isinstance(value, str) or value.count("*") != 1 or "*" not in value.split("."):
        raise _Wrong("not a pattern of a layer stack", "dotted names with one * for the number, such as model.layers.*")
    return value


def _reference(value: Any, loc: Loc) -> Reference:
    """A reference from a string or from a mapping with path and revision, also under `model`."""
    if isinstance(value, str) and value.strip():
        return Reference(value)
    if isinstance(value, dict):
        for key in value:
            if key in ("lora", "override_architecture") and value[key] is not None:
                raise _Wrong(f"'{key}' is not supported: {PLANNED[key]}")
            if key not in ("model", "path", "revision", "lora", "override_architecture"):
                raise _Wrong(f"unknown key '{key}'", hint=nearest(str(key), ("model", "path", "revision")))
        if "model" in value and "path" not in value and "revision" not in value:
            return _reference(value["model"], loc)
        path, revision = value.get("path"), value.get("revision")
        if "model" not in value and isinstance(path, str) and path and isinstance(revision, (str, type(None))):
            return Reference(path, revision, exact=True)
    raise _Wrong("not a model reference", "a path, org/name, org/name@revision or {path: ..., revision: ...}")
