"""Keyword arguments of a library call, checked against a method's parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from ..errors import ArgumentError
from .protocol import REQUIRED, Method, Param

__all__ = ["bind", "why_not_value"]


def why_not_value(param: Param, value: Any) -> str | None:
    """What `param` expects, if `value` is not that; None if it is fine."""
    if value is None and param.default is None:
        return None
    if param.kind == "bool":
        return None if isinstance(value, bool) else "true or false"
    if param.kind == "str":
        return None if value in param.choices else "one of " + ", ".join(param.choices)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if param.kind == "int":
        number = isinstance(value, int) and not isinstance(value, bool)
    if not number or not math.isfinite(value):
        return "a finite number" if param.kind == "float" else "an integer"
    low, high = param.low, param.high
    if (low is not None and value < low) or (high is not None and value > high):
        if high is None:
            return f"a number of at least {low:g}"
        return f"a number in [{low:g}, {high:g}]" if low is not None else f"a number of at most {high:g}"
    return None


def bind(
    method: Method, arguments: Mapping[str, Any], num_models: int, dialect: str, nan: str, name: str = ""
) -> dict[str, Any]:
    """The complete parameters of a call: recipe name -> value, defaults filled in, per-model ones as tuples of doubles.

    arguments : keyword -> value as the caller gave them; per-model ones a scalar or one value per non-base model.

    Raises
    ------
    ArgumentError : unknown or missing parameter, wrong type, number out of range, wrong count, impossible combination.
    """
    info = method.info
    if dialect not in info.dialects:
        raise ArgumentError(
            f"{info.name} has no dialect {dialect!r}",
            code="dialect.unknown",
            expected="one of " + ", ".join(info.dialects),
            got=repr(dialect),
        )
    known = {p.keyword: p for p in info.params}
    for keyword in arguments:
        if keyword not in known:
            near = get_close_matches(keyword, known, n=1)
            raise ArgumentError(
                f"{info.name} has no parameter '{keyword}'",
                code="parameter.unknown",
                expected="one of " + ", ".join(known),
                got=keyword,
                hint=f"Did you mean '{near[0]}'?" if near else None,
            )
    params = {
        p.name: _value(p, info.name, arguments.get(p.keyword, REQUIRED), num_models, dialect) for p in info.params
    }
    problems = method.check(params, dialect, nan)
    if problems:
        raise ArgumentError(f"{info.name}: {'; '.join(problems)}", code="parameter.combination", tensor=name or None)
    return params


def _value(param: Param, method: str, given: Any, num_models: int, dialect: str) -> Any:
    if given is REQUIRED:
        given = param.default
        if given is REQUIRED and dialect in param.optional_in:
            given = 1.0
        if given is REQUIRED:
            raise ArgumentError(
                f"{method} needs '{param.keyword}'",
                code="parameter.missing",
                expected=f"a {param.kind}" + (" or one per model" if param.per_model else ""),
                got="nothing",
                hint=param.help[0].upper() + param.help[1:] + ".",
            )
    if not param.per_model:
        return _one(param, method, given)
    if isinstance(given, Sequence) and not isinstance(given, str):
        if len(given) != num_models:
            raise ArgumentError(
                f"{method}: '{param.keyword}' has the wrong number of values",
                code="parameter.count",
                expected=f"one value, or {num_models} (one per model that is not the base)",
                got=str(len(given)),
            )
        return tuple(_one(param, method, v) for v in given)
    return (_one(param, method, given),) * num_models


def _one(param: Param, method: str, value: Any) -> Any:
    expected = why_not_value(param, value)
    if expected is not None:
        raise ArgumentError(
            f"{method}: '{param.keyword}' is not usable", code="parameter.value", expected=expected, got=repr(value)
        )
    return float(value) if param.kind == "float" and value is not None else value
