"""What may be at OUT: nothing that a merge reads, and with --overwrite nothing but a checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from ..errors import MergeError, OutputError
from ..formats.checkpoint import Checkpoint
from .adapted import AdaptedCheckpoint
from .manifest import FORMAT, MANIFEST_NAME
from .resolved import ResolvedMerge
from .smallfiles import SmallFile, folder_of

__all__ = ["STAGING_DIGITS", "check_apart", "check_target", "not_a_checkpoint", "refuse_to_replace"]

STAGING_DIGITS = 16
"""Digits of the plan hash in the name of a staging."""

_MAX_LINKS = 64
_MAX_NAMED = 5
_INDEX = "model.safetensors.index.json"
_SUFFIXES = (".json", ".safetensors", ".md", ".txt", ".model", ".jinja", ".yaml", ".yml")

Identity = tuple[int, int]


def check_target(out: Path, merge: ResolvedMerge, small: Sequence[SmallFile]) -> list[MergeError]:
    """What forbids writing to `out`, whatever is merged. out : absolute. small : files that are published with it."""
    parent = out.parent
    if not parent.is_dir():
        return [
            OutputError("the folder that should hold the output does not exist", code="output.parent", file=str(parent))
        ]
    if not os.access(parent, os.W_OK | os.X_OK):
        return [
            OutputError(
                "the folder that should hold the output is not writable", code="output.parent", file=str(parent)
            )
        ]
    longest = _longest_name(parent) - len(".mk-") - STAGING_DIGITS
    if len(os.fsencode(out.name)) > longest:
        return [
            OutputError(
                "the output's name is too long: its staging folder has a longer one",
                code="output.name",
                file=str(out),
                expected=f"at most {longest} bytes",
                got=str(len(os.fsencode(out.name))),
            )
        ]
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        return [OutputError("the output is there and is not a folder", code="output.kind", file=str(out))]
    apart = check_apart(out, merge, small)
    if apart is not None:
        return [apart]
    if out.exists() and out.stat().st_dev != parent.stat().st_dev:
        return [
            OutputError(
                "the output is a mount point, and cannot be replaced in one step",
                code="output.device",
                file=str(out),
                hint="Name a folder inside it.",
            )
        ]
    return []


def _longest_name(folder: Path) -> int:
    try:
        longest = os.pathconf(folder, "PC_NAME_MAX")
    except (OSError, ValueError):
        return 255
    return longest if longest > 0 else 255


def check_apart(out: Path, merge: ResolvedMerge, small: Sequence[SmallFile]) -> OutputError | None:
    """The refusal of an output that is, holds or lies in an input, or holds a file that the merge reads.

    Links are followed one by one, so that an input which only passes through `out` counts too; folders and files are
    also compared by device and inode, which finds bind mounts and hard links.
    """
    real = os.path.join(os.path.realpath(out.parent), out.name)
    adapters = [Path(c.adapter.path) for c in merge.inputs if isinstance(c, AdaptedCheckpoint)]
    folders = [p for p in (*(c.path for c in merge.inputs), *adapters) if p.is_dir()]
    above = {os.path.dirname(real), *map(str, Path(real).parents)}
    identity = _identity(real)
    inside = identity if identity is None else _identities(real)
    outer = {i for p in above if (i := _identity(p)) is not None}
    for folder in folders:
        if os.path.realpath(folder) in above or _identity(folder) in outer:
            return _touches(out, folder)
    known: dict[str, bool] = {}
    for path in (*(c.path for c in merge.inputs), *adapters, *_files_read(merge, small)):
        for place in _places(path):
            if place == real or place.startswith(real + os.sep):
                return _touches(out, path)
        target = place if os.path.isdir(place) else os.path.dirname(place)
        if target not in known:
            parents = (target, *map(str, Path(target).parents))
            known[target] = identity is not None and any(_identity(p) == identity for p in parents)
        if known[target] or (inside and _identity(path) in inside):
            return _touches(out, path)
    return None


def _touches(out: Path, path: Path) -> OutputError:
    return OutputError(
        "the output would touch an input",
        code="output.is-input",
        file=str(out),
        expected="a folder apart from all that is read",
        got=f"input {path}",
    )


def _files_read(merge: ResolvedMerge, small: Sequence[SmallFile]) -> Iterator[Path]:
    """Every file that a merge reads and that is there."""
    for checkpoint in merge.inputs:
        yield from (file.path for file in checkpoint.files)
        yield from _beside(checkpoint)
    yield from (s.source for s in small if s.source is not None)
    if merge.recipe_file:
        yield Path(merge.recipe_file)
    template = merge.recipe.get("chat_template")
    if isinstance(template, str) and "\n" not in template:
        for folder in (Path(), Path(merge.recipe_file).parent):
            with suppress(OSError, ValueError):  # a template itself, which is no file name
                if (folder / template).is_file():
                    yield folder / template


def _beside(checkpoint: Checkpoint) -> Iterator[Path]:
    """The config, the index and the tokenizer's config, which are read without being copied as they are."""
    for name in ("config.json", _INDEX, "tokenizer_config.json"):
        path = folder_of(checkpoint) / name
        if path.exists():
            yield path


