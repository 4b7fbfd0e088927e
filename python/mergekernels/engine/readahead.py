"""Asks the kernel for input ranges ahead of the workers, in the order of the plan, so that the disk never waits.

The bytes go to the page cache, which is not counted in the budget. A hint that the kernel refuses is ignored.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress

from .inputs import InputFiles, Stream

__all__ = ["ReadAhead"]

_REQUEST = 8 << 20
_DISTANCE = 256 << 20


class ReadAhead:
    """A thread that walks over tensors at most `distance` bytes ahead of the workers' first reading of them.

    Used as a context manager around the jobs of a run. tensors : the sources of each output tensor, in plan order.
    fail : told if an input is gone or was changed.
    """

    def __init__(
        self,
        inputs: InputFiles,
        tensors: Iterable[list[Stream]],
        fail: Callable[[BaseException], None],
        distance: int = _DISTANCE,
    ) -> None:
        self._inputs = inputs
        self._tensors = tensors
        self._fail = fail
        self._distance = distance
        self._changed = threading.Condition()
        self._finished = 0
        self._stop = False
        self._thread = threading.Thread(target=self._work, name="mergekernels-ahead", daemon=True)

    def __enter__(self) -> ReadAhead:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._stop = True
            self._changed.notify()
        self._thread.join()

    def passed(self, nbytes: int) -> None:
        """So many more input bytes have been read for the first time."""
        if nbytes > 0:
            with self._changed:
                self._finished += nbytes
                self._changed.notify()

    def _work(self) -> None:
        asked = 0
        try:
            for streams in self._tensors:
                asked = self._tensor(streams, asked)
                if self._stop:
                    return
        except BaseException as error:  # handed to the thread that runs the merge
            self._fail(error)

    def _tensor(self, streams: list[Stream], asked: int) -> int:
        """Asks for one tensor, all sources in step, as the workers read them."""
        numbers = [s.file for s in streams]
        fds = self._inputs.acquire(numbers)
        try:
            for start in range(0, max(s.nbytes for s in streams), _REQUEST):
                with self._changed:
                    while asked - self._finished > self._distance and not self._stop:
                        self._changed.wait()
                if self._stop:
                    break
                for s in streams:
                    size = min(_REQUEST, s.nbytes - start)
                    if size > 0:
                        with suppress(OSError):
                            self._inputs.io.fadvise(fds[s.file], s.offset + start, size, os.POSIX_FADV_WILLNEED)
                        asked += size
        finally:
            self._inputs.release(set(numbers))
        return asked
