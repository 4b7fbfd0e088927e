"""Stopping the command: status, message, what is left on disk, the run after it. Progress of a run that takes time."""

from __future__ import annotations

import signal
import subprocess
import time

import pytest
import torch

from cli_process import call, command, environment, events
from engine_cases import TIES, beside, published, recipe, save


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A merge of many files that takes seconds with the reference backend, and its undisturbed result."""
    folder = tmp_path_factory.mktemp("signals")
    g = torch.Generator().manual_seed(0)
    for name in ("base", "tuned1", "tuned2"):
        tensors = {f"layers.{i}.w": torch.randn(256, 1024, generator=g).bfloat16() for i in range(30)}
        save(folder / name, tensors)
    done = call("run", recipe(folder, "ties", **TIES), folder / "expected", "--shard-size", "512KiB")
    assert done.returncode == 0, done.stderr
    return folder


def start(root, out, *options):
    """A slow run into `out`, once its first file is finished."""
    line = command("run", root / "recipe.yml", out, "--shard-size", "512KiB", "--backend", "reference", *options)
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    deadline = time.monotonic() + 120
    while not list(out.parent.glob(f"{out.name}.mk-*/receipts/*.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    return process


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
def test_stopping_leaves_a_state_that_the_same_command_resumes(root, tmp_path, number, status):
    out = tmp_path / "out"
    process = start(root, out)
    process.send_signal(number)
    sent = time.monotonic()
    stdout, stderr = process.communicate(timeout=60)
    assert time.monotonic() - sent < 30
    assert (process.returncode, stdout) == (status, "")
    assert stderr.splitlines()[-1].startswith("error: stopped by ")
    assert "the same command resumes" in stderr and "Traceback" not in stderr
    assert not out.exists() and len(beside(out)) == 1
    done = call("run", root / "recipe.yml", out, "--shard-size", "512KiB", "--json")
    result = events(done.stdout)[-1]["result"]
    assert done.returncode == 0 and 0 < result["resumed_units"] < result["units"]
    assert published(out) == published(root / "expected")
    assert beside(out) == []


def test_stopping_with_json_ends_with_an_error_object_and_progress_before(root, tmp_path):
    out = tmp_path / "out"
    process = start(root, out, "--json")
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    stdout, _ = process.communicate(timeout=60)
    *before, last = events(stdout)
    assert process.returncode == 130
    assert (last["event"], last["command"], last["exit_code"]) == ("error", "run", 130)
    assert last["error"]["code"] == "interrupted"
    assert before
    for event in before:
        assert (event["event"], event["command"]) == ("progress", "run")
        assert event["phase"] in ("resume", "measure", "merge", "publish")
        assert 0 <= event["done"] <= event["total"]
        assert set(event) == {
            *("event", "command", "phase", "done", "total", "written", "tensor", "bytes_per_second", "seconds_left")
        }


def test_a_second_signal_ends_at_once(root, tmp_path):
    process = start(root, tmp_path / "out")
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    # Killed by the signal, or already through with the first one.
    assert process.returncode in (-signal.SIGINT, 130)
    done = call("run", root / "recipe.yml", tmp_path / "out", "--shard-size", "512KiB")
    assert done.returncode == 0
    assert published(tmp_path / "out") == published(root / "expected")


def test_a_run_beside_another_is_refused(root, tmp_path):
    process = start(root, tmp_path / "out")
    done = call("run", root / "recipe.yml", tmp_path / "out", "--shard-size", "512KiB")
    process.terminate()
    process.communicate(timeout=60)
    assert done.returncode == 6, done.stderr
    assert "error: " in done.stderr
