"""The page of all methods in Markdown, docs/methods.md: the same facts as `mergekernels methods NAME`."""

from __future__ import annotations

from collections.abc import Iterable

from .._methods.protocol import MethodInfo, Param
from .methods import TIERS, base_text, companions, inputs, modifiers, parameter_facts

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


def methods_page(infos: Iterable[MethodInfo], adapting: Iterable[MethodInfo], modifying: Iterable[MethodInfo]) -> str:
    """The page: what each method of models, each of adapters and each modifier does.

    A method of both is described among the first.
    """
    methods, others = list(infos), list(modifying)
    adapters = list(adapting)
    twice = {i.name for i in methods} | {i.name for i in others}
    alone = [i for i in adapters if i not in methods]
    lines = [_HEAD]
    lines += [_entry(i) for i in methods]
    lines += ["", "Modifiers, listed under `then:`:", ""]
    lines += [_entry(i) for i in others]
    lines += ["", "Methods of adapters (`merge_adapters`, `mergekernels lora merge`):", ""]
    lines += [_entry(i, _title(i, twice) if i in alone else i.name) for i in adapters]
    for info in [*methods, *others]:
        lines += _method(info, info.name, modifier=info in others)
    for info in alone:
        lines += _method(info, _title(info, twice), modifier=False)
    return "\n".join(lines) + "\n"


def _title(info: MethodInfo, taken: set[str]) -> str:
    """The heading of a method of adapters, whose name may stand for one of models too."""
    return f"{info.name} of adapters" if info.name in taken else info.name


def _entry(info: MethodInfo, title: str = "") -> str:
    anchor = (title or info.name).replace(" ", "-")
    return f"- [{info.name}](#{anchor}): {_plain(info.purpose.partition('. ')[0].rstrip('.'))}"


def _method(info: MethodInfo, title: str, *, modifier: bool) -> list[str]:
    lines = ["", f"## {title}", "", _plain(info.purpose), "", f"- Formula: {_plain(info.formula)}"]
    if not modifier:
        what = " or ".join(info.takes) if info.max_models > 1 else " or ".join(t.removesuffix("s") for t in info.takes)
        base = f"; {base_text(info, _BASE)}" if "models" in info.takes else ""
        lines.append(f"- Inputs: {inputs(info)} {what}{base}")
        if info.companions:
            lines.append(f"- Beside the models: {companions(info)}")
        if "models" in info.takes:
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
