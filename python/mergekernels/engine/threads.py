"""How many threads a call uses."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ..errors import ArgumentError

__all__ = ["available_cores", "thread_count"]


def thread_count(argument: int | None = None) -> int:
    """The argument, else MERGEKERNELS_NUM_THREADS, else torch's count if torch is loaded, else the cores available.

    Raises
    ------
    ArgumentError : the argument or the variable is not a whole number of at least 1.
    """
    if argument is not None:
        if argument < 1:
            raise ArgumentError(
                "the number of threads is not usable", code="threads", expected="at least 1", got=str(argument)
            )
        return argument
    asked = os.environ.get("MERGEKERNELS_NUM_THREADS", "")
    if asked:
        if not asked.isdecimal() or int(asked) < 1:
            raise ArgumentError(
                "MERGEKERNELS_NUM_THREADS is not a count", code="threads", expected="an integer of at least 1", got=asked
            )
        return int(asked)
    torch = sys.modules.get("torch")
    if torch is not None:
        return int(torch.get_num_threads())
    return available_cores()


def available_cores() -> int:
    """Cores that this process may use: its affinity, and the CPU quota of its control group."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota()
    return cores if quota is None else max(1, min(cores, quota))


def _quota(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Whole cores of the CPU quota, rounded up; None without one."""
    try:
        limit, period = (root / "cpu.max").read_text().split()  # version 2
    except (OSError, ValueError):
        try:
            limit = (root / "cpu" / "cpu.cfs_quota_us").read_text().strip()  # version 1; -1 for none
            period = (root / "cpu" / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    if not limit.isdecimal() or not period.isdecimal() or int(period) == 0:
        return None
    return -(-int(limit) // int(period))
