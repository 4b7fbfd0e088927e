"""Merged adapters to files, with where they come from."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._version import __version__
from ..errors import ArgumentError, OutputError

if TYPE_CHECKING:
    from .merged import MergedAdapter

__all__ = ["check_target", "provenance", "save"]

_FORMS = ("peft", "kohya")


def check_target(path: str | PathLike[str], form: str = "peft", *, overwrite: bool = False) -> None:
    """Refuse what cannot be written, before any work is done.

    Raises
    ------
    ArgumentError : unknown form. OutputError : something is there and must not be replaced.
    """
    from ..formats.adapters.folder import refuse_taken

    if form not in _FORMS:
        raise ArgumentError("unknown form of adapter file", code="form", expected="'peft' or 'kohya'", got=repr(form))
    target = Path(path)
    taken = any(target.iterdir()) if target.is_dir() else target.exists()
    if taken and not overwrite:
        raise OutputError(
            "the output is already there",
            code="output.exists",
            file=str(target),
            hint="Remove it, name another, or allow it to be overwritten.",
        )
    refuse_taken(target, overwrite, folder=form == "peft")


def provenance(merged: MergedAdapter) -> dict[str, Any]:
    """What the metadata of a file tell: version, method, parameters, inputs, and rank and kept energy per module."""
    report = merged.report
    data = report.to_dict()
    return {
        "version": __version__,
        "method": report.method,
        "dialect": report.dialect,
        "seed": report.seed,
        "params": data["params"],
        "rank": report.rank,
        "energy": report.energy,
        "inputs": [
            {**given, "sha256": source.sha256} for given, source in zip(data["inputs"], merged.sources, strict=True)
        ],
        "modules": {name: {"rank": m.rank, "kept_energy": m.kept_energy} for name, m in report.modules.items()},
    }


def save(merged: MergedAdapter, path: str | PathLike[str], form: str, *, overwrite: bool) -> None:
    """See `MergedAdapter.save`."""
    from ..formats.adapters import kohya_names, write_kohya, write_peft

    check_target(path, form, overwrite=overwrite)
    modules = dict(merged.modules.values())
    metadata = provenance(merged)
    if form == "peft":
        write_peft(
            path,
            modules,
            base_name=merged.base,
            dtype=merged.dtype,
            metadata=metadata,
            extras=merged.extras,
            config=merged.inherited,
            base=merged.shapes,
            overwrite=overwrite,
        )
        return
    if merged.extras:
        raise ArgumentError(
            "a kohya file holds no replaced tensors (modules_to_save)",
            code="form",
            expected="form 'peft'",
            got=", ".join(list(merged.extras)[:4]),
        )
    names = {module: name for source in merged.sources for module, name in kohya_names(source).items()}
    write_kohya(
        path,
        modules,
        names=names,
        base_name=merged.base,
        dtype=merged.dtype,
        metadata=metadata,
        overwrite=overwrite,
    )
