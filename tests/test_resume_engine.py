"""A run that is killed anywhere, then started again with the same command, ends with the bytes of an undisturbed
run.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import engine_cases as cases
from engine_cases import EIO, FaultyIo
from mergekernels.engine.waves import Stats
from mergekernels.errors import MergeError, OutputError

SMALL = {"model.a.weight": (100, 50), "model.b.weight": (70, 90), "model.c.weight": (9,)}
OPTIONS = {"threads": 2, "tile": 4096, "shard_size": 12_000}

# One process without torch forks a child per point of death, so that hundreds of kills take seconds.
_KILLER = """
import os, sys, json
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from killing import kill_sweep
kill_sweep(Path(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4]), int(sys.argv[5]))
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("resume") / "family"
    generator = torch.Generator().manual_seed(1)
    for name in ("base", "tuned1", "tuned2"):
        cases.save(path / name, {n: torch.randn(s, generator=generator).bfloat16() for n, s in SMALL.items()})
    parameters = {"weight": 1.0, "density": 0.4}
    cases.recipe(path, "ties", name="ties.yml", parameters=parameters)
    cases.recipe(path, "ties", name="model.yml", parameters=parameters | {"scope": "model"})
    cases.recipe(path, "ties", name="lines.yml", parameters=parameters, then=[{"lines": {"beta": 0.4}}])
    return path


@pytest.mark.parametrize(("name", "step"), [("ties", 1), ("model", 3), ("lines", 5)])
def test_killed_at_every_operation(root: Path, tmp_path: Path, name: str, step: int) -> None:
    cases.run_of(root / f"{name}.yml", tmp_path / "expected", **OPTIONS)
    here = str(Path(__file__).parent)
    arguments = [here, str(root / f"{name}.yml"), str(tmp_path), json.dumps(OPTIONS), str(step)]
    result = subprocess.run([sys.executable, "-c", _KILLER, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["wrong"] == []
    assert report["kills"] > 100 // step
    assert report["resumed_units"] > 0
    assert report["expected"] == cases.published(tmp_path / "expected")


def half_done(root: Path, tmp_path: Path, name: str = "ties") -> tuple[dict[str, str], Path, Path]:
    """(bytes of an undisturbed run, OUT, staging) of a run that failed after its first file."""
    cases.run_of(root / f"{name}.yml", tmp_path / "expected", **OPTIONS)
    out = tmp_path / "out"
    plan = cases.plan_of(root / f"{name}.yml", out, **(OPTIONS | {"threads": 1}))

    class Fail(FaultyIo):
        def call(self, name: str, *args: object) -> object:
            if name == "rename" and "model-00002" in str(args[1]) and str(args[1]).endswith("json"):
                raise OSError(EIO, "injected")
            return super().call(name, *args)

    with pytest.raises(OutputError):
        cases.execute(plan, overwrite=False, progress=None, io=Fail(-1, EIO), start=0.0)
    staging = tmp_path / f"out.mk-{plan.hash[:16]}"
    assert (staging / "receipts" / "model-00001-of-00003.safetensors.json").exists()
    return cases.published(tmp_path / "expected"), out, staging


def finish(root: Path, out: Path, wanted: dict[str, str], name: str = "ties") -> int:
    report = cases.run_of(root / f"{name}.yml", out, **OPTIONS)
    assert cases.published(out) == wanted
    assert cases.beside(out) == []
    return report.resumed_units


@pytest.mark.parametrize("name", ["ties", "lines"])
def test_finished_files_are_kept(root: Path, tmp_path: Path, name: str) -> None:
    wanted, out, staging = half_done(root, tmp_path, name)
    assert cases.plan_of(root / f"{name}.yml", out, **OPTIONS).state == "resumable"
    kept = len(list((staging / "receipts").iterdir()))
    assert finish(root, out, wanted, name) == kept >= 1


def test_a_flipped_byte_in_a_staged_file_is_found(root: Path, tmp_path: Path) -> None:
    wanted, out, staging = half_done(root, tmp_path)
    kept = len(list((staging / "receipts").iterdir()))
    file = staging / "tree" / "model-00001-of-00003.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 1
    file.write_bytes(raw)
    assert finish(root, out, wanted) == kept - 1


@pytest.mark.parametrize("damage", ["cut", "flip", "plan", "gone"])
def test_a_damaged_receipt_is_not_believed(root: Path, tmp_path: Path, damage: str) -> None:
    wanted, out, staging = half_done(root, tmp_path)
    kept = len(list((staging / "receipts").iterdir()))
    file = staging / "receipts" / "model-00001-of-00003.safetensors.json"
    text = file.read_text()
    if damage == "cut":
        file.write_text(text[:100])
    elif damage == "flip":
        file.write_text(text.replace('"size":', '"size" :').replace("BF16", "BF17"))
    elif damage == "plan":
        file.write_text(text.replace(json.loads(text)["receipt"]["plan_hash"], "0" * 64))
    else:
        file.unlink()
    assert finish(root, out, wanted) == kept - 1


def test_strays_in_the_staging_are_not_published(root: Path, tmp_path: Path) -> None:
    wanted, out, staging = half_done(root, tmp_path)
    (staging / "tmp" / "left").write_text("x")
    (staging / "tree" / "stranger.txt").write_text("x")
    finish(root, out, wanted)


def test_another_plan_for_the_same_output_is_refused(root: Path, tmp_path: Path) -> None:
    wanted, out, staging = half_done(root, tmp_path)
    with pytest.raises(OutputError, match="an unfinished merge by another plan") as caught:
        cases.run_of(root / "model.yml", out, **OPTIONS)
    assert str(staging) in str(caught.value)
    assert staging.exists()
    cases.run_of(root / "model.yml", out, overwrite=True, **OPTIONS)
    assert not staging.exists()
    assert cases.published(out) != wanted


def test_finished_waves_are_read_and_damaged_ones_done_again(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, out, staging = half_done(root, tmp_path, "model")
    waves = sorted((staging / "waves").iterdir())
    assert len(waves) >= 3
    raw = bytearray(waves[0].read_bytes())
    raw[-1] ^= 1
    waves[0].write_bytes(raw)
    from mergekernels.engine import waves as module

    written: list[str] = []
    original = module._Wave._write

    def write(self: module._Wave, file: object, stats: Stats) -> None:
        written.append(file.name)  # type: ignore[attr-defined]
        original(self, file, stats)  # type: ignore[arg-type]

    monkeypatch.setattr(module._Wave, "_write", write)
    finish(root, out, wanted, "model")
    assert len(written) == 1


def test_a_crash_after_publication_only_leaves_cleaning(root: Path, tmp_path: Path) -> None:
    cases.run_of(root / "ties.yml", tmp_path / "expected", **OPTIONS)
    out = tmp_path / "out"
    with pytest.raises(MergeError):
        cases.run_of(root / "ties.yml", out, io=FaultyIo(1, EIO, ("rmtree",)), **OPTIONS)
    assert cases.published(out) == cases.published(tmp_path / "expected")
    assert cases.beside(out) != []
    assert cases.run_of(root / "ties.yml", out, **OPTIONS).already_done
    assert cases.beside(out) == []
