"""The command line through real processes: results, JSON, messages, exit codes."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cli_process import call, command, environment, events
from engine_cases import TIES, beside, family, published, recipe, save, state_dicts
from mergekernels import __version__


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A family with a recipe, merged once into `out`."""
    folder = tmp_path_factory.mktemp("cli")
    family(folder)
    done = call("run", recipe(folder, "ties", **TIES), folder / "out", "--json")
    assert done.returncode == 0, done.stderr
    (folder / "report.json").write_text(done.stdout.splitlines()[-1])
    return folder


def test_run_says_what_it_did(root):
    report = json.loads((root / "report.json").read_text())
    assert (report["event"], report["command"]) == ("result", "run")
    result = report["result"]
    manifest = json.loads((root / "out" / "merge_manifest.json").read_text())
    assert result["checkpoint_sha256"] == manifest["checkpoint_sha256"]
    assert result["plan_hash"] == manifest["plan_hash"]
    assert result["out"] == str(root / "out") and result["backend"] == "cpu" and not result["already_done"]
    assert beside(root / "out") == []
    again = call("run", root / "recipe.yml", root / "out")
    assert again.returncode == 0
    assert "already there, nothing was done" in again.stdout and manifest["checkpoint_sha256"] in again.stdout
    fresh = call("run", root / "recipe.yml", root / "text")
    assert fresh.returncode == 0 and all(line.startswith("warning: ") for line in fresh.stderr.splitlines())
    for part in ("text: 1 file", manifest["checkpoint_sha256"], "read", "written in", "cpu backend"):
        assert part in fresh.stdout


def test_options_change_what_they_say_and_nothing_else(root):
    expected = json.loads((root / "report.json").read_text())["result"]["checkpoint_sha256"]
    line = ("run", root / "recipe.yml", root / "options", "--json", "--threads", "1", "--memory", "3MiB")
    done = call(*line, "--shard-size", "60KiB", "--backend", "cpu", "--device", "cpu")
    result = events(done.stdout)[-1]["result"]
    assert result["checkpoint_sha256"] == expected
    assert (result["threads"], result["memory"]) == (1, 3 << 20) and result["units"] > 3
    assert result["peak_tensor_memory"] <= 3 << 20
    done = call(*line, "--seed", "7", MERGEKERNELS_CPU_ISA="base")
    assert done.returncode == 6 and "--overwrite" in done.stderr
    done = call(*line, "--seed", "7", "--overwrite", MERGEKERNELS_CPU_ISA="base")
    other = events(done.stdout)[-1]["result"]
    assert other["checkpoint_sha256"] != expected, "ties are drawn with the seed"
    assert beside(root / "options") == []


def test_environment(root):
    done = call(
        "run", root / "recipe.yml", root / "env", "--json", MERGEKERNELS_NUM_THREADS="3", MERGEKERNELS_BACKEND="cpu"
    )
    assert events(done.stdout)[-1]["result"]["threads"] == 3
    for name, value, status, message in (
        ("MERGEKERNELS_NUM_THREADS", "many", 2, "MERGEKERNELS_NUM_THREADS"),
        (
            "MERGEKERNELS_BACKEND",
            "abacus",
            2,
            "unknown backend; expected auto, cuda, triton, cpu, reference; got 'abacus'",
        ),
        ("MERGEKERNELS_CPU_ISA", "mmx", 4, "expected MERGEKERNELS_CPU_ISA to be one of"),
    ):
        done = call("run", root / "recipe.yml", root / "env2", **{name: value})
        assert (done.returncode, done.stdout) == (status, "")
        assert message in done.stderr
    # An option wins over the environment.
    done = call("run", root / "recipe.yml", root / "env2", "--backend", "cpu", MERGEKERNELS_BACKEND="abacus")
    assert done.returncode == 0


