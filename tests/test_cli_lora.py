"""`mergekernels lora merge` as a process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import mergekernels as mk
from adapter_cases import adapters, error, site
from cli_process import call, events
from mergekernels.cli.app import app

SITES = [site("layers.0.q", 24, 16), site("embed", 12, 30, "embedding")]
WEIGHTS = [1.0, -0.5, 2.0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three adapters as PEFT folders."""
    root = tmp_path_factory.mktemp("lora")
    for i, one in enumerate(adapters(3, SITES, [2, 3], alpha=4.0)):
        mk.merge_adapters([one], "cat", out=root / f"a{i}")
    return root


def test_merge_is_what_the_library_gives(folder: Path, tmp_path: Path) -> None:
    inputs = [folder / f"a{i}" for i in range(3)]
    want = mk.merge_adapters(inputs, "ties_svd", weights=WEIGHTS, rank=3, density=[0.5, 0.4, 1.0], scale=0.5)
    options = ["--weights=1,-0.5,2", "--rank=3", "--param=density=0.5,0.4,1", "--param", "lambda=5e-1"]
    done = call("lora", "merge", "ties_svd", *inputs, "-o", tmp_path / "out", *options)
    assert done.returncode == 0, done.stderr
    assert "2 modules of 3 adapters by ties_svd" in done.stdout
    got = mk.merge_adapters([tmp_path / "out"], "cat")
    for at in SITES:
        assert torch.equal(got.delta(at.module), want.delta(at.module))


def test_json_reports_every_module(folder: Path, tmp_path: Path) -> None:
    inputs = [folder / "a0", folder / "a1"]
    done = call("lora", "merge", "svd", *inputs, "-o", tmp_path / "out", "--energy", "0.5", "--json")
    assert done.returncode == 0, done.stderr
    result = events(done.stdout)[-1]["result"]
    assert set(result["modules"]) == {"layers.0.q", "embed"}
    assert all(m["kept_energy"] >= 0.5 and m["rank"] >= 1 for m in result["modules"].values())
    assert result["energy"] == 0.5 and len(result["inputs"]) == 2
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == ["embed", "layers.0.q"]


def test_overwrite_base_and_dtype(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({s.weight: torch.zeros(s.weight_shape) for s in SITES}, tmp_path / "base.safetensors")
    out = tmp_path / "out"
    inputs = [folder / "a0", folder / "a1"]
    options = ["--base", tmp_path / "base.safetensors", "--dtype", "bfloat16"]
    assert call("lora", "merge", "cat", *inputs, "-o", out, *options).returncode == 0
    taken = call("lora", "merge", "cat", *inputs, "-o", out)
    assert taken.returncode == 6 and "already there" in taken.stderr
    assert call("lora", "merge", "cat", *inputs, "-o", out, "--overwrite", "-q").stdout == ""
    full = mk.merge_adapters(inputs, "cat")
    assert error(mk.merge_adapters([out], "cat").delta("embed"), full.delta("embed")) < 1e-6
    save_file({"embed.weight": torch.zeros(4, 4)}, tmp_path / "other.safetensors")
    wrong = call("lora", "merge", "cat", *inputs, "-o", tmp_path / "new", "--base", tmp_path / "other.safetensors")
    assert wrong.returncode == 3 and "layers.0.q" in wrong.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["tie_svd"], 2, "Did you mean 'ties_svd'"),
        (["svd", "--rank=0"], 2, "rank is not usable"),
        (["svd", "--rank=2", "--energy=0.5"], 2, "both given"),
        (["svd", "--weights=1,x"], 2, "--weights is not usable"),
        (["svd", "--weights=1,2,3"], 2, "wrong number of values"),
        (["ties", "--param=dnsity=0.5"], 2, "Did you mean 'density'"),
        (["ties", "--param=density=2"], 2, "a number in [0, 1]"),
        (["ties", "--param=density"], 2, "NAME=VALUE"),
        (["ties", "--param=density=1", "--param=density=1"], 2, "given twice"),
        (["ties"], 2, "needs 'density'"),
        (["linear"], 2, "needs adapters of one rank"),
        (["svd", "--form=lycoris"], 2, "unknown form"),
        (["svd", "--dialect=pefd"], 2, "Did you mean 'peft'"),
    ],
)
def test_mistakes_have_a_message_and_a_status(
    folder: Path,
    tmp_path: Path,
    arguments: list[str],
    status: int,
    text: str,
) -> None:
    method, *options = arguments
    words = ["lora", "merge", method, str(folder / "a0"), str(folder / "a1"), "-o", str(tmp_path / "out"), *options]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == status
    assert text in done.output
    assert not (tmp_path / "out").exists()


def test_a_missing_adapter_is_an_input_error(folder: Path, tmp_path: Path) -> None:
    done = call("lora", "merge", "svd", folder / "a0", folder / "none", "-o", tmp_path / "out", "--json")
    assert done.returncode == 3
    assert events(done.stdout)[-1]["exit_code"] == 3
