"""Reading and writing on top of `Io`: exact lengths, retries of transient errors, errors that name file and offset."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

from ..errors import InputError, MergeError, OutputError
from .io import Io

__all__ = [
    "create",
    "fsync_dir",
    "output_error",
    "publish_swap",
    "read_exact",
    "read_small",
    "remove_tree",
    "write_exact",
    "write_small",
]

_TRANSIENT = (errno.EINTR, errno.EAGAIN)
_READ_RETRIES = 3


def _input_error(what: str, path: Path | str, error: OSError, **where: Any) -> InputError:
    return InputError(f"{what}: {error.strerror or error}", code="input.io", file=str(path), **where)


def read_exact(io: Io, fd: int, view: memoryview, offset: int, path: Path | str) -> None:
    """Fills `view` from `offset`.

    Raises
    ------
    InputError : the file ends early ("changed or truncated"), or cannot be read after three tries.
    """
    failures = 0
    while True:
        try:
            got = io.preadv(fd, [view], offset)
        except OSError as error:
            if error.errno in _TRANSIENT:
                continue
            failures += 1
            if error.errno == errno.EIO and failures < _READ_RETRIES:
                continue
            raise _input_error(f"reading {len(view)} bytes at offset {offset} failed", path, error) from error
        if got == len(view):
            return
        if got <= 0:
            raise InputError(
                "the file was changed or truncated while it was read",
                code="input.truncated",
                file=str(path),
                expected=f"{len(view)} bytes at offset {offset}",
                got="end of file",
            )
        view = view[got:]
        offset += got


def write_exact(io: Io, fd: int, data: bytes | memoryview, offset: int, path: Path | str) -> None:
    """Writes all of `data` at `offset`, looping over short writes.

    Raises
    ------
    OutputError : the disk is full, or refuses.
    """
    view = memoryview(data)
    stalls = 0
    while len(view):
        try:
            done = io.pwrite(fd, view, offset)
        except OSError as error:
            if error.errno in _TRANSIENT:
                continue
            raise output_error(f"writing {len(view)} bytes at offset {offset} failed", path, error) from error
        stalls = 0 if done else stalls + 1
        if stalls > 3:
            raise OutputError("writing makes no progress", code="output.stalled", file=str(path))
        view = view[done:]
        offset += done


def output_error(what: str, path: Path | str, error: OSError) -> MergeError:
    """An OutputError for a failed operation on `path`; a full disk is told with the bytes that are free."""
    got = hint = None
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        try:
            free = shutil.disk_usage(Path(path).parent).free
            got = f"{free} bytes free"
        except OSError:
            pass
        hint = "Free space and run the same command again: it resumes."
    return OutputError(f"{what}: {error.strerror or error}", code="output.io", file=str(path), got=got, hint=hint)


def create(io: Io, path: Path) -> int:
    """A new file, open for reading and writing; it must not exist."""
    try:
        return io.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    except OSError as error:
        raise output_error("cannot create the file", path, error) from error


def fsync_dir(io: Io, path: Path) -> None:
    """Makes the names in a folder durable."""
    try:
        fd = io.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            io.fsync(fd)
        finally:
            io.close(fd)
    except OSError as error:
        raise output_error("cannot sync the folder", path, error) from error


def write_small(io: Io, temporary: Path, target: Path, data: bytes) -> None:
    """Publishes `data` as `target`: temporary file, fsync, rename, fsync of the folder."""
    fd = create(io, temporary)
    try:
        write_exact(io, fd, data, 0, temporary)
        io.fsync(fd)
    except OSError as error:
        raise output_error("cannot sync the file", temporary, error) from error
    finally:
        _close(io, fd, temporary)
    try:
        io.rename(temporary, target)
    except OSError as error:
        raise output_error("cannot rename the file", target, error) from error
    fsync_dir(io, target.parent)


def _close(io: Io, fd: int, path: Path) -> None:
    try:
        io.close(fd)
    except OSError as error:
        raise output_error("closing the file failed", path, error) from error


def read_small(io: Io, path: Path) -> bytes:
    """A whole small file; OSError as it comes."""
    fd = io.open(path, os.O_RDONLY)
    try:
        size = io.fstat(fd).st_size
        data = bytearray(size)
        done = 0
        while done < size:
            try:
                got = io.preadv(fd, [memoryview(data)[done:]], done)
            except OSError as error:
                if error.errno in _TRANSIENT:
                    continue
                raise
            if got <= 0:
                break
            done += got
        return bytes(data[:done])
    finally:
        io.close(fd)


def remove_tree(io: Io, path: Path) -> None:
    """Removes a folder, if it is there."""
    try:
        io.rmtree(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise output_error("cannot remove the folder", path, error) from error


def publish_swap(io: Io, tree: Path, out: Path, aside: Path, *, replace: bool) -> None:
    """Renames `tree` to `out`, which takes the place of an empty folder but of nothing else.

    With `replace` and an `out` there, the two are exchanged: the old one is then at `tree`. Where the file system
    cannot exchange (renameat2), the old folder is first moved to `aside`, so that for a moment there is no `out`, and
    never half of one.
    """
    try:
        if not (replace and out.exists()):
            io.rename(tree, out)
        else:
            try:
                io.exchange(tree, out)
            except OSError as error:
                if error.errno not in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
                    raise
                io.rename(out, aside)
                io.rename(tree, out)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise OutputError(
                "the output appeared while the merge ran; nothing was replaced",
                code="output.exists",
                file=str(out),
                hint="Remove it, or run again with --overwrite.",
            ) from error
        raise output_error("cannot publish the output", out, error) from error
    fsync_dir(io, out.parent)
