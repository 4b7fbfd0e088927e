"""One thread beside the workers: syncs files while others are merged, and commits finished units."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from .receipts import Receipt
from .unit import SyncFailed, Unit

__all__ = ["Committer"]


class Committer:
    """Used as a context manager; leaving it waits for everything that was handed over.

    fail : told of an error that must stop the run, which is also kept as `error`. receipts : of units committed.
    failed : units whose sync failed, which must be done again in a new file.
    """

    def __init__(self, fail: Callable[[BaseException], None]) -> None:
        self._fail = fail
        self._queue: queue.SimpleQueue[tuple[str, Unit] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="mergekernels-commit", daemon=True)
        self._give_up = False
        self.error: BaseException | None = None
        self.receipts: list[Receipt] = []
        self.failed: list[tuple[Unit, OSError]] = []

    def __enter__(self) -> Committer:
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is not None:
            self._give_up = True
        self._queue.put(None)
        try:
            self._thread.join()
        except BaseException:  # interrupted: the commit in work is finished, the others are left to the next attempt
            self._give_up = True
            self._thread.join()
            raise

    def sync(self, unit: Unit) -> None:
        """A background sync of what has been written."""
        self._queue.put(("sync", unit))

    def commit(self, unit: Unit) -> None:
        """The unit's last tensor is written."""
        self._queue.put(("commit", unit))

    def _work(self) -> None:
        while True:
            item = self._queue.get()
            if item is None:
                return
            action, unit = item
            if self._give_up:
                continue
            try:
                if action == "sync":
                    unit.sync()
                else:
                    self.receipts.append(unit.commit())
            except SyncFailed as failure:
                self.failed.append((unit, failure.error))
            except BaseException as error:  # handed to the thread that runs the merge
                self._give_up = True
                self.error = error
                self._fail(error)
