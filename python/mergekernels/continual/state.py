"""The state of a continual merge: a folder with a JSON file and one safetensors file.

    state.json              step, norms, parameters, and the name of the other file: what the state is
    delta-00000003.safetensors   the sum of the projected task vectors, tensor by tensor

A step writes a new safetensors file under a temporary name, renames it, then replaces `state.json`: at every moment
the folder holds the state before the step or the one after it.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from math import fsum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FormatError, InputError, OutputError
from ..formats.header import Entry
from ..formats.safetensors import build_header, layout

if TYPE_CHECKING:
    import torch

    from ..tensors import DType

__all__ = ["Continual", "Writer", "commit", "locked"]

_FORMAT, _VERSION = "mergekernels.continual", 1


@dataclass(frozen=True)
class Continual:
    """A continual merge after `step` models.

    folder : where it is. parameters : of opcm. norms : of the task vectors over the whole model, in the order of the
    stream. total : norm of the stored sum. labels : of the models, "" for those without. base : SHA-256 over the base's
    tensors. file : name of the file with the sum.
    """

    folder: Path
    parameters: Mapping[str, Any]
    norms: tuple[float, ...]
    total: float
    labels: tuple[str, ...]
    base: str
    file: str
    report: Mapping[str, Any] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """How many models are merged."""
        return len(self.norms)

    @property
    def norm(self) -> float:
        """Norm of the merged task vector: the mean norm of the models' task vectors."""
        return fsum(self.norms) / len(self.norms)

    @property
    def scale(self) -> float:
        """Lambda of the formula: the stored sum is lambda times the merged task vector; 1 where all is zero."""
        return self.total / self.norm if self.total and self.norm else 1.0

    @staticmethod
    def open(folder: str | os.PathLike[str]) -> Continual:
        """The state in a folder.

        Raises
        ------
        InputError : there is none. FormatError : it is damaged.
        """
        path = Path(folder) / "state.json"
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise InputError(
                "there is no continual merge", code="continual.missing", file=str(path), got=error.strerror
            ) from error
        try:
            read = json.loads(raw)
            if read["format"] != _FORMAT or read["version"] != _VERSION:
                raise ValueError(f"{read['format']} {read['version']}")
            state = Continual(
                Path(folder),
                dict(read["parameters"]),
                tuple(float(x) for x in read["norms"]),
                float(read["total"]),
                tuple(str(x) for x in read["labels"]),
                str(read["base"]),
                str(read["file"]),
            )
            if not state.norms or len(state.labels) != len(state.norms) or os.path.basename(state.file) != state.file:
                raise ValueError("inconsistent")
        except (ValueError, KeyError, TypeError) as error:
            raise FormatError(
                "the state of the continual merge is damaged",
                code="continual.state",
                file=str(path),
                expected=f"{_FORMAT} {_VERSION}",
                got=str(error)[:80],
            ) from error
        return state

    def delta(self, name: str) -> torch.Tensor:
        """The merged task vector of one tensor, in float32 (float64 where base or models are)."""
        return self._sum(name) / self.scale

    def merged(self, base: Any) -> Merge:
        """The merged model on this base: a mapping that computes each tensor when it is asked for.

        base : as in `continual_merge`.
        """
        from .step import as_mapping

        return Merge(self, as_mapping(base, "the base"))

    def _sum(self, name: str) -> torch.Tensor:
        from safetensors import safe_open

        path = self.folder / self.file
        try:
            with safe_open(path, framework="pt") as file:
                found: torch.Tensor = file.get_tensor(name)
                return found
        except OSError as error:
            raise InputError("the sum cannot be read", code="continual.missing", file=str(path)) from error


class Merge(Mapping[str, Any]):
    """A merged model, tensor by tensor; integer and bool tensors are the base's."""

    def __init__(self, state: Continual, base: Mapping[str, Any]) -> None:
        self._state, self._base = state, base

    def __getitem__(self, name: str) -> torch.Tensor:
        base: torch.Tensor = self._base[name]
        if not base.is_floating_point():
            return base.clone()
        delta = self._state.delta(name)
        return (base.to(delta.dtype) + delta).to(base.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._base.keys())

    def __len__(self) -> int:
        return len(self._base)


class Writer:
    """A safetensors file under a temporary name, written tensor by tensor."""

    def __init__(self, folder: Path, step: int, tensors: list[tuple[str, DType, tuple[int, ...]]]) -> None:
        self.name = f"delta-{step:08d}.safetensors"
        self._target = folder / self.name
        self._temporary = folder / (self.name + ".partial")
        self._entries: dict[str, Entry] = layout(tensors)
        header = build_header(self._entries, {"format": "pt"})
        self._start = len(header)
        try:
            self._fd = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            self._write(header, 0)
        except OSError as error:
            raise _failed(self._temporary, error) from error

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """The values of one tensor."""
        try:
            self._write(
                tensor.detach().cpu().contiguous().flatten().numpy().tobytes(), self._start + self._entries[name].begin
            )
        except OSError as error:
            raise _failed(self._temporary, error) from error

    def _write(self, data: bytes, offset: int) -> None:
        view, done = memoryview(data), 0
        while done < len(view):
            done += os.pwrite(self._fd, view[done : done + (1 << 26)], offset + done)

    def finish(self) -> None:
        """Durable, and under its name."""
        try:
            os.fsync(self._fd)
            os.rename(self._temporary, self._target)
        except OSError as error:
            raise _failed(self._target, error) from error

    def close(self) -> None:
        """Gives the descriptor back; what was not finished is removed."""
        os.close(self._fd)
        with suppress(OSError):
            self._temporary.unlink()


def commit(state: Continual) -> None:
    """Make `state` the state of its folder, and remove files of other steps.

    Raises
    ------
    OutputError
    """
    document = {
        "format": _FORMAT,
        "version": _VERSION,
        "method": "opcm",
        "step": state.step,
        "parameters": dict(state.parameters),
        "lambda": state.scale,
        "norms": list(state.norms),
        "total": state.total,
        "labels": list(state.labels),
        "base": state.base,
        "file": state.file,
    }
    target, temporary = state.folder / "state.json", state.folder / "state.json.partial"
    try:
        with open(temporary, "wb") as out:
            out.write(json.dumps(document, indent=1).encode())
            out.flush()
            os.fsync(out.fileno())
        os.rename(temporary, target)
        folder = os.open(state.folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        for old in state.folder.glob("delta-*.safetensors*"):
            if old.name != state.file:
                old.unlink()
    except OSError as error:
        raise _failed(target, error) from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder, made if need be, for one process at a time.

    Raises
    ------
    OutputError : another process has it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise _failed(folder, error) from error
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OutputError(
                "another process is merging into this state", code="continual.locked", file=str(folder)
            ) from error
        yield
    finally:
        os.close(fd)


def _failed(path: Path, error: OSError) -> OutputError:
    return OutputError("the state cannot be written", code="output.io", file=str(path), got=error.strerror)
