"""The page of all methods in Markdown, docs/methods.md: the same facts as `mergekernels methods NAME`."""

from __future__ import annotations

from collections.abc import Iterable

from .._methods.protocol import MethodInfo, Param
from .methods import TIERS, companions, modifiers, parameter_facts

__all__ = ["methods_page"]

_BASE = {
    "required": "a base is required",
    "optional": "a base is optional",
    "input": "a base, if listed, is one more input",
    "first": "a base is required and becomes the first input",
}
_HEAD = """# Methods

Made from the descriptions in the code by `python docs/make_methods.py`; `mergekernels methods NAME` prints the same.

Notation: `xt` is model t, `x0` the base, `dt = xt - x0` its task vector, `n` the number of entries that a count is
over, `T` the number of models. Deltas and sums are float32 (float64 if an input is), the output is rounded once.
Parameters are named as in recipes; in Python `lambda` is `scale` and `weight` is `weights`. A parameter per model takes
one value for all, or one for each model that is not the base.
"""


def methods_page(infos: Iterable[MethodInfo], modifying: Iterable[MethodInfo]) -> str:
    """The page: what each of `infos` and of the modifiers does."""
    methods, others = list(infos), list(modifying)
    lines = [_HEAD]
    lines += [_entry(i) for i in methods]
    lines += ["", "Modifiers, listed under `then:`:", ""]
    lines += [_entry(i) for i in others]
    for info in [*methods, *others]:
        lines += _method(info, modifier=info in others)
    return "\n".join(lines) + "\n"


def _entry(info: MethodInfo) -> str:
    return f"- [{info.name}](#{info.name}): {_plain(info.purpose.partition('. ')[0].rstrip('.'))}"


def _method(info: MethodInfo, *, modifier: bool) -> list[str]:
    lines = ["", f"## {info.name}", "", _plain(info.purpose), "", f"- Formula: {_plain(info.formula)}"]
    if not modifier:
        count = (
            str(info.min_models) if info.min_models == info.max_models else f"{info.min_models} to {info.max_models}"
        )
        lines.append(f"- Inputs: {count} model{'s' if info.max_models > 1 else ''}; {_BASE[info.base]}")
        if info.companions:
            lines.append(f"- Beside the models: {companions(info)}")
        lines.append(f"- Then: {modifiers(info)}")
    lines += [f"- Exactness: {TIERS[info.tier]}", f"- Passes: {info.passes}", f"- Source: {info.source}", ""]
    if info.params:
        lines += ["| parameter | values | default | meaning |", "|---|---|---|---|", *map(_row, info.params)]
    else:
        lines.append("No parameters.")
    lines += ["", "Dialects:", "", *(f"- `{name}`: {_plain(text)}" for name, text in info.dialects.items())]
    if info.deviations:
        lines += ["", "Deviations:", "", *(f"- {_plain(text)}" for text in info.deviations)]
    return lines


def _row(param: Param) -> str:
    facts, default = parameter_facts(param)
    cells = (f"`{param.name}`", facts, default, param.help)
    return "| " + " | ".join(_plain(c) for c in cells) + " |"


def _plain(text: str) -> str:
    """Text without what Markdown would take for markup: bars of tables, emphasis."""
    return text.replace("|", "\\|").replace("*", "\\*")
