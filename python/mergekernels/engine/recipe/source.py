"""A recipe's text as plain data, with the line of every key. Safe YAML: no tags, no duplicates, bounded size."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import InputError, RecipeError, cut

if TYPE_CHECKING:
    import yaml

__all__ = ["Document", "read"]

MAX_BYTES = 1 << 20
_MAX_DEPTH = 40
_MAX_NODES = 100_000
_PLAIN = {f"tag:yaml.org,2002:{t}" for t in ("str", "int", "float", "bool", "null", "timestamp")}


@dataclass(frozen=True)
class Document:
    """A recipe before validation. lines : 1-based line of every key, by path. folder : where the file lies."""

    data: Any
    file: str = ""
    folder: Path = field(default_factory=Path)
    lines: Mapping[tuple[str | int, ...], int] = field(default_factory=dict)

    def line(self, loc: tuple[str | int, ...]) -> int | None:
        """The line of the nearest known ancestor of `loc`."""
        for end in range(len(loc), -1, -1):
            if loc[:end] in self.lines:
                return self.lines[loc[:end]]
        return None

    def error(
        self, loc: tuple[str | int, ...], message: str, code: str = "recipe.value", **fields: str | None
    ) -> RecipeError:
        """A problem at a place in the recipe."""
        return RecipeError(message, code=code, file=self.file or None, line=self.line(loc), **fields)


def read(source: str | PathLike[str] | Mapping[str, Any]) -> Document:
    """The recipe in a file, in a text (a string with a line break or ": "), or in a mapping.

    Raises
    ------
    RecipeError : not valid YAML, or beyond the limits on size, depth and aliases. InputError : the file cannot be read.
    """
    if isinstance(source, Mapping):
        return Document(_copy(source))
    if isinstance(source, str) and ("\n" in source or ": " in source):
        return _parse(source, "", Path())
    file = os.fspath(source)
    try:
        path = Path(file)
        if not path.is_file():
            raise InputError("no such recipe file", code="recipe.missing", file=file)
        with path.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"cannot read: {error.strerror}", code="recipe.read", file=file) from None
    if len(raw) > MAX_BYTES:
        raise RecipeError(
            "too large for a recipe", code="recipe.size", file=file, expected=f"at most {MAX_BYTES} bytes"
        )
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise RecipeError("not UTF-8", code="recipe.encoding", file=file, line=line) from None
    return _parse(text, file, path.parent)


def _copy(value: Any) -> Any:
    """Mappings and sequences as plain dictionaries and lists."""
    if isinstance(value, Mapping):
        return {k: _copy(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_copy(v) for v in value]
    return os.fspath(value) if isinstance(value, PathLike) else value


def _parse(text: str, file: str, folder: Path) -> Document:
    """One YAML document."""
    import yaml

    name = file or None
    if len(text) > MAX_BYTES:
        raise RecipeError(
            "too large for a recipe", code="recipe.size", file=name, expected=f"at most {MAX_BYTES} bytes"
        )
    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        depth = documents = 0
        # Events first: composing a deeply nested document would recurse.
        for event in yaml.parse(text, Loader=loader):
            line = event.start_mark.line + 1  # type: ignore[union-attr]
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
                if depth > _MAX_DEPTH:
                    raise RecipeError("nested too deeply", code="recipe.depth", file=name, line=line)
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
            elif isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise RecipeError(
                        "recipes of several documents are not supported yet",
                        code="recipe.planned",
                        file=name,
                        line=line,
                        hint="Planned: later documents refer to earlier results by name. Run one recipe per document",
                    )
        node = yaml.compose(text, Loader=loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        line = mark.line + 1 if mark is not None else None
        raise RecipeError(f"not valid YAML: {what}", code="recipe.yaml", file=name, line=line) from None
    if node is None:
        raise RecipeError("the recipe is empty", code="recipe.empty", file=name)
    builder = _Builder(name)
    data = builder.build(node, (), 0)
    return Document(data, file, folder, builder.lines)


class _Builder:
    """Plain data from a node graph."""

    def __init__(self, file: str | None) -> None:
        from yaml.constructor import SafeConstructor

        self.file = file
        self.lines: dict[tuple[str | int, ...], int] = {}
        self._nodes = 0
        self._constructor = SafeConstructor()

    def _error(self, node: yaml.Node, message: str, **fields: str) -> RecipeError:
        line = node.start_mark.line + 1
        return RecipeError(message, file=self.file, line=line, code="recipe.yaml", **fields)

    def build(self, node: Any, loc: tuple[str | int, ...], depth: int) -> Any:
        """The value of `node`, whose path is `loc`."""
        self._nodes += 1
        # Aliases make the graph smaller than what it stands for: both limits are on the expanded form.
        if self._nodes > _MAX_NODES or depth > _MAX_DEPTH:
            raise self._error(node, "aliases make the recipe too large")
        self.lines.setdefault(loc, node.start_mark.line + 1)
        if node.id == "sequence":
            self._check_tag(node, "seq")
            return [self.build(child, (*loc, i), depth + 1) for i, child in enumerate(node.value)]
        if node.id == "mapping":
            self._check_tag(node, "map")
            return self._mapping(node, loc, depth)
        if node.tag not in _PLAIN:
            raise self._error(node, "tags are not allowed", got=repr(cut(node.tag)))
        if node.tag.endswith((":str", ":timestamp")):
            return node.value
        kind = node.tag.rsplit(":", 1)[1]
        try:
            return getattr(self._constructor, f"construct_yaml_{kind}")(node)
        except (ValueError, KeyError, OverflowError):
            raise self._error(node, f"not a valid {kind}", got=repr(cut(node.value))) from None

    def _check_tag(self, node: yaml.Node, kind: str) -> None:
        if node.tag != f"tag:yaml.org,2002:{kind}":
            raise self._error(node, "tags are not allowed", got=repr(cut(node.tag)))

    def _mapping(self, node: Any, loc: tuple[str | int, ...], depth: int) -> dict[str, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.id != "scalar" or key.tag != "tag:yaml.org,2002:str":
                raise self._error(key, "keys must be strings", got=repr(key.value)[:60])
            if key.value in seen:
                raise self._error(
                    key, f"duplicate key '{cut(key.value)}'", hint=f"First given on line {seen[key.value]}"
                )
            seen[key.value] = key.start_mark.line + 1
        try:
            self._constructor.flatten_mapping(node)
        except Exception as error:
            raise self._error(node, f"not a valid merge key: {getattr(error, 'problem', error)}") from None
        result: dict[str, Any] = {}
        for key, value in node.value:
            if key.id != "scalar" or key.tag != "tag:yaml.org,2002:str":
                raise self._error(key, "keys must be strings", got=repr(key.value)[:60])
            here = (*loc, key.value)
            self.lines[here] = key.start_mark.line + 1
            result[key.value] = self.build(value, here, depth + 1)
        return result