def test_reference_backend_gives_the_same_checkpoint(root):
    done = call("run", root / "recipe.yml", root / "reference", "--backend", "reference", "--json")
    result = events(done.stdout)[-1]["result"]
    assert result["backend"] == "reference"
    assert result["checkpoint_sha256"] == json.loads((root / "report.json").read_text())["result"]["checkpoint_sha256"]


def test_plan(root):
    before = sorted(p.name for p in root.iterdir())
    done = call("plan", root / "recipe.yml", "--out", root / "never")
    assert done.returncode == 0 and done.stderr == ""
    for part in (
        "method     ties",
        "tuned1",
        "density",
        "0.3",
        "9 tensors (8 merged, 1 integer)",
        "model.safetensors",
        "read, ",
        "at most for tensors",
        "needed",
        "does not exist yet",
        "plan hash",
    ):
        assert part in done.stdout, part
    as_json = events(call("plan", root / "recipe.yml", "--json").stdout)
    assert len(as_json) == 1 and as_json[0]["event"] == "result"
    plan = as_json[0]["result"]
    assert plan["plan_hash"] == json.loads((root / "report.json").read_text())["result"]["plan_hash"]
    assert plan["bytes_read"] > 0 and plan["peak_memory"] > 0 and plan["time"]["assumed"] is True
    assert "already holds this merge" in call("plan", root / "recipe.yml", "--out", root / "out").stdout
    assert sorted(p.name for p in root.iterdir()) == before


def test_plan_shows_what_varies_by_layer(root):
    path = recipe(root, "ties", name="varies.yml", parameters={"weight": 1.0, "density": [0.2, 0.6]})
    text = call("plan", path).stdout
    assert "density" in text and "0.2 to 0.6" in text
    assert "warning: " in text and "gradient" in text


def test_plan_lists_all_problems(root, tmp_path):
    tensors = state_dicts(1)[1]
    tensors["model.norm.weight"] = torch.zeros(65, dtype=torch.bfloat16)
    del tensors["model.layers.0.norm.weight"]
    save(tmp_path / "odd", tensors)
    path = recipe(
        root, "ties", name="odd.yml", models=[{"model": str(root / "tuned1")}, {"model": str(tmp_path / "odd")}], **TIES
    )
    for name in ("plan", "run"):
        done = call(name, path, *([tmp_path / "out"] if name == "run" else []))
        assert done.returncode == 3 and done.stdout == ""
        assert "problems found before any data was read" in done.stderr
        assert "model.norm.weight" in done.stderr and "model.layers.0.norm.weight" in done.stderr
    found = events(call("plan", path, "--json").stdout)[-1]
    assert (found["event"], found["exit_code"], found["error"]["class"]) == ("error", 3, "PlanError")
    assert len(found["error"]["problems"]) >= 2
    assert not (tmp_path / "out").exists() and beside(tmp_path / "out") == []


def test_recipe_errors_name_the_line_and_the_nearest_key(root, tmp_path):
    path = tmp_path / "r.yml"
    path.write_text(
        f"merge_method: ties\nbase_model: {root}/base\nmodels:\n  - model: {root}/tuned1\n"
        "    parameters:\n      desnity: 0.5\n      weight: 1\n"
    )
    done = call("plan", path)
    assert done.returncode == 2
    assert "r.yml:6" in done.stderr and "desnity" in done.stderr and "density" in done.stderr
    assert "Traceback" not in done.stderr and done.stderr.startswith("error: ")
    lenient = call("plan", path, "--lenient")
    assert lenient.returncode == 0 and "desnity" in lenient.stdout
    done = call("plan", tmp_path / "absent.yml")
    assert (done.returncode, done.stderr) == (
        3,
        f"error: {tmp_path}/absent.yml: no such recipe file [recipe.missing]\n",
    )


BAD_OPTIONS = [
    (("--threads", "0"), 2, "expected threads from 1 to 1024; got 0"),
    (("--memory", "lots"), 2, "not an amount of memory"),
    (("--memory", "1000"), 2, "cannot hold the smallest tiles"),
    (("--shard-size", "-5"), 2, "not an amount of memory"),
    (("--seed", "-1"), 2, "seed out of range; expected 0 to 2^64 - 1; got -1"),
    (("--backend", "abacus"), 2, "unknown backend"),
    (("--device", "tpu"), 4, "no backend can run"),
    (("--threads", "two"), 2, "two"),
    (("--frobnicate",), 2, "--frobnicate"),
]