def _places(path: Path) -> list[str]:
    """Every link on the way to a file, and the file itself, each by its path without links before the last name."""
    todo = list(reversed(Path(os.path.join(os.getcwd(), path)).parts[1:]))
    at = os.sep
    found: list[str] = []
    while todo:
        part = todo.pop()
        if part == os.pardir:
            at = os.path.dirname(at)
            continue
        at = os.path.join(at, part)
        if len(found) < _MAX_LINKS and os.path.islink(at):
            found.append(at)
            target = Path(os.readlink(at))
            at = os.sep if target.is_absolute() else os.path.dirname(at)
            todo += reversed(target.parts[1:] if target.is_absolute() else target.parts)
    return [*found, at]


def _identity(path: Path | str) -> Identity | None:
    try:
        state = os.stat(path)
    except OSError:
        return None
    return state.st_dev, state.st_ino


def _identities(folder: str) -> set[Identity]:
    """Of all that lies directly in a folder."""
    with suppress(OSError):
        return {i for name in os.listdir(folder) if (i := _identity(os.path.join(folder, name))) is not None}
    return set()


def not_a_checkpoint(out: Path) -> list[str]:
    """Names in `out` without which it would be a checkpoint folder and nothing else; all if it is none.

    A checkpoint folder carries our manifest, or holds safetensors files and config.json or an index. It has no folders
    in it, and no files but those that its manifest lists or that checkpoint folders usually hold.
    """
    names = sorted(os.listdir(out))
    listed = _listed(out)
    weights = any(n.endswith(".safetensors") for n in names)
    beside = {"config.json", "adapter_config.json", _INDEX}
    if listed is None and not (weights and beside & set(names)):
        return names
    usual = (listed or set()) | {MANIFEST_NAME, ".gitattributes"}
    return [n for n in names if not ((n in usual or n.endswith(_SUFFIXES)) and not (out / n).is_dir())]


def _listed(out: Path) -> set[str] | None:
    """The files that the manifest in `out` lists; None without a manifest of ours."""
    try:
        manifest = json.loads((out / MANIFEST_NAME).read_bytes())
        if manifest["format"] != FORMAT:
            return None
        return {str(file["name"]) for key in ("files", "small_files") for file in manifest[key]}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def named(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    every = list(names)
    more = f" and {len(every) - _MAX_NAMED} more" if len(every) > _MAX_NAMED else ""
    return ", ".join(f"'{n}'" for n in every[:_MAX_NAMED]) + more


def refuse_to_replace(out: Path) -> None:
    """Refuses an output that holds more than a checkpoint.

    Raises
    ------
    OutputError : names what it holds.
    """
    strange = not_a_checkpoint(out) if out.is_dir() else []
    if strange:
        raise OutputError(
            "the output holds more than a checkpoint, and is not replaced",
            code="output.not-a-checkpoint",
            file=str(out),
            expected="a checkpoint folder without other files or folders",
            got=named(strange),
            hint="Delete it yourself, or name another folder.",
        )
