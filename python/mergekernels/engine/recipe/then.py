"""The key `then`: modifiers of the merged task vector, for the whole model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..._methods.modifiers import blocks_of, modified, modifiers
from ..._methods.protocol import Method
from ...errors import ArgumentError, MergeError, RecipeError
from ..resolved import ResolvedTensor
from .names import Stack
from .schema import ThenEntry
from .settings import Setting, compile_level
from .source import Document

__all__ = ["modified_method", "numbered", "then_level"]

Entries = Sequence[ThenEntry | None]


def modified_method(method: Method, entries: Entries, document: Document, problems: list[MergeError]) -> Method | None:
    """The method followed by the modifiers; None after noting what is wrong with them."""
    found = method
    names = [e.name for e in entries if e is not None]
    for i, name in enumerate(names):
        try:
            found = modified(method, names[: i + 1])
        except ArgumentError as error:
            problems.append(
                RecipeError(
                    error.message,
                    code="recipe.then",
                    file=document.file or None,
                    line=document.line(("then", i, name)),
                    expected=error.expected,
                    got=error.got,
                    hint=error.hint,
                )
            )
            return None
    return found


def then_level(
    entries: Entries, document: Document, *, lenient: bool, problems: list[MergeError], warnings: list[str]
) -> dict[str, Setting]:
    """The parameters of the modifiers, under their names in the modified method."""
    found: dict[str, Setting] = {}
    for i, entry in enumerate(entries):
        info = modifiers().get(entry.name) if entry is not None else None
        if entry is None or info is None:
            continue
        level = compile_level(
            document,
            ("then", i),
            entry.parameters,
            info,
            lenient=lenient,
            problems=problems,
            warnings=warnings,
            key=entry.name,
        )
        for name, setting in level.items():
            if not setting.constant:
                problems.append(
                    RecipeError(
                        f"parameter '{name}' of {entry.name} varies with the tensor",
                        code="recipe.parameter",
                        file=document.file or None,
                        line=document.line(("then", i, entry.name, name)),
                        expected="one value",
                    )
                )
            found[f"{entry.name}.{name}"] = setting
    return found


def numbered(
    tensors: Sequence[ResolvedTensor], stack: Stack | None, then: Mapping[str, Setting]
) -> list[ResolvedTensor]:
    """The tensors with their layer blocks: by a modifier's pattern, of the stack that the recipe names, or as the
    library finds them.
    """
    names = [t.name for t in tensors]
    params = {name: s.conditions[0].values[0] for name, s in then.items() if s.conditions}
    blocks = blocks_of(params, names)
    if stack is not None and params.get("lines.blocks") is None:
        split = {name: found[0] for name in names if (found := stack.split(name)) is not None}
        blocks = {name: (number, max(split.values()) + 1) for name, number in split.items()}
    return [replace(t, block=blocks.get(t.name)) for t in tensors]
