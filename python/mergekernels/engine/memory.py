"""How much memory and how many threads a run may use, and how the budget is cut."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from ..errors import ArgumentError
from ..tensors import CANONICAL_BLOCK

__all__ = [
    "Budget",
    "available_memory",
    "cut_budget",
    "default_threads",
    "format_size",
    "memory_limit",
    "parse_size",
]

MINIMUM_DEFAULT = 512 << 20
TILE_BYTES = 512 << 10
"""Bytes of one source in a tile where the budget allows it: a worker's tiles then stay in the outer caches."""

ENTRY_BYTES = 40
"""Bytes to count for one entry that a sweep collects: ordinal and index (16), and the copies while it is evaluated."""

MIN_ENTRIES = 4096
"""Fewest entries a sweep keeps per model; with fewer than its interval holds, it counts bins and another sweep
follows.
"""

WAVE_COPIES = 3
"""Statistics of a whole model held at once: those of the file in work, their serialised form, and the sum."""

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS |= {_letter: 1000**_power, f"{_letter}B": 1000**_power, f"{_letter}IB": 1024**_power}


def parse_size(text: str | int) -> int:
    """Bytes from a number or a text like "2GiB", "800 MB", "1.5G" (binary with an i, else decimal).

    Raises
    ------
    ArgumentError : not a size.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        if text > 0:
            return text
    elif isinstance(text, str):
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
        unit = _UNITS.get(match[2].upper()) if match else None
        if match and unit is not None and float(match[1]) > 0:
            return int(float(match[1]) * unit)
    raise ArgumentError(
        "not an amount of memory",
        code="memory.size",
        expected="bytes, or a number with KiB, MiB, GiB, KB, MB, GB",
        got=repr(text),
    )


def format_size(size: int) -> str:
    """A size for people, binary units, at most one decimal."""
    value = float(size)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{int(value)} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def _read_int(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _cgroup_folders() -> list[Path]:
    """The memory control folders of this process, innermost first, for cgroup v2 and v1."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    folders: list[Path] = []
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = Path("/sys/fs/cgroup/memory") if controllers else Path("/sys/fs/cgroup")
        folder = root / name.lstrip("/")
        folders += [folder, *(p for p in folder.parents if p == root or root in p.parents)]
    return folders


def available_memory() -> int:
    """Bytes that can be had without pushing anything out: MemAvailable, and what every enclosing cgroup leaves."""
    available = 4 << 30
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    except OSError:
        pass
    for folder in _cgroup_folders():
        for limit, usage in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            bound, used = _read_int(folder / limit), _read_int(folder / usage)
            if bound is not None and used is not None:
                # The page cache counts as used in a cgroup, but gives way.
                cache = _cgroup_cache(folder)
                available = min(available, max(0, bound - max(0, used - cache)))
    return available


def _cgroup_cache(folder: Path) -> int:
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    fields = dict(line.split(None, 1) for line in lines if " " in line)
    return sum(int(fields.get(name, 0)) for name in ("active_file", "inactive_file"))


def memory_limit(memory: str | int | None) -> int:
    """The budget in bytes: as asked, else a quarter of the memory available now, at least 512 MiB."""
    if memory is not None:
        return parse_size(memory)
    return max(MINIMUM_DEFAULT, available_memory() // 4)


def default_threads(threads: int | None) -> int:
    """Workers: the argument, else MERGEKERNELS_NUM_THREADS, else torch's count if torch is loaded, else the cores that
    affinity and cgroup leave.

    Raises
    ------
    ArgumentError : not a positive number.
    """
    source = "threads"
    value: int | str | None = threads
    if value is None and os.environ.get("MERGEKERNELS_NUM_THREADS"):
        source, value = "MERGEKERNELS_NUM_THREADS", os.environ["MERGEKERNELS_NUM_THREADS"]
    if value is not None:
        if str(value).isdigit() and 1 <= int(value) <= 1024:
            return int(value)
        raise ArgumentError(
            "not a number of threads", code="threads", expected=f"{source} from 1 to 1024", got=repr(value)
        )
    torch = sys.modules.get("torch")
    if torch is not None:
        return int(torch.get_num_threads())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cpu_quota()
    return max(1, cores if quota is None else min(cores, quota))


def _cpu_quota(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Whole cores of the CPU quota, rounded up; None without one."""
    try:
        limit, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        limit, period = str(_read_int(root / "cpu/cpu.cfs_quota_us")), str(_read_int(root / "cpu/cpu.cfs_period_us"))
    if not limit.isdecimal() or not period.isdecimal() or int(period) == 0:
        return None
    return -(-int(limit) // int(period))


@dataclass(frozen=True)
class Budget:
    """How a budget is cut.

    limit : bytes in all. threads : workers. sources : source tiles per worker. itemsize : bytes per element of the
        widest tensor.
    tile : elements of a usual tile, a multiple of 4096. buffer : bytes of a tile's memory, which some passes need more
        of. window : tensors in work at a time. pool : bytes for statistics of the tensors in work.
    """

    limit: int
    threads: int
    sources: int
    itemsize: int
    tile: int
    buffer: int
    window: int
    pool: int

    @property
    def worker_bytes(self) -> int:
        """Bytes of one worker's tiles: its sources, and the output."""
        return (self.sources + 1) * self.buffer


def cut_budget(
    limit: int,
    threads: int,
    sources: int,
    itemsize: int,
    floor: int,
    *,
    needed: int = 0,
    roomy: int = 0,
    best: int = TILE_BYTES,
    tile: int | None = None,
    whole: str = "",
) -> Budget:
    """Tiles first, as large as a quarter of the budget allows up to the best size; the rest goes to statistics.

    sources : most tensors read for one output tensor. floor : bytes of statistics without which some tensor cannot be
    merged. needed : bytes of one source in the smallest tile that serves every pass. roomy : bytes that a pass of
    columns makes use of. best : bytes of one source in a tile, if the budget allows it. tile : elements of a tile, to
    force it (tests). whole : for a method that needs whole tensors, the name of the one that needs most.

    Raises
    ------
    ArgumentError : the budget cannot hold the smallest tiles; the message says what would do.
    """
    window = threads + 2
    buffers = threads * (sources + 1)
    least = max(CANONICAL_BLOCK * itemsize, needed)
    if buffers * least + floor > limit:
        raise ArgumentError(
            "the memory budget cannot hold the largest tensor whole, with its task vectors and the method's work"
            if whole
            else "the memory budget cannot hold the smallest tiles",
            code="memory.too-small",
            tensor=whole or None,
            expected=f"at least {format_size(buffers * least + floor)} ({buffers * least + floor} bytes) for {threads} "
            f"threads and {sources} inputs",
            got=format_size(limit),
            hint="Give more memory or fewer threads.",
        )
    share = min(max(buffers * least, limit // 4), limit - floor) // buffers
    if tile is None:
        tile = max(CANONICAL_BLOCK, min(best, share) // itemsize // CANONICAL_BLOCK * CANONICAL_BLOCK)
    buffer = max(tile * itemsize, needed, min(roomy, share))
    return Budget(limit, threads, sources, itemsize, tile, buffer, window, max(floor, limit - buffers * buffer))
