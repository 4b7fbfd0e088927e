"""Progress as a bar on a terminal, as a line every few seconds elsewhere, as JSON objects for machines."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

from ..report.text import duration, size
from .output import Output

if TYPE_CHECKING:
    from ..engine.events import Progress

__all__ = ["Meter", "meter"]

_BAR_AFTER = 0.4  # seconds; shorter work shows no bar, and does not pay for importing one
_LINE_EVERY = 5.0
_JSON_EVERY = 1.0
_WINDOW = 10.0  # seconds over which a rate is taken


class Rate:
    """Bytes per second over the last seconds, and the time left."""

    def __init__(self) -> None:
        self._points: list[tuple[float, int]] = []

    def update(self, now: float, done: int) -> None:
        """Notes that `done` bytes were done at `now`."""
        if self._points and done < self._points[-1][1]:
            self._points.clear()
        self._points.append((now, done))
        while len(self._points) > 2 and now - self._points[0][0] > _WINDOW:
            self._points.pop(0)

    def per_second(self) -> float:
        """Bytes per second; 0 while unknown."""
        if len(self._points) < 2:
            return 0.0
        (t0, d0), (t1, d1) = self._points[0], self._points[-1]
        return (d1 - d0) / (t1 - t0) if t1 > t0 else 0.0

    def left(self, total: int) -> float | None:
        """Seconds until `total`, None while unknown."""
        rate = self.per_second()
        return (total - self._points[-1][1]) / rate if rate > 0.0 else None


class Meter(Protocol):
    """Draws progress; `close` before anything else is printed."""

    def update(self, phase: str, done: int, total: int, tensor: str = "", written: int = 0) -> None:
        """done, total : bytes of this phase. written : bytes of output so far. tensor : what is in work, or ""."""

    def close(self) -> None:
        """Takes the bar away."""


class Silent:
    """Draws nothing."""

    def update(self, phase: str, done: int, total: int, tensor: str = "", written: int = 0) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Lines:
    """A line on stderr, or a JSON object on stdout, every few seconds."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._every = _JSON_EVERY if output.as_json else _LINE_EVERY
        self._last = time.monotonic()
        self._phase = ""
        self._rate = Rate()

    def update(self, phase: str, done: int, total: int, tensor: str = "", written: int = 0) -> None:
        """Prints if the last line is old enough."""
        now = time.monotonic()
        if phase != self._phase:
            self._phase, self._rate = phase, Rate()
        self._rate.update(now, done)
        if now - self._last < self._every:
            return
        self._last = now
        rate, left = self._rate.per_second(), self._rate.left(total)
        if self._output.as_json:
            self._output.event(
                "progress",
                phase=phase,
                done=done,
                total=total,
                written=written,
                tensor=tensor,
                bytes_per_second=round(rate),
                seconds_left=None if left is None else round(left, 1),
            )
            return
        share = f" ({100 * done // total} %)" if total else ""
        rest = f", {duration(left)} left" if left is not None else ""
        self._output.note(f"{phase}: {size(done)} of {size(total)}{share}, {size(rate)}/s{rest}")

    def close(self) -> None:
        """Nothing."""


class Bar:
    """A bar with bytes per second and time left, drawn by rich, which is imported when the first bar appears."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._bar: Any = None
        self._task: Any = None
        self._phase = ""
        self._broken = False

    def update(self, phase: str, done: int, total: int, tensor: str = "", written: int = 0) -> None:
        """Moves the bar; a new phase starts a new one."""
        if self._broken or (self._bar is None and time.monotonic() - self._started < _BAR_AFTER):
            return
        try:
            if self._bar is None:
                self._bar = _rich_bar()
                self._bar.start()
            if phase != self._phase:
                if self._task is not None:
                    self._bar.remove_task(self._task)
                self._task = self._bar.add_task(phase, total=total or None, tensor="")
                self._phase = phase
            self._bar.update(self._task, completed=done, total=total or None, tensor=tensor[-40:])
        except Exception:
            # Whatever happens to a terminal, the work goes on.
            self._broken = True

    def close(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            with suppress(Exception):
                self._bar.stop()
            self._bar = None


def _rich_bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[tensor]}", style="dim"),
        console=Console(stderr=True),
        transient=True,
        refresh_per_second=5,
    )


def meter(output: Output) -> Meter:
    """The meter that fits the options and what stderr is."""
    if output.as_json:
        return Silent() if output.quiet else Lines(output)
    if output.quiet:
        return Silent()
    try:
        terminal = sys.stderr is not None and sys.stderr.isatty()
    except ValueError:
        terminal = False
    return Bar() if terminal else Lines(output)


def sink(into: Meter) -> Any:
    """The engine's progress callback that feeds a meter."""

    def receive(progress: Progress) -> None:
        into.update(progress.phase, progress.done, progress.total, progress.tensor, progress.written)

    return receive
