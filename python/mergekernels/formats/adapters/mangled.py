"""kohya's names: a module's path with underscores for dots, "lora_unet_down_blocks_0_..." for "down_blocks.0...."."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from ...errors import InputError, MergeError, nearest

__all__ = ["component_of", "is_mangled", "resolve"]

_NAME = re.compile(r"lora_(?P<component>[a-z]+[0-9]*)_(?P<path>.+)")
_LISTED = 5


def is_mangled(name: str) -> bool:
    """Whether `name` is a module in kohya's spelling."""
    return "." not in name and _NAME.fullmatch(name) is not None


def component_of(name: str) -> str:
    """The part of a pipeline of a name in kohya's spelling: "unet", "te", "te1"; "" for another name."""
    found = _NAME.fullmatch(name)
    return found["component"] if found else ""


def resolve(
    names: Iterable[str], shapes: Mapping[str, tuple[int, ...]], where: str
) -> tuple[dict[str, str], list[MergeError]]:
    """Kohya's name -> module of the base, exactly.

    A module fits if its path, or the end of its path after a dot, becomes the name with underscores for dots. A whole
    path goes before ends of longer ones; several that fit otherwise are an error.
    """
    ends: dict[str, list[str]] = {}
    whole: dict[str, list[str]] = {}
    for tensor in shapes:
        if not tensor.endswith(".weight"):
            continue
        module = tensor.removesuffix(".weight")
        whole.setdefault(module.replace(".", "_"), []).append(module)
        end = module
        while end:
            ends.setdefault(end.replace(".", "_"), []).append(module)
            end = end.partition(".")[2]
    resolved: dict[str, str] = {}
    problems: list[MergeError] = []
    for name in names:
        found = _NAME.fullmatch(name)
        assert found is not None
        fitting = sorted(whole.get(found["path"]) or set(ends.get(found["path"], ())))
        if len(fitting) == 1:
            resolved[name] = fitting[0]
        elif fitting:
            shown = ", ".join(f"'{m}'" for m in fitting[:_LISTED])
            message = f"module '{name}' may be {len(fitting)} modules of the base: {shown}"
            problems.append(InputError(message, code="adapter.ambiguous", file=where, tensor=name))
        else:
            problems.append(
                InputError(
                    f"the base has no module that becomes '{name}'",
                    code="adapter.target-missing",
                    file=where,
                    tensor=name,
                    hint=nearest(found["path"], whole)
                    or f"`name` takes one component of the file, name='{found['component']}' for example",
                )
            )
    return resolved, problems
