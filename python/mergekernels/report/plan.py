"""A plan as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .text import count, duration, indent, plural, size, table

__all__ = ["plan_text"]

_STATES = {
    "absent": "the output does not exist yet",
    "done": "the output already holds this merge; run would do nothing",
    "resumable": "unfinished work of this merge lies beside the output; run resumes it",
    "exists": "the output exists and holds something else; run needs --overwrite",
    "other-plan": "unfinished work of another merge lies beside the output; run needs --overwrite, which drops it",
}


def plan_text(plan: Mapping[str, Any]) -> str:
    """The dry run: inputs, method, parameters, output, passes, bytes, memory, disk, time, warnings.

    plan : as from `Plan.to_dict`.
    """
    output, passes, time = plan["output"], plan["passes"], plan["time"]
    inputs = [
        (str(i), x["label"], plural(x["files"], "file"), plural(x["tensors"], "tensor"), size(x["bytes"]))
        for i, x in enumerate(plan["inputs"])
    ]
    kinds = [
        f"{count(output[key])} {what}"
        for key, what in (("merged", "merged"), ("buffers", "integer"), ("copies", "copied"))
        if output.get(key)
    ]
    parts = [
        f"method     {_method(plan)} (dialect {plan['dialect']}, seed {plan['seed']}, NaN: {plan['nan']})",
        f"backend    {_backend(plan)}, {plural(plan['threads'], 'thread')}",
        "inputs",
        indent(table(inputs, right=(3, 4))),
        "parameters",
        indent(_parameters(plan["parameters"])),
        f"output     {plural(output['tensors'], 'tensor')} ({', '.join(kinds) or 'none'}), {size(output['bytes'])}",
        indent(
            table(
                ((f["name"], plural(_number(f["tensors"]), "tensor"), size(f["bytes"])) for f in output["files"][:20]),
                right=(1, 2),
            )
        ),
    ]
    if len(output["files"]) > 20:
        parts.append(f"  ... and {count(len(output['files']) - 20)} more files")
    for name, stands_for in dict(output.get("aliases") or {}).items():
        parts.append(f"  {name} is tied to {stands_for} and not stored")
    sampled = ", after a sample of the inputs" if passes.get("sampled") else ""
    parts += [
        f"passes     {plural(passes['reads'], 'read')} of the inputs{sampled}, "
        f"{plural(passes['writes'], 'write')} of the output; statistics over the {plan['scope']}",
        f"bytes      {size(plan['bytes_read'])} read, {size(plan['bytes_written'])} written",
        f"memory     {size(plan['peak_memory'])} at most for tensors, of a budget of {size(plan['memory'])}; "
        f"tiles of {size(plan['tile_bytes'])}",
    ]
    disk = plan.get("disk")
    if disk:
        parts.append(f"disk       {size(disk['needed'])} needed, {size(disk['free'])} free at {disk['path']}")
    parts.append(
        f"time       {duration(time['seconds'])} expected, assuming {size(time['read_rate'])}/s read and "
        f"{size(time['write_rate'])}/s written"
    )
    if plan.get("state") in _STATES and disk:
        parts.append(f"state      {_STATES[plan['state']]}")
    parts.append(f"plan hash  {plan['plan_hash']}")
    parts += [f"warning: {w}" for w in plan["warnings"]]
    return "\n".join(parts)


def _method(plan: Mapping[str, Any]) -> str:
    """The method and the modifiers that follow it."""
    return ", then ".join([plan["method"], *(name for entry in plan.get("then") or () for name in entry)])


def _backend(plan: Mapping[str, Any]) -> str:
    """What computes: the backend, and torch where a method needs whole matrices."""
    computed = plan.get("computed")
    matrices = f"; matrices by torch ({computed['tier']})" if computed else ""
    return f"{plan['backend']} on {plan['device']}{matrices}"


def _number(tensors: Any) -> int:
    return tensors if isinstance(tensors, int) else len(tensors)


def _parameters(groups: list[Mapping[str, Any]]) -> str:
    """Each parameter once: its value if all tensors share it, else its range and how many values there are."""
    if not groups:
        return "none"
    names = list(dict.fromkeys(name for g in groups for name in g["params"]))
    rows = []
    for name in names:
        values: dict[str, tuple[Any, int, list[str]]] = {}
        for g in groups:
            if name in g["params"]:
                value = g["params"][name]
                _, seen, examples = values.get(_show(value), (value, 0, list(g["examples"])))
                values[_show(value)] = (value, seen + int(g["tensors"]), examples)
        rows.append((name, *_spread(values)))
    return table(rows)


def _spread(values: Mapping[str, tuple[Any, int, list[str]]]) -> tuple[str, str]:
    """(the value or its range, who has which)."""
    if len(values) == 1:
        return next(iter(values)), ""
    span = _span([value for value, _, _ in values.values()]) or "varies"
    if len(values) > 3:
        return span, f"{len(values)} values (--json lists them)"
    ordered = sorted(values.items(), key=lambda item: -item[1][1])
    who = (f"{text} in {plural(n, 'tensor')}" + (f" ({e[0]}, ...)" if e else "") for text, (_, n, e) in ordered)
    return span, "; ".join(who)


def _span(values: list[Any]) -> str | None:
    """The range of numbers, or of each model's numbers; None for anything else."""
    if all(isinstance(v, (list, tuple)) and len(v) == len(values[0]) for v in values):
        spans = [_span(list(column)) for column in zip(*values, strict=True)]
        return None if None in spans else "[" + ", ".join(map(str, spans)) + "]"
    if not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
        return None
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _show(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        shown = [_show(v) for v in value]
        return shown[0] + " (every model)" if len(shown) > 1 and len(set(shown)) == 1 else "[" + ", ".join(shown) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "as the dialect says"
    return f"{value:g}" if isinstance(value, float) else str(value)
