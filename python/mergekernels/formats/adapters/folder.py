"""Writing small folders and files whole: a temporary name beside the target, synced, then renamed."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import OutputError
from ...tensors import DType
from ..safetensors import build_header, layout

if TYPE_CHECKING:
    import torch

__all__ = ["Planned", "refuse_taken", "write_file", "write_folder", "write_tensors"]

Planned = tuple[DType, tuple[int, ...], Callable[[], "torch.Tensor"]]
"""A tensor to write: dtype and shape in the file, and what gives its values in any float dtype."""


_OURS = frozenset({"adapter_config.json", "adapter_model.safetensors", "README.md"})
"""What a folder may hold to be replaced: what we write, and the card that PEFT writes beside it."""


def write_tensors(path: Path, tensors: Mapping[str, Planned], metadata: Mapping[str, str]) -> None:
    """A safetensors file with the reference writer's order; tensors are asked for one at a time and cast."""
    import torch

    entries = layout((name, dtype, shape) for name, (dtype, shape, _) in tensors.items())
    with path.open("xb") as out:
        out.write(build_header(entries, metadata))
        for name in entries:
            dtype, shape, load = tensors[name]
            values = load().detach().to("cpu", getattr(torch, dtype.torch)).reshape(shape).contiguous()
            if values.numel():
                # Not through numpy, which torch does not need.
                out.write((ctypes.c_char * (values.numel() * dtype.itemsize)).from_address(values.data_ptr()))
        out.flush()
        os.fsync(out.fileno())


def write_folder(folder: Path, parts: Iterable[tuple[str, Callable[[Path], None]]], *, overwrite: bool) -> None:
    """Writes files into a new folder that appears complete or not at all.

    Parameters
    ----------
    parts : (file name, function that writes it to the path given). overwrite : whether a folder there is replaced.

    Raises
    ------
    OutputError : the folder is there (and not empty) without `overwrite`, or writing failed.
    """
    refuse_taken(folder, overwrite, folder=True)
    temporary = _beside(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        for name, write in parts:
            write(temporary / name)
        _sync(temporary)
        _publish(temporary, folder)
    except OSError as error:
        raise _failed(folder, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_file(file: Path, write: Callable[[Path], None], *, overwrite: bool) -> None:
    """Writes one file that appears complete or not at all. Errors as in :func:`write_folder`."""
    refuse_taken(file, overwrite, folder=False)
    temporary = _beside(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, file)
        _sync(file.parent)
    except OSError as error:
        raise _failed(file, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def _publish(temporary: Path, folder: Path) -> None:
    """Renames; an old folder is moved aside first, moved back where that fails, and removed last."""
    old = None
    if folder.exists() and any(folder.iterdir()):
        old = temporary.with_name(temporary.name + ".old")
        folder.rename(old)
    try:
        temporary.rename(folder)
    except OSError:
        if old is not None:
            old.rename(folder)
        raise
    _sync(folder.parent)
    if old is not None:
        shutil.rmtree(old)


def refuse_taken(path: Path, overwrite: bool, *, folder: bool) -> None:
    """Refuses what is there; with `overwrite` only what is not of the kind that is written, or holds anything else.

    Raises
    ------
    OutputError : says what is there.
    """
    if not path.name:
        raise OutputError("the output needs a name of its own", code="output.exists", file=str(path))
    if not path.exists() and not path.is_symlink():
        return
    same = path.is_dir() if folder else path.is_file()
    others = sorted(p.name for p in path.iterdir() if p.name not in _OURS or p.is_dir()) if same and folder else []
    if others and overwrite:
        raise OutputError(
            "the output holds more than an adapter, and is not replaced",
            code="output.not-an-adapter",
            file=str(path),
            expected=f"a folder with no other files than {', '.join(sorted(_OURS))}",
            got=", ".join(others[:4]) + (f" and {len(others) - 4} more" if len(others) > 4 else ""),
            hint="Delete it yourself, or name another folder",
        )
    if same and (overwrite or (folder and not any(path.iterdir()))):
        return
    raise OutputError(
        "the output is already there" + ("" if same else f", and is no {'folder' if folder else 'file'}"),
        code="output.exists",
        file=str(path),
        hint="Remove it, name another, or allow it to be overwritten" if same else "Name another",
    )


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp-{os.getpid()}")


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _failed(path: Path, error: OSError) -> OutputError:
    what = f"cannot write the adapter: {error.strerror or error}"
    return OutputError(what, code="output.io", file=str(path))
