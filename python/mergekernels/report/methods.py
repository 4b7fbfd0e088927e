"""Methods as text: the table of all, and the page of one."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from .._methods.protocol import REQUIRED, MethodInfo, Param
from .text import table

__all__ = [
    "TIERS",
    "base_text",
    "companions",
    "info_dict",
    "inputs",
    "method_text",
    "methods_text",
    "modifiers",
    "parameter_facts",
]

_WIDTH = 110
_BASE = {
    "required": "required",
    "optional": "optional",
    "input": "one more input",
    "first": "required, the first input",
}


def info_dict(info: MethodInfo) -> dict[str, Any]:
    """A JSON-serialisable form; a parameter without default has "required": true."""
    data = {f.name: getattr(info, f.name) for f in fields(info)}
    data["params"] = [_param_dict(p) for p in info.params]
    data["dialects"] = dict(info.dialects)
    data["deviations"] = list(info.deviations)
    return data


def _param_dict(param: Param) -> dict[str, Any]:
    data = {f.name: getattr(param, f.name) for f in fields(param)}
    data["python"] = param.keyword
    data["required"] = param.default is REQUIRED
    data["default"] = None if param.default is REQUIRED else param.default
    data["choices"], data["optional_in"] = list(param.choices), list(param.optional_in)
    return data


def methods_text(infos: Sequence[MethodInfo]) -> str:
    """One line per method; those that take adapters in a table of their own."""
    tables = []
    for takes in ("models", "adapters"):
        of_models = takes == "models"
        rows = [
            (
                i.name,
                inputs(i),
                *((_BASE[i.base],) if of_models else ()),
                i.tier,
                i.purpose.partition(". ")[0].rstrip("."),
            )
            for i in infos
            if takes in i.takes
        ]
        if rows:
            tables.append(table(rows, ("method", takes, *(("base",) if of_models else ()), "tier", "purpose")))
    return "\n\n".join((*tables, "`mergekernels methods NAME` tells all about one."))


def method_text(info: MethodInfo) -> str:
    """All about one method."""
    parts = [
        textwrap.fill(f"{info.name}: {info.purpose}", _WIDTH),
        "",
        _section("formula", info.formula),
        _section("takes", " or ".join(info.takes)),
        _section("inputs", inputs(info) + (" besides the base" if _asks_base(info) and info.base != "input" else "")),
        *([_section("base", base_text(info, _BASE))] if _asks_base(info) else []),
        *([_section("beside", companions(info))] if info.companions else []),
        _section("tier", TIERS[info.tier]),
        _section("passes", info.passes),
        *([_section("then", modifiers(info))] if "models" in info.takes else []),
        _section("source", info.source),
        "",
        "Parameters",
        *(_parameter(p, max(12, *(len(q.name) for q in info.params))) for p in info.params),
        *([] if info.params else ["  none"]),
        "",
        "Dialects",
        *(_section(name, text, 12) for name, text in info.dialects.items()),
    ]
    if info.deviations:
        parts += ["", "Deviations", *(_wrap("- " + text, "    ") for text in info.deviations)]
    return "\n".join(parts)


TIERS = {
    "T0": "T0: the same bits on every backend, thread count, tiling and shard cut",
    "T1": "T1: the same bits everywhere, by sums over fixed blocks",
    "T2": "T2: within a stated tolerance",
}


def _asks_base(info: MethodInfo) -> bool:
    return "models" in info.takes


def base_text(info: MethodInfo, words: Mapping[str, str]) -> str:
    """Whether there is a base, in these words. Adapters are task vectors themselves: a base only lends them names."""
    both = len(info.takes) > 1 and info.base == "required"
    return words[info.base] + (" for models, not for adapters" if both else "")


def inputs(info: MethodInfo) -> str:
    """How many models or adapters a method takes."""
    if info.min_models == info.max_models:
        return str(info.min_models)
    if info.max_models > 1 << 16:
        return f"{info.min_models} or more"
    return f"{info.min_models} to {info.max_models}"


def companions(info: MethodInfo) -> str:
    """What comes with the models."""
    return f"`{info.companions}`: for each model a second one that holds a weight for every entry"


def modifiers(info: MethodInfo) -> str:
    """Whether modifiers apply."""
    if not info.modifiable:
        return "no modifiers: the result is no base with a task vector"
    return "modifiers (lines, with alpha given) apply in recipes" if info.tier == "T2" else "modifiers (lines) apply"


def parameter_facts(param: Param) -> tuple[str, str]:
    """(type, range and number of values; default) of a parameter."""
    facts: list[str] = [param.kind]
    if param.choices:
        facts = [" or ".join(param.choices)]
    elif param.low is not None or param.high is not None:
        low = "(-inf" if param.low is None else f"[{param.low:g}"
        high = "inf)" if param.high is None else f"{param.high:g}]"
        facts.append(f"in {low}, {high}")
    if param.per_model:
        facts.append("per model")
    if param.default is REQUIRED:
        default = "required" + (f" (1 in dialect {', '.join(param.optional_in)})" if param.optional_in else "")
    else:
        default = "" if param.default is None else _value(param.default)
    return ", ".join(facts), default


def _parameter(param: Param, width: int) -> str:
    facts, default = parameter_facts(param)
    line = [facts]
    if default:
        line.append(default if param.default is REQUIRED else f"default {default}")
    if param.keyword != param.name:
        line.append(f"`{param.keyword}` in Python")
    indent = " " * (width + 4)
    head = textwrap.fill(", ".join(line), _WIDTH, initial_indent=f"  {param.name:<{width}}  ", subsequent_indent=indent)
    return f"{head}\n{_wrap(param.help, indent)}"


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _section(name: str, text: str, width: int = 10) -> str:
    lines = textwrap.wrap(text, _WIDTH - width - 2) or [""]
    return "\n".join(f"  {name if i == 0 else '':<{width}}{line}" for i, line in enumerate(lines))


def _wrap(text: str, by: str) -> str:
    first = by if not text.startswith("- ") else "  "
    return textwrap.fill(text, _WIDTH, initial_indent=first, subsequent_indent=by)
