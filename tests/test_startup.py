"""What the commands do not import: torch, triton, numpy (and rich, off a terminal). Times are printed, not asserted."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from cli_process import command, environment
from engine_cases import TIES, family, recipe

HEAVY = ("torch", "triton", "numpy", "rich", "pydantic")

_PROBE = """
import atexit, json, sys
atexit.register(lambda: print(json.dumps([m for m in {heavy!r} if m in sys.modules]), file=sys.__stderr__))
sys.argv = ["mergekernels", *{arguments!r}]
from mergekernels.cli.main import main
main()
"""


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """A family, its recipe, and what the command made of it."""
    root = tmp_path_factory.mktemp("startup")
    family(root)
    path = recipe(root, "ties", **TIES)
    subprocess.run(command("run", path, root / "out", "--quiet"), check=True, env=environment())
    return root


def commands(root):
    """Every command with arguments that succeed."""
    return {
        "--help": ["--help"],
        "--version": ["--version"],
        "run --help": ["run", "--help"],
        "methods": ["methods"],
        "methods NAME": ["methods", "ties"],
        "backends": ["backends"],
        "inspect": ["inspect", root / "base", root / "tuned1"],
        "plan": ["plan", root / "recipe.yml", "--out", root / "other"],
        "run": ["run", root / "recipe.yml", root / "again", "--overwrite", "--seed", "1"],
        "verify": ["verify", root / "out"],
        "diff": ["diff", root / "out", root / "out"],
    }


@pytest.mark.parametrize("name", list(commands(Path())))
def test_no_heavy_imports(merged, name):
    arguments = [str(a) for a in commands(merged)[name]]
    code = _PROBE.format(heavy=HEAVY, arguments=arguments)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stderr.splitlines()[-1]) == []


def test_importing_the_package_is_light():
    code = f"import sys, mergekernels; dir(mergekernels); print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_recomputing_imports_torch_only_then(merged):
    code = _PROBE.format(heavy=HEAVY, arguments=["verify", str(merged / "out"), "--recompute", "1"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    assert "torch" in json.loads(done.stderr.splitlines()[-1])


@pytest.mark.slow
def test_print_cpu_seconds(merged, tmp_path):
    """CPU seconds of whole processes, the least of three; shown with `pytest -s`. The aim is 0.35."""
    cache = environment(PYTHONPYCACHEPREFIX=str(tmp_path))
    cache.pop("PYTHONDONTWRITEBYTECODE", None)
    rows = [("python -c pass", [sys.executable, "-c", "pass"])]
    rows += [(name, command(*arguments)) for name, arguments in commands(merged).items()]
    table = []
    for name, line in rows:
        times = []
        for _ in range(3):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run(line, capture_output=True, check=True, env=cache)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert min(times) > 0.0
        table.append(f"  {name:<16}{min(times):.3f}")
    print("\nCPU seconds of a whole process\n" + "\n".join(table))
