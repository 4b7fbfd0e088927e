"""Worker threads for work that reads files: jobs from one list, the first error ends all."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from ..errors import InputError
from .fileops import read_exact
from .io import Io

__all__ = ["Reader", "for_each"]

Job = TypeVar("Job")
_TICK = 0.1


class Reader:
    """Exact reads of one thread; keeps the last file of each slot open, so that few descriptors are in use."""

    def __init__(self, io: Io | None = None) -> None:
        self._io = io or Io()
        self._open: dict[int, tuple[str, int]] = {}

    def read(self, path: str | os.PathLike[str], view: memoryview, offset: int, slot: int = 0) -> None:
        """Fills `view` from `offset` of the file.

        Raises
        ------
        InputError : the file ends before, or cannot be read.
        """
        name = os.fspath(path)
        read_exact(self._io, self._descriptor(name, slot), view, offset, name)

    def close(self) -> None:
        """Closes what is open."""
        for _, fd in self._open.values():
            self._io.close(fd)
        self._open.clear()

    def _descriptor(self, name: str, slot: int) -> int:
        held = self._open.get(slot)
        if held is not None:
            if held[0] == name:
                return held[1]
            del self._open[slot]
            self._io.close(held[1])
        try:
            fd = self._io.open(name, os.O_RDONLY)
        except OSError as error:
            raise InputError(f"cannot be opened: {error.strerror}", code="input.io", file=name) from error
        self._open[slot] = (name, fd)
        return fd


def for_each(
    jobs: Iterable[Job],
    worker: Callable[[Iterator[Job], Reader], None],
    threads: int,
    tick: Callable[[], None] | None = None,
) -> None:
    """Runs `worker(jobs, reader)` in `threads` threads, each drawing from the same jobs; returns when all are done.

    tick : called about ten times a second from the calling thread.
    The first exception of a worker, or one raised in the calling thread (Ctrl-C), ends the drawing of jobs and
    propagates once the threads are back.
    """
    lock = threading.Lock()
    source = iter(jobs)
    stop = threading.Event()
    errors: list[BaseException] = []

    def draw() -> Iterator[Job]:
        while not stop.is_set():
            with lock:
                try:
                    job = next(source)
                except StopIteration:
                    return
            yield job

    def run() -> None:
        reader = Reader()
        try:
            worker(draw(), reader)
        except BaseException as error:
            errors.append(error)
            stop.set()
        finally:
            reader.close()
            with lock:
                running.pop()
                if not running:
                    ended.release()

    running = [True] * max(1, threads)
    ended = threading.Lock()
    ended.acquire()
    team = [threading.Thread(target=run, daemon=True) for _ in running]
    for thread in team:
        thread.start()
    try:
        # Not `join`: before Python 3.13, one that a signal interrupts takes the thread for ended while it runs.
        while not ended.acquire(timeout=_TICK):
            if tick is not None:
                tick()
    finally:
        stop.set()
        for thread in team:
            if thread.ident is not None:
                thread.join()
    if errors:
        raise errors[0]
    if tick is not None:
        tick()
