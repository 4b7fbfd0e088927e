"""What a result has to say about the machine and the versions that it was taken with. Imports no torch."""

from __future__ import annotations

import os
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("mergekernels", "torch", "triton", "mergekit", "safetensors")


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown"


def _memory_gib() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    here = Path(__file__).resolve().parent
    run = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True)
    return run.stdout.strip() or None


def facts() -> dict[str, Any]:
    """Processor, usable cores, instruction set in use, memory, kernel, versions, commit, and the load."""
    from mergekernels import _cpu as native

    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "isa": native.isas()[0],
        "memory_gib": _memory_gib(),
        "kernel": os.uname().release,
        "versions": {p: v for p in _PACKAGES if (v := _version(p)) is not None},
        "commit": _commit(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def slug() -> str:
    """A file name for the results of this machine."""
    name = re.sub(r"[^a-z0-9]+", "-", _cpu().lower()).strip("-")
    return f"{name}-{len(os.sched_getaffinity(0))}-cores"
