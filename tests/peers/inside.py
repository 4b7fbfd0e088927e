"""Runs test files inside the environment of a tool: this package is linked into a folder that its Python sees."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import mergekernels
from mergekernels import _cpu

__all__ = ["make_importable", "run_inside"]


def make_importable(folder: Path) -> Path:
    """A folder for PYTHONPATH that holds this package and nothing else of this environment."""
    package = folder / "mergekernels"
    package.mkdir(parents=True, exist_ok=True)
    native = Path(str(_cpu.__file__))
    for entry in [*(e for p in mergekernels.__path__ for e in sorted(Path(p).iterdir())), native]:
        link = package / entry.name
        if entry.name != "__pycache__" and not link.exists():
            link.symlink_to(entry.resolve())
    return folder


def run_inside(environment: str, file: str, folder: Path) -> int:
    """Runs a file of this folder with the pytest of an environment and returns how many tests passed.

    Fails with the end of its output unless all did.
    """
    path = os.pathsep.join([str(make_importable(folder)), str(Path(__file__).parent)])
    command = [str(Path(environment) / "bin" / "python"), "-m", "pytest", "-q", "--noconftest", "-c", os.devnull]
    command += ["-p", "no:cacheprovider", "--rootdir", str(folder), str(Path(__file__).parent / file)]
    variables = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=folder)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    summary = run.stdout.strip().splitlines()[-1]
    assert "skipped" not in summary, summary
    return int(summary.split(" passed")[0].split()[-1])
