"""Reading an adapter of any form."""

from __future__ import annotations

import os
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Union

from ...adapters.model import Adapter
from ...errors import ArgumentError, InputError
from ..hub import looks_like_hub, snapshot
from .config import CONFIG, read_config
from .detect import detect
from .named import build_named
from .peft import build_peft
from .sites import Base, base_shapes
from .stored import of_file, of_mapping

__all__ = ["AdapterLike", "read_adapter"]

AdapterLike = Union[str, "PathLike[str]", Mapping[str, Any], Adapter]
_WEIGHTS = "adapter_model.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def read_adapter(
    adapter: AdapterLike,
    *,
    base: Base | None = None,
    config: Mapping[str, Any] | None = None,
    label: str = "",
    name: str = "",
) -> Adapter:
    """Opens an adapter: headers and config are read and checked, tensors only when a module is loaded.

    Nothing stays open, and torch is not imported before a tensor is loaded.

    Parameters
    ----------
    adapter : a PEFT folder, a safetensors file, a hub reference in the local cache, or a mapping from name to tensor
        (lazy ones are asked once for each tensor's shape). An `Adapter` is returned as it is.
    base : the base model, which settles names, shapes and orientations; without it they are those of the factors.
    config : fields that replace or complete those of adapter_config.json or of diffusers' metadata; needed for a
        mapping with PEFT's names.
    label : what errors and reports call it; the path if empty.
    name : which adapter, where a folder or mapping holds several; for kohya and diffusers files the component that
        `base` is ("unet", "te1", "text_encoder").

    Raises
    ------
    InputError, FormatError, PlanError : a refused variant, a malformed file, factors without partner, shapes that do
        not fit each other or the base.
    """
    if isinstance(adapter, Adapter):
        return adapter
    shapes = base_shapes(base)
    given = dict(config or {})
    if isinstance(adapter, Mapping):
        source, tensors = of_mapping(adapter, label or "adapter")
        if detect(tensors, given, {}) == "named":
            return build_named(tensors, source, shapes=shapes, config=given, name=name, metadata={}, form="memory")
        return build_peft(tensors, given, source, shapes=shapes, name=name, form="memory")
    if not isinstance(adapter, (str, os.PathLike)):
        raise ArgumentError(
            "an adapter is a path or a mapping of tensors", code="adapter.type", got=type(adapter).__name__
        )
    path = os.fspath(adapter)
    if name and os.path.exists(os.path.join(path, name, CONFIG)):
        # A sub-folder of that name is the adapter; its tensors carry no name.
        path, name = os.path.join(path, name), ""
    file, folder = _find(Path(path))
    source, tensors, metadata = of_file(str(file), label or path)
    beside = read_config(folder / CONFIG) if (folder / CONFIG).exists() else {}
    if detect(tensors, {**beside, **given}, metadata, file.name) == "named":
        return build_named(tensors, source, shapes=shapes, config=given, name=name, metadata=metadata, path=path)
    fields = {**beside, **given}
    return build_peft(tensors, fields, source, shapes=shapes, name=name, metadata=metadata, path=path)


def _find(path: Path) -> tuple[Path, Path]:
    """(weights file, folder of its config)."""
    if not path.exists() and looks_like_hub(str(path)):
        path = snapshot(str(path))
    if path.is_file():
        if path.suffix in _PICKLES:
            raise _pickle(path)
        return path, path.parent
    if not path.is_dir():
        raise InputError("no such adapter folder or file", code="adapter.missing", file=str(path))
    if (path / _WEIGHTS).exists():
        return path / _WEIGHTS, path
    files = sorted(p for p in path.iterdir() if p.suffix == ".safetensors")
    if len(files) == 1 and not (path / CONFIG).exists():
        return files[0], path
    for pickle in sorted(p for p in path.iterdir() if p.name.startswith("adapter_model") and p.suffix in _PICKLES):
        raise _pickle(pickle)
    inner = sorted(p.name for p in path.iterdir() if (p / CONFIG).exists())
    if inner:
        raise InputError(
            f"the folder holds adapters in sub-folders: {', '.join(inner)}",
            code="adapter.name",
            file=str(path),
            hint="Name one of them",
        )
    got = ", ".join(f.name for f in files) or "no safetensors file"
    raise InputError("not an adapter", code="adapter.missing", file=str(path), expected=_WEIGHTS, got=got)


def _pickle(path: Path) -> InputError:
    return InputError(
        "a pickle file, which can run code when it is read",
        code="adapter.pickle",
        file=str(path),
        expected=_WEIGHTS,
        hint="Convert it: load it with PEFT and call save_pretrained(folder, safe_serialization=True)",
    )
