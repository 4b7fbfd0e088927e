"""Values of a method's parameters, checked: keyword arguments of a library call, and for recipes single values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any, Literal

from ..errors import ArgumentError, nearest
from .matrix import MatrixMethod
from .protocol import REQUIRED, Method, MethodInfo, Param

__all__ = ["Unusable", "bind", "bind_matrix", "convert", "default_of"]


class Unusable(Exception):
    """A value that a parameter cannot have.

    problem : "wrong type", "out of range" or "not a possible value". expected : what it can have. hint : or None.
    """

    def __init__(self, problem: str, expected: str, hint: str | None = None) -> None:
        super().__init__(problem)
        self.problem = problem
        self.expected = expected
        self.hint = hint


def convert(param: Param, value: Any, *, recipe: bool = False) -> Any:
    """One value (not None) in the type of `param`: a double, int, bool or str.

    recipe : YAML's spellings count too: numbers that it reads as text (`1e-3`), and 0 and 1 for false and true.
        Neither there nor here is `true` a number.

    Raises
    ------
    Unusable
    """
    if param.kind == "bool":
        if isinstance(value, bool) or (recipe and isinstance(value, (int, float)) and value in (0, 1)):
            return bool(value)
        raise Unusable("wrong type", "true or false")
    if param.kind == "str":
        if isinstance(value, str) and (not param.choices or value in param.choices):
            return value
        if not param.choices:
            raise Unusable("wrong type", "a string")
        hint = nearest(value, param.choices) if isinstance(value, str) else None
        raise Unusable("not a possible value", "one of " + ", ".join(param.choices), hint)
    number = _number(value, param.kind, text=recipe)
    if number is None:
        raise Unusable("wrong type", "an integer" if param.kind == "int" else "a finite number")
    low, high = param.low, param.high
    if (low is not None and number < low) or (high is not None and number > high):
        raise Unusable("out of range", _range(low, high))
    return number


def _range(low: float | None, high: float | None) -> str:
    if low is not None and high is not None:
        return f"a number in [{low:g}, {high:g}]"
    return f"a number of at least {low:g}" if low is not None else f"a number of at most {high:g}"


def _number(value: Any, kind: Literal["float", "int"], *, text: bool) -> float | int | None:
    """The finite double, or the integer; None if it is none."""
    if isinstance(value, bool) or not isinstance(value, (Real, str) if text else Real):
        return None
    if kind == "int" and isinstance(value, Integral):
        return int(value)
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    if not math.isfinite(number):
        return None
    if kind == "int":
        return int(number) if text and number.is_integer() else None
    return number


def default_of(param: Param, dialect: str) -> Any:
    """The default of `param` in a dialect: REQUIRED if it must be given."""
    if param.default is REQUIRED and dialect in param.optional_in:
        return 1.0
    return param.default


def bind(
    method: Method, arguments: Mapping[str, Any], num_models: int, dialect: str, nan: str, name: str = ""
) -> dict[str, Any]:
    """The complete parameters of a call: recipe name -> value, defaults filled in, per-model ones as tuples of doubles.

    arguments : keyword -> value as the caller gave them; per-model ones a scalar or one value per non-base model.

    Raises
    ------
    ArgumentError : unknown or missing parameter, wrong type, number out of range, wrong count, impossible combination.
    """
    params = _bound(method.info, arguments, num_models, dialect)
    _refuse(method.info, method.check(params, dialect, nan), name)
    return params


def bind_matrix(
    method: MatrixMethod, arguments: Mapping[str, Any], num_models: int, dialect: str, name: str = ""
) -> dict[str, Any]:
    """As `bind`, for a method over matrices.

    Raises
    ------
    ArgumentError : as `bind`; also too few or too many models.
    """
    info = method.info
    if not info.min_models <= num_models <= info.max_models:
        low, high = info.min_models, info.max_models
        raise ArgumentError(
            f"{info.name} cannot merge this many {' or '.join(info.takes)}",
            code="models.count",
            expected=str(low) if low == high else f"{low} to {high}",
            got=str(num_models),
        )
    params = _bound(info, arguments, num_models, dialect)
    _refuse(info, method.check(params, dialect), name)
    return params


def _refuse(info: MethodInfo, problems: Sequence[str], name: str) -> None:
    if problems:
        raise ArgumentError(f"{info.name}: {'; '.join(problems)}", code="parameter.combination", tensor=name or None)


def _bound(info: MethodInfo, arguments: Mapping[str, Any], num_models: int, dialect: str) -> dict[str, Any]:
    if not isinstance(dialect, str) or dialect not in info.dialects:
        raise ArgumentError(
            f"{info.name} has no dialect {dialect!r}",
            code="dialect.unknown",
            expected="one of " + ", ".join(info.dialects),
            got=repr(dialect),
            hint=nearest(dialect, info.dialects) if isinstance(dialect, str) else None,
        )
    known = {p.keyword: p for p in info.params}
    for keyword in arguments:
        if keyword not in known:
            raise ArgumentError(
                f"{info.name} has no parameter '{keyword}'",
                code="parameter.unknown",
                expected="one of " + ", ".join(known),
                got=keyword,
                hint=nearest(keyword, known),
            )
    return {p.name: _value(p, info.name, arguments.get(p.keyword, REQUIRED), num_models, dialect) for p in info.params}


def _value(param: Param, method: str, given: Any, num_models: int, dialect: str) -> Any:
    if given is REQUIRED:
        given = default_of(param, dialect)
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
    if value is None and param.default is None:
        return None
    try:
        return convert(param, value)
    except Unusable as error:
        raise ArgumentError(
            f"{method}: '{param.keyword}' is not usable",
            code="parameter.value",
            expected=error.expected,
            got=repr(value),
            hint=error.hint,
        ) from None
