"""Kills a merge at its n-th file operation, for every n, in forked processes; run by test_resume_engine.py without
torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from mergekernels.engine.driver import execute
from mergekernels.engine.io import Io
from mergekernels.engine.plan import make_plan
from mergekernels.engine.recipe import load_recipe, resolve


class KillingIo(Io):
    """Ends the process with SIGKILL before its n-th operation."""

    def __init__(self, at: int) -> None:
        self.left = at

    # A kill loses nothing that a sync would have saved, so the disk is left in peace.
    _fsync = _fdatasync = staticmethod(lambda fd: None)

    def call(self, name: str, *args: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), 9)
        return super().call(name, *args)


def _merge(recipe: Path, out: Path, options: dict[str, Any], io: Io) -> int:
    merge = resolve(load_recipe(recipe))
    plan = make_plan(merge, memory=None, backend="cpu", device="cpu", out=out, io=Io(), **options)
    return execute(plan, overwrite=False, progress=None, io=io, start=0.0).resumed_units


def _published(out: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(out.iterdir())}


def kill_sweep(recipe: Path, folder: Path, options: dict[str, Any], step: int) -> None:
    """Prints {kills, wrong, resumed_units, expected} as JSON. The undisturbed result is in `folder`/expected."""
    assert "torch" not in sys.modules
    expected = _published(folder / "expected")
    wrong: list[str] = []
    resumed = kills = 0
    at = 1
    while True:
        out = folder / f"killed{at}"
        child = os.fork()
        if child == 0:
            _merge(recipe, out, options, KillingIo(at))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            break
        kills += 1
        if out.exists() and _published(out) != expected:
            wrong.append(f"{at}: the killed run left an incomplete output")
        resumed += _merge(recipe, out, options, KillingIo(0))
        if _published(out) != expected:
            wrong.append(f"{at}: the rerun wrote other bytes")
        if [p for p in folder.iterdir() if p.name.startswith(out.name + ".")]:
            wrong.append(f"{at}: something is left beside the output")
        at += step
    print(json.dumps({"kills": kills, "wrong": wrong, "resumed_units": resumed, "expected": expected}))
