"""Parameters of a method at the levels of a recipe: scalars, gradients, filters, and which level wins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..._methods.arguments import Unusable, convert
from ..._methods.protocol import MethodInfo, Param
from ...errors import MergeError, RecipeError, cut, nearest
from .source import Document

__all__ = ["Condition", "Setting", "compile_level", "find", "params_of"]

Loc = tuple[str | int, ...]


@dataclass(eq=False)
class Condition:
    """One value with its filter. values : one scalar, or the points of a gradient.

    used : whether a tensor took it. outside : a tensor outside the layer stack that took a gradient's first value.
    """

    filter: str | None
    values: tuple[Any, ...]
    line: int | None
    used: bool = False
    outside: str = ""

    def matches(self, name: str) -> bool:
        """Whether the filter is absent, `*` or a substring of `name`."""
        return self.filter is None or self.filter == "*" or self.filter in name

    def at(self, t: float) -> Any:
        """The value at position `t` in [0, 1]: interpolated for numbers, else element floor(t (n - 1))."""
        values = self.values
        if len(values) == 1:
            return values[0]
        place = t * (len(values) - 1)
        low = int(place)
        if not isinstance(values[0], float):
            return values[low]
        high = min(len(values) - 1, low + 1)
        fraction = place - low
        return (1 - fraction) * values[low] + fraction * values[high]


@dataclass(frozen=True)
class Setting:
    """What one level says about one parameter. filtered : whether it depends on the tensor's name."""

    conditions: tuple[Condition, ...]
    filtered: bool = field(default=False)

    @property
    def constant(self) -> bool:
        """Whether it is the same for every tensor."""
        return not self.filtered and all(len(c.values) == 1 for c in self.conditions)


def params_of(info: MethodInfo) -> dict[str, Param]:
    """The parameters of a method in a recipe: its own, and the one that names what accompanies each model."""
    params = {p.name: p for p in info.params}
    if info.companions:
        text = f"the checkpoint that accompanies the model: {info.companions} of the same names and shapes"
        params.setdefault(info.companions, Param(info.companions, "str", text, per_model=True))
    return params


def find(levels: Iterable[Setting | None], name: str, t: float | None) -> Any:
    """The value of the first level that has one for the tensor `name` at `t`; None if none has.

    t : position in the gradients; None outside the layer stack, which counts as 0.
    """
    for setting in levels:
        if setting is None:
            continue
        for condition in setting.conditions:
            if condition.matches(name):
                condition.used = True
                if t is None and len(condition.values) > 1:
                    condition.outside = condition.outside or name
                return condition.at(t or 0.0)
    return None


def compile_level(
    document: Document,
    loc: Loc,
    parameters: Mapping[str, Any] | None,
    info: MethodInfo,
    *,
    lenient: bool,
    problems: list[MergeError],
    warnings: list[str],
    key: str = "parameters",
) -> dict[str, Setting]:
    """The settings of the mapping called `key` at `loc`, checked for names, types and ranges.

    What is wrong is appended to `problems` (unknown names to `warnings` if `lenient`).
    """
    result: dict[str, Setting] = {}
    params = params_of(info)
    for name, value in (parameters or {}).items():
        here = (*loc, key, name)
        param = params.get(name)
        if param is None:
            error = RecipeError(
                f"{info.name} has no parameter '{cut(name)}'",
                code="recipe.unknown-parameter",
                file=document.file or None,
                line=document.line(here),
                expected="one of " + ", ".join(params) if params else None,
                hint=nearest(name, params),
            )
            if lenient:
                warnings.append(str(error))
            else:
                problems.append(error)
            continue
        compiled = _Compiler(document, param, problems).setting(here, value)
        if compiled is not None:
            if not compiled.conditions:
                warnings.append(_at(document, here) + f"the empty list for '{name}' has no effect")
            result[name] = compiled
    return result


def _at(document: Document, loc: Loc) -> str:
    """Where, as a prefix of a warning."""
    line = document.line(loc)
    if document.file:
        return f"{document.file}:{line}: " if line is not None else f"{document.file}: "
    return f"line {line}: " if line is not None else ""


class _Compiler:
    """Checks the value of one parameter."""

    def __init__(self, document: Document, param: Param, problems: list[MergeError]) -> None:
        self.document = document
        self.param = param
        self.problems = problems

    def _error(
        self, loc: Loc, message: str, *, expected: str | None = None, got: Any = None, hint: str | None = None
    ) -> None:
        self.problems.append(
            RecipeError(
                f"parameter '{self.param.name}': {message}",
                code="recipe.parameter",
                file=self.document.file or None,
                line=self.document.line(loc),
                expected=expected,
                got=None if got is None else repr(got)[:60],
                hint=hint,
            )
        )

    def setting(self, loc: Loc, value: Any) -> Setting | None:
        """A scalar, a gradient, a mapping with `value`, or a list of such mappings; None if it is wrong."""
        if isinstance(value, dict):
            condition = self._condition(loc, value)
            return Setting((condition,), condition.filter is not None) if condition is not None else None
        if isinstance(value, list) and any(isinstance(item, dict) for item in value):
            if not all(isinstance(item, dict) for item in value):
                self._error(loc, "a list has either numbers or filters", expected="[{filter: ..., value: ...}, ...]")
                return None
            conditions = [self._condition((*loc, i), item) for i, item in enumerate(value)]
            if any(c is None for c in conditions):
                return None
            return Setting(tuple(c for c in conditions if c is not None), True)
        values = self._values(loc, value)
        if values is None:
            return None
        if not values:
            return Setting(())
        return Setting((Condition(None, values, self.document.line(loc)),))

    def _condition(self, loc: Loc, item: dict[str, Any]) -> Condition | None:
        extra = [key for key in item if key not in ("filter", "value")]
        if extra or "value" not in item:
            message = f"unknown key '{cut(extra[0])}' beside a filter" if extra else "a filter without a value"
            self._error((*loc, *extra[:1]), message, expected="{filter: ..., value: ...}")
            return None
        pattern = item.get("filter")
        if pattern is not None and not isinstance(pattern, str):
            self._error((*loc, "filter"), "a filter is a part of a tensor's name", expected="a string", got=pattern)
            return None
        values = self._values((*loc, "value"), item["value"])
        if values is None:
            return None
        if not values:
            self._error((*loc, "value"), "an empty list", expected="at least one value")
            return None
        return Condition(pattern, values, self.document.line((*loc, "filter") if "filter" in item else loc))

    def _values(self, loc: Loc, value: Any) -> tuple[Any, ...] | None:
        """A scalar or the points of a gradient, each checked; None if one is wrong."""
        if not isinstance(value, list):
            checked = self._scalar(loc, value)
            return None if checked is None else (checked,)
        points = [self._scalar((*loc, i), item) for i, item in enumerate(value)]
        return None if any(p is None for p in points) else tuple(points)

    def _scalar(self, loc: Loc, value: Any) -> Any:
        """The value in the parameter's type, or None after saying what is wrong."""
        try:
            return convert(self.param, value, recipe=True)
        except Unusable as error:
            got = value if value is not None else "nothing"
            self._error(loc, error.problem, expected=error.expected, got=got, hint=error.hint)
            return None
