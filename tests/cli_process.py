"""The command as its own process, for the tests of the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any


def environment(**extra: str) -> dict[str, str]:
    """This process's environment without our variables, and with `extra`."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MERGEKERNELS_", "TRITON_INTERPRET", "COLUMNS"))}
    return kept | extra


def command(*arguments: object) -> list[str]:
    """The command line of `mergekernels ARGUMENTS` with this interpreter."""
    return [sys.executable, "-m", "mergekernels", *map(str, arguments)]


def call(*arguments: object, cwd: Any = None, **extra: str) -> subprocess.CompletedProcess[str]:
    """Runs `mergekernels ARGUMENTS` to its end; keyword arguments are environment variables."""
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, cwd=cwd, env=environment(**extra), timeout=300
    )


def events(output: str) -> list[dict[str, Any]]:
    """The JSON objects of a --json output, one a line."""
    return [json.loads(line) for line in output.splitlines()]
