"""The folder beside OUT in which an unfinished output lives, and the rules about what may be there.

`OUT.mk-<first 16 digits of the plan hash>/` holds `tree/` (what becomes OUT), `receipts/`, `waves/` (statistics over
the whole model), `tmp/` (files that are being written, deleted at the next start) and `lock`. It lies in OUT's own
folder, so that the last step is a rename.
"""

from __future__ import annotations

import errno
import json
import os
import re
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from ..errors import OutputError
from .fileops import fsync_dir, output_error, read_small, remove_tree
from .io import Io
from .manifest import MANIFEST_NAME
from .target import STAGING_DIGITS, named, not_a_checkpoint, refuse_to_replace

__all__ = ["MANIFEST_NAME", "OutState", "Staging", "inspect_out", "published"]

OutState = Literal["absent", "done", "resumable", "exists", "other-plan"] | None
_FOLDERS = ("tree", "receipts", "waves", "tmp")
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_TRIES = 5
"""Times that a staging is made, if other processes remove it under our hands."""


def _root(out: Path, plan_hash: str) -> Path:
    return out.with_name(f"{out.name}.mk-{plan_hash[:STAGING_DIGITS]}")


def published(io: Io, out: Path, plan_hash: str) -> dict[str, Any] | None:
    """The manifest of `out`, if it is of this plan and all files are there with their sizes; None otherwise."""
    try:
        manifest = json.loads(read_small(io, out / MANIFEST_NAME))
        if manifest["plan_hash"] != plan_hash:
            return None
        for file in (*manifest["files"], *manifest["small_files"]):
            if io.stat(out / file["name"]).st_size != file["size"]:
                return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return dict(manifest)


def inspect_out(io: Io, out: Path, plan_hash: str) -> OutState:
    """What is at `out`: "done" (this plan), "exists" (something else), "other-plan" (nothing, but another plan's
    unfinished work beside it), "resumable" (this plan's staging), "absent".

    An empty folder counts as absent: publishing replaces it in one step.
    """
    if out.is_dir() and io.listdir(out):
        return "exists" if published(io, out, plan_hash) is None else "done"
    if _unfinished(io, out, plan_hash):
        return "other-plan"
    return "resumable" if _root(out, plan_hash).is_dir() else "absent"


def _others(io: Io, out: Path, plan_hash: str) -> list[Path]:
    """Stagings of other plans for the same OUT."""
    pattern = re.compile(re.escape(out.name) + rf"\.mk-[0-9a-f]{{{STAGING_DIGITS}}}")
    own = _root(out, plan_hash).name
    return [out.parent / n for n in io.listdir(out.parent) if pattern.fullmatch(n) and n != own]


def _unfinished(io: Io, out: Path, plan_hash: str) -> list[Path]:
    """Stagings of other plans that hold finished work. Any other gives way without being asked."""
    return [p for p in _others(io, out, plan_hash) if not _is_empty(io, p)]


def _is_empty(io: Io, staging: Path) -> bool:
    """True if a staging holds no finished work."""
    for name in ("receipts", "waves"):
        try:
            if io.listdir(staging / name):
                return False
        except FileNotFoundError:  # it is being made, or removed
            continue
        except OSError:
            return False
    return True


