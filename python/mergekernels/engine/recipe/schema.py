"""The shape of a recipe: which keys there are and of what type. Values of method parameters are checked later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator, ValidationError
from pydantic_core import PydanticCustomError

from ...errors import MergeError, RecipeError
from ...tensors import FLOAT_DTYPES
from .source import Document

__all__ = ["ModelEntry", "RecipeSchema", "Reference", "SliceEntry", "SourceEntry", "nearest", "validate"]

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


def _bad(message: str, expected: str = "", hint: str = "") -> PydanticCustomError:
    return PydanticCustomError("recipe", "{message}", {"message": message, "expected": expected, "hint": hint})


def _reference(value: Any) -> Reference:
    """A reference from a string or from a mapping with path and revision, also under `model`."""
    if isinstance(value, Reference):
        return value
    if isinstance(value, str) and value.strip():
        return Reference(value)
    if isinstance(value, Mapping):
        for key in value:
            if key in ("lora", "override_architecture") and value[key] is not None:
                raise _bad(f"'{key}' is not supported: {PLANNED[key]}")
            if key not in ("model", "path", "revision", "lora", "override_architecture"):
                raise _bad(f"unknown key '{key}'", hint=nearest(str(key), ("model", "path", "revision")) or "")
        if "model" in value and "path" not in value and "revision" not in value:
            return _reference(value["model"])
        path, revision = value.get("path"), value.get("revision")
        if "model" not in value and isinstance(path, str) and path and isinstance(revision, (str, type(None))):
            return Reference(path, revision, exact=True)
    raise _bad("not a model reference", "a path, org/name, org/name@revision or {path: ..., revision: ...}")


def _dtype(value: str) -> str:
    names = [d.torch for d in FLOAT_DTYPES]
    if value not in names:
        hint = (
            "Integer arithmetic would round every weight"
            if value.startswith(("int", "uint"))
            else nearest(value, names)
        )
        raise _bad("not a dtype that a merge can have", "one of " + ", ".join(names), hint or "")
    return value


def _layers(value: str) -> str:
    if value.count("*") != 1 or "*" not in value.split("."):
        raise _bad("not a pattern of a layer stack", "dotted names with one * for the number, such as model.layers.*")
    return value


Ref = Annotated[Any, PlainValidator(_reference)]
DTypeName = Annotated[str, AfterValidator(_dtype)]
Parameters = dict[str, Any]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ModelEntry(_Strict):
    """An entry of `models`."""

    model: Ref
    parameters: Parameters | None = None


class SourceEntry(_Strict):
    """An entry of `sources`: layers a to b - 1 of a model."""

    model: Ref
    layer_range: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=2)]
    parameters: Parameters | None = None


class SliceEntry(_Strict):
    """An entry of `slices`."""

    sources: Annotated[list[SourceEntry], Field(min_length=1)]
    base_model: Ref | None = None
    parameters: Parameters | None = None


class RecipeSchema(_Strict):
    """The top level."""

    merge_method: str
    models: Annotated[list[ModelEntry], Field(min_length=1)] | None = None
    slices: Annotated[list[SliceEntry], Field(min_length=1)] | None = None
    base_model: Ref | None = None
    parameters: Parameters | None = None
    dtype: DTypeName | None = None
    out_dtype: DTypeName | None = None
    tokenizer_source: Ref | None = None
    chat_template: str | None = None
    dialect: str = "default"
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    nan: Literal["error", "propagate"] = "error"
    layers: Annotated[str, AfterValidator(_layers)] | None = None


_TYPES = {
    "string_type": "a string",
    "int_type": "an integer",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "bool_type": "true or false",
    "too_short": "more entries",
    "too_long": "fewer entries",
}


def _level(loc: tuple[str | int, ...]) -> type[_Strict]:
    """The model that the mapping at `loc` is checked against."""
    if loc and loc[0] == "models":
        return ModelEntry
    if loc and loc[0] == "slices":
        return SourceEntry if "sources" in loc else SliceEntry
    return RecipeSchema


def validate(document: Document, *, lenient: bool) -> tuple[RecipeSchema, list[str]]:
    """The checked recipe, and warnings.

    lenient : unknown keys become warnings and are left out.

    Raises
    ------
    RecipeError : one thing is wrong. PlanError : several are.
    """
    from ...errors import PlanError

    data = document.data
    if not isinstance(data, dict):
        raise _error(document, (), "a recipe is a mapping of keys", expected="merge_method: ...", got=_show(data))
    warnings: list[str] = []
    try:
        return _finish(document, RecipeSchema.model_validate(data)), warnings
    except ValidationError as error:
        failures = error.errors()
    problems: list[MergeError] = []
    unknown: list[tuple[str | int, ...]] = []
    for failure in failures:
        problem = _translate(document, failure)
        if lenient and problem.code == "recipe.unknown-key":
            unknown.append(failure["loc"])
            warnings.append(str(problem))
        else:
            problems.append(problem)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise PlanError(problems)
    pruned = Document(_without(data, unknown), document.file, document.folder, document.lines)
    return _finish(document, validate(pruned, lenient=False)[0]), warnings


def _without(data: Any, locs: list[tuple[str | int, ...]]) -> Any:
    """A copy of `data` without the keys at `locs`."""
    from copy import deepcopy

    result = deepcopy(data)
    for loc in locs:
        parent = result
        for part in loc[:-1]:
            parent = parent[part]
        del parent[loc[-1]]
    return result


def _finish(document: Document, schema: RecipeSchema) -> RecipeSchema:
    """What concerns several keys at once."""
    if (schema.models is None) == (schema.slices is None):
        got = "both" if schema.models is not None else "neither"
        raise _error(document, ("slices",) if got == "both" else (), "a recipe has either models or slices", got=got)
    return schema


def _error(document: Document, loc: tuple[str | int, ...], message: str, **fields: str | None) -> RecipeError:
    fields.setdefault("code", "recipe.value")
    return RecipeError(message, file=document.file or None, line=document.line(loc), **fields)  # type: ignore[arg-type]


def _show(value: Any) -> str:
    """A value as an error shows it."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if value is None:
        return "nothing"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _translate(document: Document, failure: Any) -> RecipeError:
    """A failure of pydantic in our words, with its line."""
    loc, kind, got = tuple(failure["loc"]), failure["type"], failure["input"]
    context = failure.get("ctx", {})
    name = str(loc[-1]) if loc else ""
    where = ".".join(str(part) for part in loc[:-1])
    under = f" under '{where}'" if where else ""
    if kind == "extra_forbidden":
        if name in PLANNED:
            message = f"'{name}' is not supported: {PLANNED[name]}"
            return _error(document, loc, message, code="recipe.planned")
        known = list(_level(loc).model_fields)
        return _error(
            document,
            loc,
            f"unknown key '{name}'{under}",
            code="recipe.unknown-key",
            expected="one of " + ", ".join(known),
            hint=nearest(name, known),
        )
    if kind == "missing":
        return _error(document, loc[:-1], f"required key '{name}' is missing{under}", code="recipe.missing-key")
    full = ".".join(str(part) for part in loc)
    if kind == "recipe":
        message = f"'{full}': {context['message']}"
        expected, hint = context["expected"] or None, context["hint"] or None
        return _error(document, loc, message, expected=expected, got=_show(got), hint=hint)
    if kind == "literal_error":
        expected = context["expected"]
    elif kind in ("greater_than_equal", "less_than"):
        expected = failure["msg"].removeprefix("Input should be ")
    else:
        expected = _TYPES.get(kind, failure["msg"])
    if name == "layer_range":
        expected = "[first, end], two integers with 0 <= first < end"
    return _error(document, loc, f"'{full}' has a wrong value", expected=expected, got=_show(got))
