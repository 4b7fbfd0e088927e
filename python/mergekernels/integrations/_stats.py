"""Counts of what was served here and what went to the tool's own code, and why."""

from __future__ import annotations

import os
import threading
import weakref
from dataclasses import dataclass

__all__ = ["Calls", "Stats"]


@dataclass(frozen=True)
class Calls:
    """What became of the calls of a tool, as :meth:`Stats.snapshot` found it.

    served : calls that these kernels answered, by name of the call.
    passed_on : calls that the tool's own code answered, by name and then by reason.
    """

    served: dict[str, int]
    passed_on: dict[str, dict[str, int]]

    def __str__(self) -> str:
        passed = sum(sum(reasons.values()) for reasons in self.passed_on.values())
        lines = [f"{sum(self.served.values())} calls served by mergekernels, {passed} by the tool itself"]
        lines += [f"  {name}: {count} served" for name, count in sorted(self.served.items())]
        for name, reasons in sorted(self.passed_on.items()):
            lines += [f"  {name}: {count} passed on: {reason}" for reason, count in sorted(reasons.items())]
        return "\n".join(lines)


class Stats:
    """Counters that threads share. A forked process counts from zero: its report is about itself."""

    def __init__(self) -> None:
        self.reset()
        _ALL.add(self)

    def reset(self) -> None:
        """All counts back to zero."""
        self._lock = threading.Lock()  # a new one: in a forked process the old one may be held by nobody
        self._served: dict[str, int] = {}
        self._passed: dict[str, dict[str, int]] = {}

    def served(self, name: str) -> None:
        """One more call of `name` was answered here."""
        with self._lock:
            self._served[name] = self._served.get(name, 0) + 1

    def passed_on(self, name: str, reason: str) -> None:
        """One more call of `name` went to the tool's own code. Reasons are few: no numbers or tensors in them."""
        with self._lock:
            reasons = self._passed.setdefault(name, {})
            reasons[reason] = reasons.get(reason, 0) + 1

    def snapshot(self) -> Calls:
        """The counts of this moment."""
        with self._lock:
            return Calls(dict(self._served), {name: dict(reasons) for name, reasons in self._passed.items()})


_ALL: weakref.WeakSet[Stats] = weakref.WeakSet()


def _reset_all() -> None:
    for stats in list(_ALL):
        stats.reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_all)