class Staging:
    """The staging of one plan, locked for this process."""

    def __init__(self, io: Io, out: Path, plan_hash: str) -> None:
        self.io = io
        self.out = out
        self.plan_hash = plan_hash
        self.root = _root(out, plan_hash)
        self.tree = self.root / "tree"
        self.receipts = self.root / "receipts"
        self.waves = self.root / "waves"
        self.tmp = self.root / "tmp"
        self._lock = -1

    def enter(self, *, overwrite: bool) -> bool:
        """Creates and locks the staging. False if OUT carries this plan already: then only `leave` is left to do.

        Raises
        ------
        OutputError : OUT is something else, or another plan's staging is there, without `overwrite`; another process
            is at work; the folder cannot be made.
        """
        self._refuse(overwrite)
        if not self.root.is_dir() and inspect_out(self.io, self.out, self.plan_hash) == "done":
            return False
        tries = 0
        while True:
            try:
                for folder in (self.root, *(self.root / name for name in _FOLDERS)):
                    self._mkdir(folder)
                if self._take_lock():
                    break
            except FileNotFoundError:  # another process finished, or took it for a leftover, and removed it
                if inspect_out(self.io, self.out, self.plan_hash) == "done":
                    return False
                tries += 1
                if tries == _TRIES:
                    raise
            except OSError as error:
                raise output_error("cannot make the staging folder", self.root, error) from error
        if inspect_out(self.io, self.out, self.plan_hash) == "done":
            fsync_dir(self.io, self.out.parent)
            return False
        try:
            for other in _others(self.io, self.out, self.plan_hash):
                if overwrite or _is_empty(self.io, other):
                    self._drop(other)
        except OutputError:
            # Another process was here first; what it has to find when it looks is no staging of ours.
            if _is_empty(self.io, self.root):
                self.remove()
            raise
        self._clean()
        fsync_dir(self.io, self.root)
        fsync_dir(self.io, self.out.parent)
        return True

    def leave(self) -> None:
        """Removes what lies beside an OUT that is done: its own staging, and those without finished work of processes
        that lost a race for OUT.
        """
        self.remove()
        for other in _others(self.io, self.out, self.plan_hash):
            if _is_empty(self.io, other):
                with suppress(OutputError):
                    self._drop(other)

    def temporary(self, name: str) -> Path:
        """A path for a new temporary file."""
        return self.tmp / f"{name}.{uuid.uuid4().hex}"

    def unlock(self) -> None:
        """Gives the lock back; the staging stays."""
        if self._lock >= 0:
            fd, self._lock = self._lock, -1
            self.io.close(fd)

    def remove(self) -> None:
        """Removes the staging after publication; its lock goes with it."""
        remove_tree(self.io, self.root)
        self.unlock()

    def _refuse(self, overwrite: bool) -> None:
        state = inspect_out(self.io, self.out, self.plan_hash)
        if state == "exists" and overwrite:
            refuse_to_replace(self.out)
        if overwrite or state == "done":
            return
        if state == "exists":
            strange = not_a_checkpoint(self.out)
            hint = "Name another folder, or use --overwrite to replace it once the merge is complete."
            if strange:
                hint = f"Name another folder. It holds {named(strange)}, which --overwrite would not replace."
            raise OutputError(
                "the output exists and is not the result of this plan",
                code="output.exists",
                file=str(self.out),
                hint=hint,
            )
        others = _unfinished(self.io, self.out, self.plan_hash)
        if others:
            raise OutputError(
                "an unfinished merge by another plan is there for this output",
                code="output.other-plan",
                file=str(others[0]),
                hint="Finish it with its own recipe and inputs, delete that folder, or use --overwrite to drop it.",
            )

    def _clean(self) -> None:
        """Removes temporary files, and whatever is no file where only files belong."""
        for folder in (self.tree, self.receipts, self.waves, self.tmp):
            for name in self.io.listdir(folder):
                path = folder / name
                if path.is_dir() and not path.is_symlink():
                    remove_tree(self.io, path)
                elif folder == self.tmp or path.is_symlink():
                    self.io.unlink(path)

    def _mkdir(self, path: Path) -> None:
        with suppress(FileExistsError):
            self.io.mkdir(path)

    def _take_lock(self) -> bool:
        """Takes the lock; False if the file was replaced meanwhile and all must be tried again."""
        path = self.root / "lock"
        fd = self.io.open(path, os.O_RDWR | os.O_CREAT)
        try:
            self.io.flock(fd)
            mine, there = self.io.fstat(fd), self.io.stat(path)
        except BlockingIOError:
            self.io.close(fd)
            raise self._busy(path) from None
        except FileNotFoundError:
            self.io.close(fd)
            return False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                self.io.close(fd)
                raise
            # No locks on this file system: two processes would do the same work and write equal bytes.
            self._lock = fd
            return True
        except BaseException:
            self.io.close(fd)
            raise
        if (mine.st_dev, mine.st_ino) != (there.st_dev, there.st_ino):
            self.io.close(fd)
            return False
        self._lock = fd
        return True

    def _drop(self, other: Path) -> None:
        """Removes another staging, locked meanwhile unless it has no lock yet.

        Raises
        ------
        OutputError : a process is at work in it.
        """
        try:
            fd = self.io.open(other / "lock", os.O_RDWR)
        except OSError:
            remove_tree(self.io, other)
            return
        try:
            self.io.flock(fd)
        except BlockingIOError:
            self.io.close(fd)
            raise self._busy(other / "lock") from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                self.io.close(fd)
                raise
        try:
            remove_tree(self.io, other)
        finally:
            self.io.close(fd)

    def _busy(self, path: Path) -> OutputError:
        return OutputError(
            "another process is merging into this output",
            code="output.busy",
            file=str(path),
            hint="Wait for it, or name another folder.",
        )
