"""Every file operation of the engine, in one object, so that tests can make any one of them fail.

`Io` is thin: the operating system's calls under their own names. `fileops` adds what every caller needs.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
from pathlib import Path
from typing import Any

__all__ = ["Io"]


_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


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