@pytest.mark.parametrize(
    ("options", "status", "message"), BAD_OPTIONS, ids=lambda v: " ".join(v) if isinstance(v, tuple) else ""
)
def test_bad_options(root, options, status, message):
    done = call("run", root / "recipe.yml", root / "bad", *options)
    assert done.returncode == status, done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (root / "bad").exists() and beside(root / "bad") == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here, so asking for one does not fail")
@pytest.mark.parametrize("options", [("--device", "cuda"), ("--backend", "cuda", "--device", "cuda")], ids=" ".join)
def test_a_gpu_that_is_not_there(root, options):
    done = call("run", root / "recipe.yml", root / "gpu", *options, "--json")
    assert done.returncode == 4
    (found,) = events(done.stdout)
    assert found["exit_code"] == 4 and found["error"]["class"] == "BackendError"
    assert "cuda" in done.stderr and not (root / "gpu").exists()


def test_data_that_forbids_the_merge(root, tmp_path):
    tensors = state_dicts(1)[1]
    tensors["model.layers.0.mlp.weight"][3, 5] = math.nan
    save(tmp_path / "nan", tensors)
    path = recipe(
        root, "ties", name="nan.yml", models=[{"model": str(root / "tuned1")}, {"model": str(tmp_path / "nan")}], **TIES
    )
    done = call("run", path, tmp_path / "out")
    assert done.returncode == 5
    assert "tensor 'model.layers.0.mlp.weight'" in done.stderr and f"flat index {3 * 257 + 5}" in done.stderr
    assert "data.nonfinite" in done.stderr
    assert not (tmp_path / "out").exists()


def test_outputs_that_are_in_the_way(root, tmp_path):
    done = call("run", root / "recipe.yml", root / "base")
    assert done.returncode == 6 and "would touch an input" in done.stderr
    done = call("run", root / "recipe.yml", tmp_path / "no" / "folder")
    assert done.returncode == 6 and "does not exist" in done.stderr
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("mine")
    done = call("run", root / "recipe.yml", other)
    assert done.returncode == 6 and "--overwrite" in done.stderr and (other / "mine.txt").read_text() == "mine"
    done = call("run", root / "recipe.yml", other, "--overwrite")
    assert done.returncode == 6 and "'mine.txt'" in done.stderr and (other / "mine.txt").read_text() == "mine"
    (other / "mine.txt").unlink()
    (other / "model.safetensors").write_text("")
    (other / "config.json").write_text("{}")
    assert call("run", root / "recipe.yml", other).returncode == 6
    assert call("run", root / "recipe.yml", other, "--overwrite").returncode == 0
    assert published(other) == published(root / "out")


