"""What a run refuses, by name, and that nothing is published then."""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import engine_cases as cases
from mergekernels.engine import run as engine
from mergekernels.engine.memory import parse_size
from mergekernels.errors import ArgumentError, DataError, InputError, MergeError, OutputError, PlanError


def make(root: Path, change: dict[str, dict[str, torch.Tensor]]) -> None:
    """The family with some tensors of some folders replaced."""
    for name, tensors in zip(("base", "tuned1", "tuned2", "tuned3"), cases.state_dicts(), strict=True):
        cases.save(root / name, tensors | change.get(name, {}))


def poisoned(name: str, index: int, value: float, model: int) -> torch.Tensor:
    tensor = cases.state_dicts()[model][name].clone()
    tensor.view(-1)[index] = value
    return tensor


MLP = "model.layers.1.mlp.weight"


@pytest.mark.parametrize("method", ["linear", "ties", "ties-model"])
def test_nan_names_tensor_model_index_and_count(tmp_path: Path, method: str) -> None:
    root = tmp_path / "family"
    bad = poisoned(MLP, 70_001, float("nan"), 2)
    bad.view(-1)[70_100] = float("inf")
    make(root, {"tuned2": {MLP: bad}})
    top = {"parameters": {"weight": 1.0}}
    if method != "linear":
        top["parameters"] |= {"density": 0.5}
    if method == "ties-model":
        top["parameters"] |= {"scope": "model"}
    path = cases.recipe(root, method.split("-")[0], **top)
    for tile in (4096, 1 << 20):
        with pytest.raises(DataError) as caught:
            cases.run_of(path, tmp_path / "out", tile=tile)
        text = str(caught.value)
        assert f"tensor '{MLP}': 2 values of" in text
        assert "tuned2" in text
        assert "are NaN or Inf, the first at flat index 70001; expected finite values" in text
        assert not (tmp_path / "out").exists()


def test_nan_in_the_base_is_told_as_such(tmp_path: Path) -> None:
    root = tmp_path / "family"
    make(root, {"base": {MLP: poisoned(MLP, 5, float("-inf"), 0)}})
    with pytest.raises(DataError, match=r"1 values of base .*base are NaN or Inf, the first at flat index 5"):
        cases.run_of(cases.recipe(root, "ties", **cases.TIES), tmp_path / "out")


def test_overflow_of_the_output(tmp_path: Path) -> None:
    root = tmp_path / "family"
    make(root, {"tuned1": {MLP: poisoned(MLP, 9, 1e6, 1)}})
    path = cases.recipe(root, "linear", parameters={"weight": 1.0}, dtype="float32", out_dtype="float16")
    with pytest.raises(DataError, match="1 results do not fit in float16, or are NaN, the first at flat index 9"):
        cases.run_of(path, tmp_path / "out")


def test_propagate_goes_on_and_warns(tmp_path: Path) -> None:
    root = tmp_path / "family"
    make(root, {"tuned1": {MLP: poisoned(MLP, 9, float("nan"), 1)}})
    path = cases.recipe(root, "ties", **cases.TIES, nan="propagate")
    report = cases.run_of(path, tmp_path / "out")
    assert report.warnings == (f"tensor '{MLP}': 1 values of the output are NaN or Inf, the first at flat index 9",)
    assert json.loads((tmp_path / "out" / "merge_manifest.json").read_bytes())["warnings"] == list(report.warnings)


def test_unequal_integer_buffers(tmp_path: Path) -> None:
    root = tmp_path / "family"
    other = torch.arange(100) + (torch.arange(100) == 99)
    make(root, {"tuned3": {"model.position_ids": other}})
    path = cases.recipe(root, "linear", parameters={"weight": 1.0})
    with pytest.raises(DataError, match=r"tuned3 and .*tuned1 differ, and there is no base to decide"):
        cases.run_of(path, tmp_path / "out")
    report = cases.run_of(cases.recipe(root, "ties", **cases.TIES), tmp_path / "out2", threads=3)
    assert report.warnings[-1] == "tensor 'model.position_ids': values differ between the inputs; the base's are taken"


