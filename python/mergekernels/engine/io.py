"""Every file operation of the engine, in one object, so that tests can make any one of them fail.

`Io` is thin: the operating system's calls under their own names. The functions below it add what every caller needs:
exact lengths, retries of transient errors, and errors that name file and offset.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
from pathlib import Path
from typing import Any

from ..errors import InputError, MergeError, OutputError

__all__ = [
    "Io",
    "create",
    "fsync_dir",
    "output_error",
    "publish_swap",
    "read_exact",
    "read_small",
    "remove_tree",
    "same_device",
    "write_exact",
    "write_small",
]

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_TRANSIENT = (errno.EINTR, errno.EAGAIN)
_READ_RETRIES = 3


class Io:
    """The operating system. Subclasses override `call` to count, fail or kill."""

    def call(self, name: str, *args: Any) -> Any:
        """Performs one operation by name; the only way through which files are touched."""
        return getattr(self, "_" + name)(*args)

    def open(self, path: Path | str, flags: int, mode: int = 0o666) -> int:
        """A descriptor, close-on-exec."""
        return int(self.call("open", path, flags | os.O_CLOEXEC, mode))

    def close(self, fd: int) -> None:
        """Closes; network file systems report late write errors here."""
        self.call("close", fd)

    def preadv(self, fd: int, views: list[memoryview], offset: int) -> int:
        """Bytes read, possibly fewer than asked."""
        return int(self.call("preadv", fd, views, offset))

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        """Bytes written, possibly fewer than asked."""
        return int(self.call("pwrite", fd, data, offset))

    def fallocate(self, fd: int, size: int) -> None:
        """Reserves the blocks of a file of `size` bytes."""
        self.call("fallocate", fd, size)

    def fsync(self, fd: int) -> None:
        """Data and metadata to disk."""
        self.call("fsync", fd)

    def fdatasync(self, fd: int) -> None:
        """Data to disk."""
        self.call("fdatasync", fd)

    def fstat(self, fd: int) -> os.stat_result:
        """The state of an open file."""
        result: os.stat_result = self.call("fstat", fd)
        return result

    def stat(self, path: Path | str) -> os.stat_result:
        """The state of a path, links followed."""
        result: os.stat_result = self.call("stat", path)
        return result

    def rename(self, source: Path, target: Path) -> None:
        """Replaces `target` atomically."""
        self.call("rename", source, target)

    def exchange(self, a: Path, b: Path) -> None:
        """Exchanges two names in one step; OSError with ENOSYS or EINVAL where there is no renameat2 for that."""
        self.call("exchange", a, b)

    def mkdir(self, path: Path) -> None:
        """Creates a folder with the mode that umask leaves."""
        self.call("mkdir", path)

    def unlink(self, path: Path) -> None:
        """Removes a file."""
        self.call("unlink", path)

    def rmtree(self, path: Path) -> None:
        """Removes a folder and all in it."""
        self.call("rmtree", path)

    def listdir(self, path: Path) -> list[str]:
        """Names in a folder, sorted."""
        return sorted(self.call("listdir", path))

    def flock(self, fd: int) -> None:
        """Takes the exclusive lock or raises BlockingIOError at once."""
        self.call("flock", fd)

    def fadvise(self, fd: int, offset: int, size: int, advice: int) -> None:
        """A hint to the page cache."""
        self.call("fadvise", fd, offset, size, advice)

    _open = staticmethod(os.open)
    _close = staticmethod(os.close)
    _preadv = staticmethod(os.preadv)
    _pwrite = staticmethod(os.pwrite)
    _fsync = staticmethod(os.fsync)
    _fdatasync = staticmethod(os.fdatasync)
    _fstat = staticmethod(os.fstat)
    _stat = staticmethod(os.stat)
    _rename = staticmethod(os.rename)
    _mkdir = staticmethod(os.mkdir)
    _unlink = staticmethod(os.unlink)
    _rmtree = staticmethod(shutil.rmtree)
    _listdir = staticmethod(os.listdir)
    _fadvise = staticmethod(os.posix_fadvise)

    @staticmethod
    def _fallocate(fd: int, size: int) -> None:
        os.posix_fallocate(fd, 0, size)

    @staticmethod
    def _flock(fd: int) -> None:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    @staticmethod
    def _exchange(a: Path, b: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        function = getattr(libc, "renameat2", None)
        if function is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        if function(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), ctypes.c_uint(_RENAME_EXCHANGE)) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(a), None, str(b))


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


def same_device(io: Io, a: Path, b: Path) -> bool:
    """True if two existing paths are on one file system."""
    return io.stat(a).st_dev == io.stat(b).st_dev


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