def test_quiet_prints_nothing_but_errors(root, tmp_path):
    done = call("run", root / "recipe.yml", tmp_path / "out", "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    for name in (("verify", tmp_path / "out"), ("diff", tmp_path / "out", root / "out")):
        done = call(*name, "-q")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = call("diff", root / "base", root / "out", "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")
    done = call("verify", root / "base", "--quiet")
    assert done.returncode == 3 and "was not published by mergekernels" in done.stderr


def test_verify(root, tmp_path):
    done = call("verify", root / "out")
    assert done.returncode == 0 and "verified" in done.stdout
    result = events(call("verify", root / "out", "--json", "--recompute", "2").stdout)[-1]["result"]
    assert result["ok"] and result["problems"] == [] and len(result["recomputed"]) == 2
    shutil.copytree(root / "out", tmp_path / "bad")
    with (tmp_path / "bad" / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    done = call("verify", tmp_path / "bad")
    assert done.returncode == 6
    assert "DAMAGED" in done.stdout and "the data was changed" in done.stdout and "tensor '" in done.stdout
    done = call("verify", tmp_path / "bad", "--json")
    assert done.returncode == 6 and not events(done.stdout)[-1]["result"]["ok"]


def test_diff(root, tmp_path):
    done = call("diff", root / "out", root / "out")
    assert done.returncode == 0 and "identical: 9 of 9 common tensors agree bit for bit." in done.stdout
    tensors = load_file(root / "out" / "model.safetensors")
    tensors["model.norm.weight"][2] += 0.25
    save_file(tensors, tmp_path / "one.safetensors")
    done = call("diff", root / "out", tmp_path / "one.safetensors")
    assert done.returncode == 1 and "different: 8 of 9" in done.stdout
    row = next(line for line in done.stdout.splitlines() if line.startswith("model.norm.weight"))
    assert row.split()[1:7] == ["BF16", "1", "64", "[2]", row.split()[5], "[2]"]
    assert call("diff", root / "out", tmp_path / "one.safetensors", "--rtol", "1e9").returncode == 0
    done = call("diff", root / "out", tmp_path / "one.safetensors", "--rtol", "1e-9", "--json")
    assert done.returncode == 1 and not events(done.stdout)[-1]["result"]["same"]
    done = call("diff", root / "out", root / "absent")
    assert done.returncode == 3 and "absent: no such checkpoint" in done.stderr
    assert call("diff", root / "out", root / "out", "--rtol", "-1").returncode == 2


def test_inspect(root, tmp_path):
    done = call("inspect", root / "base", root / "tuned1")
    assert done.returncode == 0
    for part in ("9 tensors", "BF16", "I64", "model.layers.* (2)", "model_type llama", "mergeable: yes"):
        assert part in done.stdout, part
    tensors = state_dicts(1)[1]
    del tensors["model.scalar"]
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:5].clone()
    tensors["model.layers.0.norm.weight"] = tensors["model.layers.0.norm.weight"].float()
    tensors["model.position_ids"] = tensors["model.position_ids"].float()
    save(tmp_path / "odd", tensors)
    done = call("inspect", root / "base", tmp_path / "odd", "--json")
    result = events(done.stdout)[-1]["result"]
    assert result["mergeable"] is False
    assert {d["tensor"]: d["kind"] for d in result["differences"]} == {
        "model.scalar": "missing",
        "model.norm.weight": "shape",
        "model.layers.0.norm.weight": "dtype",
        "model.position_ids": "kind",
    }
    text = call("inspect", root / "base", tmp_path / "odd").stdout
    assert "mergeable: not as they are" in text and "model.norm.weight" in text
    assert call("inspect", tmp_path / "absent").returncode == 3


def test_methods_and_backends():
    text = call("methods").stdout
    for name in ("linear", "task_arithmetic", "ties", "passthrough"):
        assert name in text
        page = call("methods", name)
        assert page.returncode == 0 and page.stdout.startswith(f"{name}: ") and "Parameters" in page.stdout
    assert call("methods", "ties").stdout.count("\nties: ") == 1  # the method of adapters follows
    ties, of_adapters = events(call("methods", "ties", "--json").stdout)[-1]["result"]
    assert (ties["takes"], of_adapters["takes"]) == (["models"], ["adapters"])
    density = next(p for p in ties["params"] if p["name"] == "density")
    assert (density["low"], density["high"], density["default"], density["per_model"]) == (0.0, 1.0, 1.0, True)
    assert set(ties["dialects"]) >= {"default", "paper"}
    done = call("methods", "tie")
    assert done.returncode == 2 and "Did you mean 'ties'?" in done.stderr
    table = events(call("backends", "--json").stdout)[-1]["result"]
    assert [b["name"] for b in table] == ["cuda", "triton", "cpu", "reference"]
    assert next(b for b in table if b["name"] == "cpu")["available"]
    assert all(b["detail"] for b in table)
    assert "runs here" in call("backends").stdout


def test_version_help_and_usage():
    assert call("--version").stdout == f"mergekernels {__version__}\n"
    text = call("--help").stdout
    for name in ("run", "plan", "verify", "diff", "inspect", "methods", "backends", "Exit status", "130"):
        assert name in text
    assert call("frob").returncode == 2
    done = call("run")
    assert done.returncode == 2 and "RECIPE" in done.stderr


def test_tracebacks_on_request(root):
    done = call("--traceback", "plan", root / "absent.yml")
    assert done.returncode == 1 and "Traceback" in done.stderr and "InputError" in done.stderr


@pytest.mark.parametrize("options", [(), ("--json",)], ids=["text", "json"])
def test_closed_pipes_do_not_break_a_merge(root, tmp_path, options):
    read, write = os.pipe()
    os.close(read)
    line = command("run", root / "recipe.yml", tmp_path / "out", *options)
    done = subprocess.run(line, stdout=write, stderr=write, env=environment())
    os.close(write)
    assert done.returncode == 0
    assert published(tmp_path / "out") == published(root / "out")


def test_a_full_disk_behind_the_log_does_not_break_a_merge(root, tmp_path):
    with open("/dev/full", "w") as full:
        line = command("run", root / "recipe.yml", tmp_path / "out", "--json")
        done = subprocess.run(line, stdout=full, stderr=full, env=environment())
    assert done.returncode == 0
    assert published(tmp_path / "out") == published(root / "out")


def test_the_documentation_has_every_option_and_status():
    text = (Path(__file__).parent.parent / "docs" / "command-line.md").read_text()
    for name in ("", "run", "plan", "verify", "diff", "inspect", "methods", "backends"):
        listing = call(*([name] if name else []), "--help").stdout
        options = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", listing.split("Options:")[1].split("Exit status")[0]))
        assert "--help" in options
        for option in options:
            assert f"`{option}" in text or f" {option}`" in text, (name, option)
        if name:
            assert f"## {name}" in text or f"and {name}" in text
    for status in re.findall(r"^ {4}(\d+) ", call("--help").stdout, re.MULTILINE):
        assert f"| {status} |" in text
    for variable in re.findall(r"MERGEKERNELS_\w+", call("--help").stdout):
        assert f"| `{variable}` |" in text


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_a_terminal_gets_a_bar(root, tmp_path):
    main, terminal = os.openpty()
    line = command("run", root / "recipe.yml", tmp_path / "out", "--backend", "reference")
    process = subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=terminal, env=environment(TERM="xterm", COLUMNS="120")
    )
    os.close(terminal)
    drawn = b""
    while True:
        try:
            part = os.read(main, 65536)
        except OSError:
            break
        if not part:
            break
        drawn += part
    os.close(main)
    stdout, _ = process.communicate()
    assert process.returncode == 0 and b"checkpoint_sha256" in stdout
    assert (b"merge" in drawn and b"\x1b[" in drawn and b"MiB" in drawn) or b"kB" in drawn or b"bytes" in drawn


def test_warnings_of_a_method_are_said_once_and_not_to_the_quiet(tmp_path):
    base = {"w": torch.zeros(6, 1)}
    for number, name in enumerate(("base", "a")):
        save(tmp_path / name, {"w": base["w"] + number})
    path = tmp_path / "recipe.yml"
    path.write_text(
        json.dumps(
            {
                "merge_method": "breadcrumbs",
                "dialect": "paper",
                "base_model": str(tmp_path / "base"),
                "models": [{"model": str(tmp_path / "a")}],
                "parameters": {"weight": 1, "density": 0.3},
            }
        )
    )
    quiet = call("run", path, tmp_path / "quiet", "--quiet")
    assert (quiet.returncode, quiet.stderr) == (0, "")
    said = call("run", path, tmp_path / "said").stderr.splitlines()
    assert sum("keeps no entry of rows of length 1" in line for line in said) == 1
    assert all(line.startswith("warning: ") for line in said)
