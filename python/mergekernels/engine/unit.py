"""A unit: one output file, from its temporary to its receipt."""

from __future__ import annotations

import errno
import os
import threading
from contextlib import suppress
from dataclasses import dataclass, field

from ..errors import OutputError
from .digests import file_sha256
from .fileops import create, fsync_dir, output_error, read_exact, write_exact
from .io import Io
from .layout import OutputFile
from .receipts import Receipt, TensorRecord, write_receipt
from .staging import Staging

__all__ = ["SyncFailed", "Unit", "sync_failure"]

SYNC_BYTES = 32 << 20
"""Output bytes after which a background fdatasync is asked for, so that the last sync finds little to do."""


class SyncFailed(Exception):
    """A sync of the file failed: its pages may be lost and marked clean, so only a new file can be trusted."""

    def __init__(self, error: OSError) -> None:
        self.error = error
        super().__init__(str(error))


@dataclass
class Unit:
    """One output file in the making. Its methods may be called by several workers, except `commit`."""

    io: Io
    staging: Staging
    plan_hash: str
    number: int
    file: OutputFile
    fd: int = -1
    written: int = 0
    sync_error: OSError | None = None
    _records: dict[str, TensorRecord] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.temporary = self.staging.temporary(self.file.name)

    def open(self) -> None:
        """Creates the temporary, reserves its full size and writes the header; once.

        Raises
        ------
        OutputError : no space (with bytes needed and free), or no permission.
        """
        with self._lock:
            if self.fd >= 0:
                return
            fd = create(self.io, self.temporary)
            try:
                self._reserve(fd)
                write_exact(self.io, fd, self.file.header, 0, self.temporary)
            except BaseException:
                self.io.close(fd)
                raise
            self.fd = fd

    def _reserve(self, fd: int) -> None:
        while True:
            try:
                self.io.fallocate(fd, self.file.size)
                return
            except OSError as error:
                if error.errno == errno.EINTR:
                    continue
                what = f"cannot reserve {self.file.size} bytes for {self.file.name}"
                raise output_error(what, self.temporary, error) from error

    def write(self, data: memoryview, offset: int) -> bool:
        """Writes at a planned offset. True if a background sync is due."""
        write_exact(self.io, self.fd, data, offset, self.temporary)
        with self._lock:
            before = self.written // SYNC_BYTES
            self.written += len(data)
            return self.written // SYNC_BYTES > before

    def read_back(self, memory: memoryview, offset: int) -> memoryview:
        """Fills `memory` from what was written at `offset`, and returns it."""
        read_exact(self.io, self.fd, memory, offset, self.temporary)
        return memory

    def finish(self, record: TensorRecord) -> bool:
        """A tensor is written. True if it was the last."""
        with self._lock:
            self._records[record.name] = record
            return len(self._records) == len(self.file.tensors)

    def sync(self) -> None:
        """A background sync; a failure is kept for `commit`."""
        if self.fd >= 0 and self.sync_error is None:
            try:
                self.io.fdatasync(self.fd)
            except OSError as error:
                self.sync_error = error

    def commit(self) -> Receipt:
        """Makes the file durable under its name, then its receipt.

        Raises
        ------
        SyncFailed : the data may be lost; the unit must be done again in a new file. OutputError : anything else.
        """
        if self.sync_error is None:
            try:
                self.io.fsync(self.fd)
            except OSError as error:
                self.sync_error = error
        fd, self.fd = self.fd, -1
        try:
            self.io.close(fd)
        except OSError as error:
            raise output_error("closing the file failed", self.temporary, error) from error
        if self.sync_error is not None:
            self._drop()
            raise SyncFailed(self.sync_error)
        target = self.staging.tree / self.file.name
        try:
            self.io.rename(self.temporary, target)
        except OSError as error:
            raise output_error("cannot rename the file", target, error) from error
        fsync_dir(self.io, self.staging.tree)
        records = tuple(self._records[t.name] for t in self.file.tensors)
        digest = file_sha256(self.file.header, (r.sha256 for r in records))
        receipt = Receipt(self.plan_hash, self.file.name, self.file.size, digest, records)
        write_receipt(self.io, self.staging, receipt)
        return receipt

    def abandon(self) -> None:
        """Closes and removes the temporary of a unit that will not be committed."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            with suppress(OSError):
                self.io.close(fd)
            self._drop()

    def _drop(self) -> None:
        with suppress(OSError):
            self.io.unlink(self.temporary)


def sync_failure(file: OutputFile, error: OSError) -> OutputError:
    """The error for a unit whose data could not be synced twice."""
    return OutputError(
        f"the data of {file.name} could not be made durable, twice: {error.strerror or error}",
        code="output.sync",
        file=file.name,
        got=os.strerror(error.errno) if error.errno else None,
        hint="Look at the disk; the same command resumes.",
    )
