"""Wrong usage of the command, and Ctrl-C before its work begins."""

from __future__ import annotations

import subprocess
import sys

import pytest

from cli_process import call, environment, events
from engine_cases import TIES, family, recipe

WRONG = {
    "missing argument": (["run", "r.yml"], "run", "missing argument 'OUT'"),
    "unknown option": (["plan", "r.yml", "--treads", "2"], "plan", "no such option: --treads"),
    "wrong value": (["verify", "out", "--threads", "many"], "verify", "'many' is not a valid int"),
    "out of range": (["verify", "out", "--recompute", "-1"], "verify", "-1 is not in the range"),
    "too many": (["backends", "all"], "backends", "unexpected extra argument"),
    "unknown command": (["frob"], "", "no such command 'frob'"),
    "long value": (["plan", "r", "--seed", "9" * 300 + "x"], "plan", "'" + "9" * 76 + "..."),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_usage_is_an_error_like_any_other(case):
    arguments, command, message = WRONG[case]
    done = call(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and line.endswith(" [usage]")
    assert message in line and f"; expected mergekernels {command}" in line and "9" * 90 not in line
    as_json = call(*arguments, "--json")
    assert (as_json.returncode, as_json.stderr) == (2, done.stderr)
    (event,) = events(as_json.stdout)
    assert (event["event"], event["command"], event["exit_code"]) == ("error", command, 2)
    assert (event["error"]["class"], event["error"]["code"]) == ("ArgumentError", "usage")
    assert message in event["error"]["message"]


def test_no_arguments_give_the_help():
    done = call()
    assert done.returncode == 2 and "Commands:" in done.stderr and "error:" not in done.stderr


_EARLY = """
import os, signal, sys

class Pressed:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Pressed())
sys.argv = ["mergekernels", "backends"]
from mergekernels.cli.main import main
main()
"""


@pytest.mark.parametrize("module", ["typer", "mergekernels.cli.output", "mergekernels.cli.lists"])
def test_ctrl_c_before_the_work_begins_is_quiet(module):
    code = _EARLY.format(module=module)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_an_instruction_set_that_cannot_run_is_refused_by_plan(tmp_path):
    family(tmp_path, models=2)
    path = recipe(tmp_path, "ties", **TIES)
    for options in ((), ("--backend", "cpu")):
        done = call("plan", path, *options, MERGEKERNELS_CPU_ISA="avx1024")
        assert done.returncode == 4 and done.stderr.count("\n") == 1
        assert "expected MERGEKERNELS_CPU_ISA to be one of" in done.stderr and "got avx1024" in done.stderr
        assert done.stderr.endswith("[backend.isa]\n")
    table = events(call("backends", "--json", MERGEKERNELS_CPU_ISA="avx1024").stdout)[-1]["result"]
    (cpu,) = [row for row in table if row["name"] == "cpu"]
    assert not cpu["available"] and "avx1024" in cpu["detail"]
