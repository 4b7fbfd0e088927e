"""Input files while a run reads them: few open descriptors, and proof that the files are those of the plan."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from ..errors import InputError
from ..formats.checkpoint import Checkpoint, ShardFile
from ..tensors import DType
from .fileops import read_exact
from .io import Io
from .resolved import Source

__all__ = ["InputFiles", "Stream", "streams_of"]

_CHANGED = "the input was changed after the merge was planned"


@dataclass(frozen=True)
class Stream:
    """The bytes of one input tensor. file : position in `InputFiles`. offset : of its first byte."""

    file: int
    offset: int
    nbytes: int
    dtype: DType
    label: str


def streams_of(inputs: Sequence[Checkpoint], sources: Iterable[Source], first: Sequence[int]) -> list[Stream]:
    """Where sources lie. first : number of the first file of each input among all files."""
    result = []
    for source in sources:
        checkpoint = inputs[source.input]
        info = checkpoint.tensors[source.tensor]
        label = checkpoint.label or str(checkpoint.path)
        result.append(Stream(first[source.input] + info.file, info.offset, info.nbytes, info.dtype, label))
    return result


class InputFiles:
    """All files of all inputs, opened on demand, at most `limit` at a time beyond those in use."""

    def __init__(self, io: Io, inputs: Sequence[Checkpoint], limit: int = 128) -> None:
        self.io = io
        self._limit = limit
        self._lock = threading.Lock()
        self.files: list[ShardFile] = []
        self.first: list[int] = []
        for checkpoint in inputs:
            self.first.append(len(self.files))
            self.files.extend(checkpoint.files)
        self._fds: dict[int, int] = {}
        self._users: dict[int, int] = {}

    def acquire(self, files: Iterable[int]) -> dict[int, int]:
        """Descriptors of `files` (number -> fd), to be given back with `release`.

        Raises
        ------
        InputError : a file is gone, or not the one that was planned.
        """
        result: dict[int, int] = {}
        with self._lock:
            for number in files:
                if number in result:
                    continue
                fd = self._fds.pop(number, None)
                if fd is None:
                    fd = self._open(number)
                self._fds[number] = fd  # last in order: most recently used
                self._users[number] = self._users.get(number, 0) + 1
                result[number] = fd
            self._evict()
        return result

    def release(self, files: Iterable[int]) -> None:
        """Ends one use of each of `files`."""
        with self._lock:
            for number in files:
                self._users[number] -= 1

    def check(self, files: Iterable[int]) -> None:
        """Compares size, modification time and inode of open files with the plan.

        Raises
        ------
        InputError : a file was changed while it was read.
        """
        with self._lock:
            for number in files:
                fd = self._fds.get(number)
                if fd is not None:
                    self._compare(number, self.io.fstat(fd))

    def close(self) -> None:
        """Closes all."""
        with self._lock:
            for fd in self._fds.values():
                self._close(fd)
            self._fds.clear()

    def _evict(self) -> None:
        spare = [n for n in self._fds if not self._users.get(n)]
        for number in spare[: max(0, len(self._fds) - self._limit)]:
            fd = self._fds.pop(number)
            try:
                self._compare(number, self.io.fstat(fd))
            finally:
                self._close(fd)

    def _close(self, fd: int) -> None:
        with suppress(OSError):  # it was only read
            self.io.close(fd)

    def _compare(self, number: int, state: os.stat_result) -> None:
        file = self.files[number]
        then = (file.size, file.mtime_ns, file.inode)
        now = (state.st_size, state.st_mtime_ns, state.st_ino)
        if then != now:
            names = ("size", "mtime_ns", "inode")
            differing = [i for i in range(3) if then[i] != now[i]]
            raise InputError(
                _CHANGED,
                code="input.changed",
                file=str(file.path),
                expected=", ".join(f"{names[i]} {then[i]}" for i in differing),
                got=", ".join(f"{names[i]} {now[i]}" for i in differing),
                hint="Run again: the merge is planned anew.",
            )

    def _open(self, number: int) -> int:
        file = self.files[number]
        try:
            fd = self.io.open(file.path, os.O_RDONLY)
        except OSError as error:
            raise InputError(
                f"the input cannot be opened: {error.strerror}", code="input.open", file=str(file.path)
            ) from error
        try:
            self._compare(number, self.io.fstat(fd))
            length = bytearray(8)
            read_exact(self.io, fd, memoryview(length), 0, file.path)
            header = bytearray(min(int.from_bytes(length, "little"), file.size - 8))
            read_exact(self.io, fd, memoryview(header), 8, file.path)
            if hashlib.sha256(length + header).hexdigest() != file.header_sha256:
                raise InputError(
                    _CHANGED,
                    code="input.changed",
                    file=str(file.path),
                    expected=f"header digest {file.header_sha256[:16]}",
                    got="another",
                    hint="Run again: the merge is planned anew.",
                )
        except OSError as error:
            self._close(fd)
            raise InputError(
                f"the input cannot be read: {error.strerror}", code="input.open", file=str(file.path)
            ) from error
        except BaseException:
            self._close(fd)
            raise
        return fd
