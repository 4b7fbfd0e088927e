"""The public list of methods."""

from __future__ import annotations

from typing import Literal

from ..errors import ArgumentError, nearest
from . import get, names
from .matrix_table import get_matrix, matrix_names
from .modifiers import modifiers
from .protocol import MethodInfo

__all__ = ["described", "methods"]


def methods(takes: Literal["models", "adapters"] = "models") -> dict[str, MethodInfo]:
    """The descriptions of all methods: name -> purpose, formula, parameters, dialects, deviations, passes, source.

    takes : "models": what `merge`, `merge_state_dicts` and recipes take; "adapters": what `merge_adapters` takes. One
    name may stand for two methods, one in each.

    Raises
    ------
    ArgumentError : takes is something else.
    """
    if takes not in ("models", "adapters"):
        raise ArgumentError("takes is not usable", code="takes", expected="'models' or 'adapters'", got=repr(takes))
    found = {name: get(name).info for name in names()} if takes == "models" else {}
    return found | {name: get_matrix(name, takes).info for name in matrix_names(takes)}


def described(name: str) -> list[MethodInfo]:
    """What the name stands for: a method of models, one of adapters (or one of both), or a modifier.

    Raises
    ------
    ArgumentError : it stands for nothing; the message lists all names and the nearest.
    """
    tables = (methods(), methods("adapters"), modifiers())
    found = [table[name] for table in tables if name in table]
    if found:
        return [info for i, info in enumerate(found) if info not in found[:i]]
    known = list(dict.fromkeys(n for table in tables[:2] for n in table))
    raise ArgumentError(
        "unknown merge method",
        code="method.unknown",
        expected="one of " + ", ".join(known),
        got=repr(name),
        hint=nearest(name, known),
    )
