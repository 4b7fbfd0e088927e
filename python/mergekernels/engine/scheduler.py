"""Workers over jobs. A job is one tensor going through passes of tiles; several are in work, the oldest is served
first.

Determinism never comes from here: jobs write to planned places and merge exact statistics, in whatever order tiles
finish.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Generic, Protocol, TypeVar

__all__ = ["Job", "Scheduler"]

_TICK = 0.1

W = TypeVar("W", contravariant=True)


class Job(Protocol[W]):
    """One tensor. The scheduler calls `open` once, then for each pass `run` on every tile and `advance` once.

    tiles : number of tiles of the current pass, at least 1; set by `open` and `advance`.
    want, least : bytes of statistics it would like to hold, and must hold; `granted` is set before `open`.
    weight : bytes it should read in all, for progress. moved : bytes read so far.
    """

    tiles: int
    want: int
    least: int
    granted: int
    weight: int
    moved: int
    name: str

    def open(self) -> None:
        """Takes what it needs; called by a worker, once, before other calls."""
        ...

    def run(self, worker: W, index: int) -> None:
        """Works on one tile of the current pass; several workers at once."""
        ...

    def advance(self) -> bool:
        """Called alone, after the last tile of a pass. True if another pass follows."""
        ...


class _Active(Generic[W]):
    """A job in work and how far its pass is."""

    __slots__ = ("done", "job", "next")

    def __init__(self, job: Job[W]) -> None:
        self.job = job
        self.next = 0
        self.done = 0


class Scheduler(Generic[W]):
    """Runs jobs on threads until all are done, one fails, or the calling thread is interrupted.

    workers : one context per thread (tiles). window : most jobs in work. pool : bytes that all jobs in work may hold.
    """

    def __init__(self, workers: list[W], window: int, pool: int) -> None:
        self._workers = workers
        self._window = window
        self._free = pool
        self._pool = pool
        self._reserved = 0
        self._changed = threading.Condition()
        self._active: list[_Active[W]] = []
        self._admitting = False
        self._waiting: Job[W] | None = None
        self._jobs: Iterable[Job[W]] = ()
        self._finished = 0
        self._error: BaseException | None = None
        self._stop = False
        self._running = 0
        self._ended = threading.Lock()
        self.peak = 0

    def run(self, jobs: Iterable[Job[W]], tick: Callable[[int, str], None] | None = None, *, reserved: int = 0) -> None:
        """Works through `jobs` in order; returns when all are done.

        tick : called about ten times a second from this thread with (weight done, name of a tensor in work).
        reserved : bytes of the pool that the caller holds.

        Raises
        ------
        The first exception of a job, after all workers have stopped; what is raised in this thread, likewise.
        """
        self._jobs = iter(jobs)
        self._active = []
        self._free = self._pool - reserved
        self._reserved = reserved
        self._finished = 0
        self._admitting = self._stop = False
        self._waiting = self._error = None
        self._running = len(self._workers)
        self._ended = threading.Lock()
        self._ended.acquire()
        threads = [
            threading.Thread(target=self._work, args=(w,), name=f"mergekernels-{i}", daemon=True)
            for i, w in enumerate(self._workers)
        ]
        try:
            for t in threads:
                t.start()
            # Not `join`: before Python 3.13, one that a signal interrupts takes the thread for ended while it runs.
            while not self._ended.acquire(timeout=_TICK):
                if tick is not None:
                    tick(*self._progress())
            if tick is not None:
                tick(*self._progress())
        finally:
            self._stop = True
            with self._changed:
                self._changed.notify_all()
            for t in threads:
                if t.ident is not None:
                    t.join()
        if self._error is not None:
            raise self._error

    def fail(self, error: BaseException) -> None:
        """Stops the run with `error`, unless another was first. For helpers outside the workers."""
        with self._changed:
            if self._error is None:
                self._error = error
            self._stop = True
            self._changed.notify_all()

    @property
    def stopped(self) -> bool:
        """True once the run has failed or was interrupted."""
        return self._stop

    def _progress(self) -> tuple[int, str]:
        # Without the lock: a signal's exception inside its __enter__ would leave it held, and the workers would hang.
        active = tuple(self._active)
        moved = sum(min(a.job.moved, a.job.weight) for a in active)
        return self._finished + moved, active[0].job.name if active else ""

    def _work(self, worker: W) -> None:
        try:
            while True:
                task = self._take()
                if task is None:
                    return
                active, index = task
                active.job.run(worker, index)
                self._finish(active)
        except BaseException as error:  # handed to the calling thread
            self.fail(error)
        finally:
            with self._changed:
                self._running -= 1
                if self._running == 0:
                    self._ended.release()

    def _take(self) -> tuple[_Active[W], int] | None:
        while True:
            with self._changed:
                while True:
                    if self._stop:
                        return None
                    for active in self._active:
                        if active.next < active.job.tiles:
                            active.next += 1
                            return active, active.next - 1
                    job = self._admit()
                    if job is not None:
                        break
                    if self._waiting is None and not self._active and not self._admitting:
                        self._changed.notify_all()
                        return None
                    self._changed.wait()
            job.open()
            with self._changed:
                self._admitting = False
                self._active.append(_Active(job))
                self._changed.notify_all()

    def _admit(self) -> Job[W] | None:
        """The next job, if there is room for it; its memory is taken. Called with the lock held."""
        if self._admitting or len(self._active) >= self._window:
            return None
        if self._waiting is None:
            self._waiting = next(iter(self._jobs), None)
        job = self._waiting
        if job is None:
            return None
        if min(job.want, self._pool - self._reserved) > self._free and self._active:
            return None
        job.granted = max(job.least, min(job.want, self._free))
        self._free -= job.granted
        self.peak = max(self.peak, self._pool - self._free)
        self._waiting = None
        self._admitting = True
        return job

    def _finish(self, active: _Active[W]) -> None:
        job = active.job
        with self._changed:
            active.done += 1
            if active.done < job.tiles:
                return
        more = job.advance()
        with self._changed:
            if more:
                active.next = active.done = 0
            else:
                self._active.remove(active)
                self._free += job.granted
                self._finished += job.weight
            self._changed.notify_all()