def test_model_scope_needs_one_density(tmp_path: Path) -> None:
    root = tmp_path / "family"
    make(root, {})
    density = [{"filter": "mlp", "value": 0.2}, {"value": 0.4}]
    path = cases.recipe(root, "ties", parameters={"weight": 1.0, "density": density, "scope": "model"})
    with pytest.raises(InputError, match="must be asked for alike by all tensors"):
        cases.run_of(path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [root]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("errors") / "family"
    cases.family(path)
    cases.recipe(path, "linear", name="linear.yml", parameters={"weight": 1.0})
    cases.recipe(path, "ties", name="ties.yml", **cases.TIES)
    return path


def problem(root: Path, out: Path, **options: object) -> MergeError:
    with pytest.raises(PlanError) as caught:
        cases.plan_of(root / "linear.yml", out, **options)
    assert len(caught.value.problems) == 1
    return caught.value.problems[0]


def test_outputs_that_would_touch_an_input(root: Path, tmp_path: Path) -> None:
    for out in (root / "tuned1", root, root / "tuned1" / "merged"):
        assert "the output would touch an input" in str(problem(root, out))


def test_outputs_that_cannot_be(root: Path, tmp_path: Path) -> None:
    assert "does not exist" in str(problem(root, tmp_path / "no" / "out"))
    (tmp_path / "file").write_text("")
    assert "is there and is not a folder" in str(problem(root, tmp_path / "file"))
    (tmp_path / "link").symlink_to(tmp_path)
    assert "is there and is not a folder" in str(problem(root, tmp_path / "link"))


def test_not_enough_space(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    assert "not enough space for the output; expected " in str(problem(root, tmp_path / "out"))


def test_an_empty_folder_is_filled(root: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    cases.run_of(root / "linear.yml", tmp_path / "out")
    assert (tmp_path / "out" / "merge_manifest.json").exists()


def test_an_existing_output_needs_overwrite(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").write_text("x")
    (out / "config.json").write_text("{}")
    with pytest.raises(OutputError, match=r"exists and is not the result of this plan.*--overwrite"):
        cases.run_of(root / "linear.yml", out)
    assert (out / "model.safetensors").read_text() == "x"
    cases.run_of(root / "linear.yml", out, overwrite=True)
    assert (out / "model.safetensors.index.json").exists()
    first = cases.published(out)
    assert cases.run_of(root / "linear.yml", out).already_done
    with pytest.raises(OutputError, match="exists and is not the result"):
        cases.run_of(root / "ties.yml", out)
    assert cases.published(out) == first
    cases.run_of(root / "ties.yml", out, overwrite=True)
    assert cases.published(out) != first
    assert cases.beside(out) == []


def test_a_damaged_output_is_not_taken_for_done(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    cases.run_of(root / "linear.yml", out)
    first = cases.published(out)
    os.truncate(next(out.glob("*.safetensors")), 100)
    with pytest.raises(OutputError, match="exists and is not the result"):
        cases.run_of(root / "linear.yml", out)
    cases.run_of(root / "linear.yml", out, overwrite=True)
    assert cases.published(out) == first


def test_memory_that_holds_no_tile_is_refused_with_what_would_do(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="cannot hold the smallest tiles; expected at least ") as caught:
        cases.plan_of(root / "ties.yml", tmp_path / "out", memory=100_000)
    assert caught.value.expected is not None
    least = int(caught.value.expected.split("(")[1].split()[0])
    with pytest.raises(ArgumentError):
        cases.plan_of(root / "ties.yml", tmp_path / "out", memory=least - 1)
    report = cases.run_of(root / "ties.yml", tmp_path / "out", memory=least)
    assert report.peak_tensor_memory <= least


@pytest.mark.parametrize(
    ("text", "size"), [("2GiB", 2 << 30), ("200 MiB", 200 << 20), ("1.5G", 1_500_000_000), (77, 77), ("5kb", 5000)]
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-3", "1 parsec", 0, True, "0"])
def test_sizes_that_are_none(text: str | int) -> None:
    with pytest.raises(ArgumentError, match="not an amount of memory"):
        parse_size(text)


def test_a_sink_that_fails_loses_only_its_events(root: Path, tmp_path: Path) -> None:
    calls = []

    def sink(event: engine.Progress) -> None:
        calls.append(event)
        raise BrokenPipeError

    engine.run(root / "linear.yml", tmp_path / "out", progress=sink)
    assert len(calls) == 1


def test_progress_adds_up(root: Path, tmp_path: Path) -> None:
    events: list[engine.Progress] = []
    engine.run(root / "ties.yml", tmp_path / "out", progress=events.append)
    merge = [e for e in events if e.phase == "merge"]
    assert all(0 <= a.done <= b.done <= b.total for a, b in pairwise(merge))
    assert merge[-1].done == merge[-1].total > 0
    assert events[-1].phase == "publish"


def test_an_interrupt_stops_and_the_rest_resumes(root: Path, tmp_path: Path) -> None:
    def sink(event: engine.Progress) -> None:
        if event.phase == "merge":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.run(root / "ties.yml", tmp_path / "out", progress=sink)
    assert not (tmp_path / "out").exists()
    engine.run(root / "ties.yml", tmp_path / "out")
    assert cases.beside(tmp_path / "out") == []
