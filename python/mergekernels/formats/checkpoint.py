"""A checkpoint folder: its safetensors files, their headers, and where each tensor lies."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from ..errors import FormatError, InputError, MergeError, PlanError
from ..tensors import DType
from .safetensors import Header, inspect

__all__ = ["Checkpoint", "ShardFile", "TensorInfo", "open_checkpoint"]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_MAX_JSON = 256 * 2**20
_MAX_LISTED = 10


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies. file : position in `Checkpoint.files`. offset : absolute, in bytes, in that file."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    file: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class ShardFile:
    """One safetensors file and its identity when its header was read.

    header_sha256 : hex digest of the 8 length bytes and the JSON header.
    """

    path: Path
    size: int
    mtime_ns: int
    inode: int
    header_sha256: str


@dataclass(frozen=True)
class Checkpoint:
    """The headers of a checkpoint; no tensor data.

    path : the folder, or the single file that was named.
    config : config.json as a dictionary, for a single file the one in the same folder; empty if there is none.
    label : what the user called it. warnings : what is odd but harmless.
    """

    path: Path
    files: tuple[ShardFile, ...]
    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""
    warnings: tuple[str, ...] = ()


def open_checkpoint(path: str | PathLike[str], *, label: str | None = None) -> Checkpoint:
    """Reads the headers of a checkpoint.

    Parameters
    ----------
    path : a folder with model.safetensors.index.json and its shards, or with one safetensors file, or such a file.
        The index decides where there is one.
    label : what the user called it; the path if None.

    Raises
    ------
    InputError : nothing there to merge; says what to do.
    FormatError : a header, the index or config.json is malformed.
    PlanError : several such problems; lists all.
    """
    root = Path(path)
    name = label if label is not None else os.fspath(path)
    if root.is_file():
        config, warnings = _config_beside(root)
        return _open(root, [root], None, config, name, tuple(warnings))
    if not root.is_dir():
        raise InputError("no such checkpoint folder or safetensors file", code="checkpoint.missing", file=str(root))
    index, files, warnings = _find(root)
    problems: list[MergeError] = []
    config = {}
    try:
        config = _read_config(root / "config.json")
    except FormatError as error:
        problems.append(error)
    weight_map: dict[str, str] | None = None
    total_size: object = None
    if index is not None:
        weight_map, total_size = _read_index(index)
        files = [root / shard for shard in sorted(set(weight_map.values()))]
    try:
        checkpoint = _open(root, files, weight_map, config, name, tuple(warnings), index)
    except PlanError as error:
        raise PlanError([*problems, *error.problems]) from None
    except MergeError as error:
        problems.append(error)
    _raise(problems)
    if index is not None:
        nbytes = sum(t.nbytes for t in checkpoint.tensors.values())
        if total_size is not None and total_size != nbytes:
            warnings.append(f"{index}: total_size is {total_size}, the tensors have {nbytes} bytes")
    return Checkpoint(root, checkpoint.files, checkpoint.tensors, config, name, tuple(warnings))


def _raise(problems: list[MergeError]) -> None:
    """Raises nothing, the one problem, or all of them together."""
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise PlanError(problems)


def _find(root: Path) -> tuple[Path | None, list[Path], list[str]]:
    """The index or the single file of a folder, and warnings."""
    index = root / _INDEX
    single = root / _SINGLE
    if index.exists() or index.is_symlink():
        stale = [f"{single}: ignored, the index beside it decides"] if single.exists() else []
        return index, [], stale
    if single.exists() or single.is_symlink():
        return None, [single], []
    files = sorted(p for p in root.iterdir() if p.name.endswith(".safetensors"))
    if len(files) == 1:
        return None, files, []
    if files:
        raise InputError(
            f"several safetensors files and no {_INDEX}: {_some([f.name for f in files])}",
            code="checkpoint.no-index",
            file=str(root),
            hint="Name the one file to read, or restore the index",
        )
    pickles = sorted(p.name for p in root.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickles:
        raise InputError(
            f"only pickle files ({_some(pickles)}), which can run code when they are read",
            code="checkpoint.pickle",
            file=str(root),
            expected="safetensors",
            hint="Convert it: load it with transformers and call save_pretrained(folder, safe_serialization=True)",
        )
    raise InputError("no safetensors file in the folder", code="checkpoint.empty", file=str(root))


def _open(
    root: Path,
    files: list[Path],
    weight_map: Mapping[str, str] | None,
    config: Mapping[str, Any],
    label: str,
    warnings: tuple[str, ...],
    index: Path | None = None,
) -> Checkpoint:
    """Reads the headers of `files` and checks them against the index."""
    problems: list[MergeError] = []
    shards: list[ShardFile] = []
    tensors: dict[str, TensorInfo] = {}
    doubled: list[str] = []
    for file in files:
        try:
            header = inspect(file)
        except MergeError as error:
            if index is not None and not file.exists():
                missing = f"shard '{file.name}' of the index is missing"
                problems.append(InputError(missing, code="checkpoint.shard", file=str(index)))
            else:
                problems.append(error)
            continue
        doubled += _add(header, file, shards, tensors)
    if doubled:
        problems.append(
            FormatError(f"tensors stored in two files: {_some(doubled)}", code="index.doubled", file=str(index or root))
        )
    # Without all the headers, "missing" would repeat what the broken files already say.
    if weight_map is not None and not problems:
        problems += _check_index(str(index), weight_map, tensors, [f.name for f in files])
    _raise(problems)
    return Checkpoint(root, tuple(shards), tensors, config, label, warnings)


def _add(header: Header, file: Path, shards: list[ShardFile], tensors: dict[str, TensorInfo]) -> list[str]:
    """Appends one file; returns the names that were there already."""
    position = len(shards)
    shards.append(ShardFile(file, header.size, header.mtime_ns, header.inode, header.sha256))
    doubled = []
    for name, entry in header.entries.items():
        if name in tensors:
            doubled.append(name)
        offset = header.data_start + entry.begin
        tensors[name] = TensorInfo(name, entry.dtype, entry.shape, position, offset, entry.nbytes)
    return doubled


def _check_index(
    index: str, weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo], files: list[str]
) -> list[MergeError]:
    """Keys and files of the index must equal the union of the headers."""
    missing = [n for n in weight_map if n not in tensors]
    extra = [n for n in tensors if n not in weight_map]
    moved = [n for n, shard in weight_map.items() if n in tensors and files[tensors[n].file] != shard]
    found: list[MergeError] = []
    for names, what in (
        (missing, "tensors of the index are in no file"),
        (extra, "tensors of the files are not in the index"),
        (moved, "tensors are in another file than the index says"),
    ):
        if names:
            found.append(FormatError(f"{len(names)} {what}: {_some(names)}", code="index.mismatch", file=index))
    return found


def _some(names: list[str]) -> str:
    """The first names and how many more there are."""
    shown = ", ".join(f"'{n}'" for n in sorted(names)[:_MAX_LISTED])
    return shown + (f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else "")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [k for k, _ in pairs]
        raise ValueError(f"duplicate key {next(k for k in names if names.count(k) > 1)!r}")
    return result


def _read_json(file: Path, *, unique: bool) -> Any:
    """A JSON file as data, with every way of failing named."""
    try:
        if not file.is_file():
            raise InputError("not a regular file", code="json.file", file=str(file))
        if file.stat().st_size > _MAX_JSON:
            raise FormatError("too large", code="json.size", file=str(file), expected=f"at most {_MAX_JSON} bytes")
        return json.loads(file.read_bytes(), object_pairs_hook=_unique if unique else None)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"not valid JSON: {error}", code="json", file=str(file)) from None
    except OSError as error:
        raise InputError(f"cannot read: {error.strerror}", code="json.read", file=str(file)) from None


def _read_config(file: Path) -> dict[str, Any]:
    """config.json, or an empty dictionary if there is none."""
    if not file.exists():
        return {}
    config = _read_json(file, unique=False)
    if not isinstance(config, dict):
        raise FormatError("not a JSON object", code="config", file=str(file), got=type(config).__name__)
    return config


def _config_beside(file: Path) -> tuple[dict[str, Any], list[str]]:
    """config.json in the folder of a single file. One that cannot be used may belong to something else: a warning."""
    try:
        return _read_config(file.parent / "config.json"), []
    except MergeError as error:
        return {}, [f"ignored: {error}"]


def _read_index(file: Path) -> tuple[dict[str, str], object]:
    """(weight_map, total_size) of an index whose file names are bare names."""
    index = _read_json(file, unique=True)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError("no weight_map", code="index", file=str(file), expected="an object of tensor to file name")
    problems: list[MergeError] = []
    for shard in dict.fromkeys(v if isinstance(v, str) else repr(v) for v in weight_map.values()):
        if not _is_bare(shard):
            problems.append(
                FormatError(
                    "unusable file name in weight_map",
                    code="index.path",
                    file=str(file),
                    expected="the bare name of a .safetensors file in the same folder",
                    got=repr(shard),
                )
            )
    _raise(problems)
    metadata = index.get("metadata")
    return weight_map, metadata.get("total_size") if isinstance(metadata, dict) else None


def _is_bare(name: str) -> bool:
    """Whether a string is a plain file name. The string is checked, not the resolved path: caches use links."""
    return name.endswith(".safetensors") and not any(c in name for c in "/\\\0") and name not in (".", "..")
