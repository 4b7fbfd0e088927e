"""What a merge must never destroy, and what its plan must say beforehand."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from math import prod
from pathlib import Path

import pytest
import torch

import engine_cases as cases
from engine_cases import EIO, FaultyIo
from mergekernels.engine.staging import Staging
from mergekernels.errors import MergeError, OutputError, PlanError
from mergekernels.report.plan import plan_text

SMALL = {"model.embed_tokens.weight": (32, 8), "model.layers.0.mlp.weight": (70, 90), "model.norm.weight": (9,)}
OPTIONS = {"threads": 2, "tile": 4096}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two models and a base of three tensors, and a recipe for each of two methods."""
    path = tmp_path / "family"
    generator = torch.Generator().manual_seed(1)
    for name in ("base", "tuned1", "tuned2"):
        cases.save(path / name, {n: torch.randn(s, generator=generator).bfloat16() for n, s in SMALL.items()})
    cases.recipe(path, "linear", name="linear.yml", parameters={"weight": 0.5})
    cases.recipe(path, "ties", name="ties.yml", parameters={"weight": 1.0, "density": 0.4})
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Path -> bytes of every file below a folder, links followed."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def refused(path: Path, out: Path, code: str, text: str = "", **options: object) -> None:
    """A run with --overwrite is refused with this code, and everything lies as before."""
    before = contents(out.parent)
    with pytest.raises(MergeError) as caught:
        cases.run_of(path, out, overwrite=True, **(OPTIONS | options))
    error = caught.value.problems[0] if isinstance(caught.value, PlanError) else caught.value
    assert error.code == code
    assert text in str(error)
    assert contents(out.parent) == before


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"])
@pytest.mark.parametrize("hops", [1, 2])
def test_a_file_of_an_input_that_is_a_link_into_the_output(root: Path, tmp_path: Path, file: str, hops: int) -> None:
    """As in a cache whose snapshots are links to blobs."""
    out = tmp_path / "blobs"
    cases.save(out, {"a": torch.ones(4)})
    model = root / "base" if file != "model.safetensors" else root / "tuned2"
    linked = root / "tuned1"
    (model / file).rename(out / f"x-{file}")
    (model / file).symlink_to(Path("..", "..", "blobs", f"x-{file}"))
    if hops == 2:  # a link in the output itself, which leads out of it again
        shutil.move(out / f"x-{file}", linked / f"y-{file}")
        (out / f"x-{file}").symlink_to(linked / f"y-{file}")
    refused(root / "ties.yml", out, "output.is-input", file)


def test_an_index_that_is_a_link_into_the_output(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    cases.save(out, {"a": torch.ones(4)})
    folder = root / "tuned1"
    shutil.rmtree(folder)
    cases.save(folder, {n: torch.ones(s).bfloat16() for n, s in SMALL.items()}, files=2)
    name = "model.safetensors.index.json"
    (folder / name).rename(out / name)
    (folder / name).symlink_to(out / name)
    refused(root / "ties.yml", out, "output.is-input", name)


@pytest.mark.parametrize("link", ["link", "sub/link"])
def test_an_input_folder_reached_through_the_output(root: Path, tmp_path: Path, link: str) -> None:
    out = tmp_path / "out"
    cases.save(out, {"a": torch.ones(4)})
    (root / "tuned1").rename(tmp_path / "elsewhere")
    (out / "sub").mkdir()
    (out / link).symlink_to(tmp_path / "elsewhere")
    (root / "tuned1").symlink_to(out / link)
    refused(root / "ties.yml", out, "output.is-input", "tuned1")


def test_an_output_in_an_input_that_is_a_link(root: Path, tmp_path: Path) -> None:
    (root / "tuned1").rename(tmp_path / "elsewhere")
    (root / "tuned1").symlink_to(tmp_path / "elsewhere")
    refused(root / "ties.yml", tmp_path / "elsewhere" / "out", "output.is-input")


def test_a_hard_link_in_the_output(root: Path, tmp_path: Path) -> None:
    """The same inode under both names, as a bind mount of a file has it too."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    os.link(root / "tuned1" / "model.safetensors", out / "model.safetensors")
    refused(root / "ties.yml", out, "output.is-input", "tuned1")


def test_an_output_that_is_an_input_under_another_name(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bind mount: another path with the device and inode of an input."""
    out = tmp_path / "out"
    cases.save(out, {"a": torch.ones(4)})
    real = os.stat

    def stat(path: object, *args: object, **kw: object) -> os.stat_result:
        same = os.fspath(path) == str(out) if isinstance(path, (str, Path)) else False  # type: ignore[arg-type]
        return real(root / "tuned1" if same else path, *args, **kw)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "stat", stat)
    refused(root / "ties.yml", out, "output.is-input", "tuned1")


def test_the_recipe_in_the_output(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    cases.save(out, {"a": torch.ones(4)})
    (root / "ties.yml").rename(out / "ties.yml")
    refused(out / "ties.yml", out, "output.is-input", "ties.yml")


def test_inputs_are_looked_at_again_before_the_output_is_replaced(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    cases.save(out, {"a": torch.ones(4)})

    class Late(FaultyIo):
        """Moves an input's file into the output while the merge publishes."""

        def call(self, name: str, *args: object) -> object:
            if name == "rename" and Path(str(args[1])).name == "merge_manifest.json":
                (root / "base" / "tokenizer.json").rename(out / "tokenizer.json")
                (root / "base" / "tokenizer.json").symlink_to(out / "tokenizer.json")
            return super().call(name, *args)

    with pytest.raises(OutputError, match="would touch an input") as caught:
        cases.run_of(root / "ties.yml", out, io=Late(-1, EIO), overwrite=True, **OPTIONS)
    assert caught.value.code == "output.is-input"
    assert (root / "base" / "tokenizer.json").read_text() == '{"model": {}}'


@pytest.mark.parametrize(
    ("extra", "published"),
    [("notes.pdf", False), ("train.py", True), ("folder", False), ("folder", True), ("folder.json", True)],
)
def test_overwrite_replaces_nothing_but_a_checkpoint(root: Path, tmp_path: Path, extra: str, published: bool) -> None:
    out = tmp_path / "out"
    if published:
        cases.run_of(root / "linear.yml", out, **OPTIONS)
    else:
        cases.save(out, {"a": torch.ones(4)})
    if extra.startswith("folder"):
        (out / extra).mkdir()
    else:
        (out / extra).write_text("mine")
    refused(root / "ties.yml", out, "output.not-a-checkpoint", f"got '{extra}'")
    with pytest.raises(OutputError, match=f"exists and is not the result.*{extra}.*would not replace"):
        cases.run_of(root / "ties.yml", out, **OPTIONS)
    os.rmdir(out / extra) if (out / extra).is_dir() else (out / extra).unlink()
    cases.run_of(root / "ties.yml", out, overwrite=True, **OPTIONS)
    assert cases.beside(out) == []


@pytest.mark.parametrize("names", [["notes.txt", "data.json"], ["model.safetensors"], ["config.json"]])
def test_overwrite_of_a_folder_that_is_no_checkpoint(root: Path, tmp_path: Path, names: list[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in names:
        (out / name).write_text("mine")
    refused(root / "ties.yml", out, "output.not-a-checkpoint", f"'{names[-1]}'")


def test_the_output_is_looked_at_again_before_it_is_replaced(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    cases.save(out, {"a": torch.ones(4)})

    class Late(FaultyIo):
        def call(self, name: str, *args: object) -> object:
            if name == "rename" and Path(str(args[1])).name == "merge_manifest.json":
                (out / "thesis.tex").write_text("mine")
            return super().call(name, *args)

    with pytest.raises(OutputError, match=r"thesis\.tex"):
        cases.run_of(root / "ties.yml", out, io=Late(-1, EIO), overwrite=True, **OPTIONS)
    assert (out / "thesis.tex").read_text() == "mine"
    (out / "thesis.tex").unlink()
    report = cases.run_of(root / "ties.yml", out, overwrite=True, **OPTIONS)
    assert report.resumed_units == report.units
    assert json.loads((out / "merge_manifest.json").read_bytes())["method"] == "ties"


def unfinished(path: Path, out: Path, **options: object) -> Path:
    """The staging of a merge that failed after its last tensor."""

    class Fail(FaultyIo):
        def call(self, name: str, *args: object) -> object:
            if name == "rename" and Path(str(args[1])).name == "README.md":
                raise OSError(EIO, "made to fail")
            return super().call(name, *args)

    with pytest.raises(MergeError):
        cases.run_of(path, out, io=Fail(-1, EIO), **(OPTIONS | {"shard_size": 1000} | options))
    plan = cases.plan_of(path, out, **(OPTIONS | {"shard_size": 1000} | options))
    assert plan.state == "resumable"
    return out.with_name(f"{out.name}.mk-{plan.hash[:16]}")


def test_the_plan_tells_of_another_merges_unfinished_work(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    staging = unfinished(root / "ties.yml", out)
    plan = cases.plan_of(root / "linear.yml", out)
    assert plan.state == plan.to_dict()["state"] == "other-plan"
    assert "unfinished work of another merge lies beside the output" in plan_text(plan.to_dict())
    with pytest.raises(OutputError, match="an unfinished merge by another plan"):
        cases.run_of(root / "linear.yml", out)
    assert staging.is_dir()
    own = cases.plan_of(root / "ties.yml", out, **OPTIONS, shard_size=1000)
    assert "state      unfinished work of this merge lies beside the output; run resumes it" in plan_text(own.to_dict())


@pytest.mark.parametrize("folder", ["tree", "receipts", "waves", "tmp"])
@pytest.mark.parametrize("kind", ["folder", "link"])
def test_folders_and_links_in_a_staging_are_no_obstacle(root: Path, tmp_path: Path, folder: str, kind: str) -> None:
    cases.run_of(root / "ties.yml", tmp_path / "expected", **OPTIONS, shard_size=1000)
    out = tmp_path / "out"
    staging = unfinished(root / "ties.yml", out)
    target = tmp_path / "mine"
    target.mkdir()
    (target / "file").write_text("mine")
    done = sorted(p.name for p in (staging / "tree").iterdir())
    assert len(done) == 3
    names = {"tree": [*done, "x"], "receipts": ["model-00002-of-00003.safetensors"]}
    for name in names.get(folder, ["x"]):
        path = staging / folder / (name + ".json" * (folder == "receipts"))
        if path.exists():
            path.rename(target / name)
        if kind == "folder":
            path.mkdir()
            (path / "file").write_text("")
        else:
            path.symlink_to(target / name if (target / name).exists() else target)
    cases.run_of(root / "ties.yml", out, **OPTIONS, shard_size=1000)
    assert cases.published(out) == cases.published(tmp_path / "expected")
    assert not any(p.is_symlink() for p in out.iterdir())
    assert (target / "file").read_text() == "mine"
    assert cases.beside(out) == []


def test_the_loser_of_a_race_leaves_nothing(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    plan = cases.plan_of(root / "ties.yml", out, **OPTIONS)
    first = Staging(FaultyIo(-1, EIO), out, plan.hash)
    assert first.enter(overwrite=False)
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="another process is merging") as caught:
            cases.run_of(root / "linear.yml", out, overwrite=overwrite, **OPTIONS)
        assert caught.value.code == "output.busy"
        assert cases.beside(out) == [first.root.name]
    first.unlock()
    cases.run_of(root / "ties.yml", out, **OPTIONS)
    assert cases.beside(out) == []


def test_the_loser_of_a_race_keeps_its_finished_work(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    staging = unfinished(root / "ties.yml", out)
    before = contents(staging)
    other = Staging(FaultyIo(-1, EIO), out, cases.plan_of(root / "linear.yml", out).hash)
    other.root.mkdir()
    other.receipts.mkdir()
    with (other.root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another process is merging"):
            cases.run_of(root / "ties.yml", out, **OPTIONS, shard_size=1000)
    assert contents(staging) == before


def test_a_merge_that_is_done_removes_empty_stagings(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    cases.run_of(root / "ties.yml", out, **OPTIONS)
    empty, held, full = (tmp_path / f"out.mk-{digit * 16}" for digit in "abc")
    for staging in (empty, held, full):
        (staging / "receipts").mkdir(parents=True)
        (staging / "lock").write_text("")
    (full / "receipts" / "x.json").write_text("")
    with (held / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert cases.run_of(root / "ties.yml", out, **OPTIONS).already_done
    assert cases.beside(out) == [held.name, full.name]


def test_a_name_that_leaves_no_room_for_the_staging(root: Path, tmp_path: Path) -> None:
    longest = os.pathconf(tmp_path, "PC_NAME_MAX") - 20
    with pytest.raises(PlanError) as caught:
        cases.plan_of(root / "ties.yml", tmp_path / ("ä" + "x" * (longest - 1)))
    problem = caught.value.problems[0]
    assert (problem.code, problem.expected) == ("output.name", f"at most {longest} bytes")
    out = tmp_path / ("x" * longest)
    cases.run_of(root / "ties.yml", out, **OPTIONS)
    assert cases.beside(out) == []


def test_a_donor_without_a_config(root: Path, tmp_path: Path) -> None:
    (root / "base" / "config.json").unlink()
    plan = cases.plan_of(root / "ties.yml", tmp_path / "out", **OPTIONS)
    assert any("has no config.json, so the output has none" in w for w in plan.to_dict()["warnings"])
    report = cases.run_of(root / "ties.yml", tmp_path / "out", **OPTIONS)
    assert report.warnings == plan.warnings
    assert "config.json" not in cases.published(tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "merge_manifest.json").read_bytes())
    assert manifest["warnings"] == list(plan.warnings)


def test_a_donor_that_is_a_single_file_has_the_small_files_of_its_folder(root: Path, tmp_path: Path) -> None:
    recipe = json.loads((root / "ties.yml").read_text())
    recipe["base_model"] += "/model.safetensors"
    (root / "single.yml").write_text(json.dumps(recipe))
    out, expected = tmp_path / "out", tmp_path / "expected"
    plan = cases.plan_of(root / "single.yml", out, **OPTIONS)
    assert plan.warnings == ()
    cases.run_of(root / "single.yml", out, **OPTIONS)
    cases.run_of(root / "ties.yml", expected, **OPTIONS)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (expected / name).read_bytes()
    (root / "base" / "config.json").write_text("[")
    warnings = cases.plan_of(root / "single.yml", out, **OPTIONS).warnings
    assert [w.split("config.json")[1][:16] for w in warnings if w.startswith("ignored: ")] == [": not valid JSON"]


def test_code_that_auto_map_names(root: Path, tmp_path: Path) -> None:
    base = root / "base"
    names = {
        "AutoModel": "modeling_x.X",
        "AutoConfig": "configuration_x.C",
        "AutoModelForCausalLM": "org/repo--modeling_y.Y",
        "AutoModelForMaskedLM": "../secret.Z",
        "AutoTokenizer": ["tokenization_x.T", None],
    }
    config = json.loads((base / "config.json").read_text()) | {"auto_map": names}
    (base / "config.json").write_text(json.dumps(config))
    (base / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["tok.T", "fast.F"]}}))
    for name in ("modeling_x", "tokenization_x", "tok", "unnamed"):
        (base / f"{name}.py").write_text(f"# {name}")
    (root / "secret.py").write_text("")
    (base / "chat_templates").mkdir()
    out = tmp_path / "out"
    warnings = cases.run_of(root / "ties.yml", out, **OPTIONS).warnings
    assert sorted(p.name for p in out.glob("*.py")) == ["modeling_x.py", "tok.py", "tokenization_x.py"]
    assert (out / "tok.py").read_text() == "# tok"
    missing = [w.split()[2] for w in warnings if w.startswith("auto_map names")]
    assert missing == ["configuration_x.py,", "../secret.py,", "fast.py,"]
    assert any("chat_templates" in w for w in warnings)
    cases.run_of(root / "linear.yml", out, overwrite=True, **OPTIONS)  # the manifest lists the .py files


@pytest.mark.parametrize(("config", "warned"), [({"vocab_size": 31}, True), ({"vocab_size": 32}, False)])
@pytest.mark.parametrize("nested", [False, True])
def test_another_vocabulary_size_than_the_embedding(
    root: Path, tmp_path: Path, config: dict[str, int], warned: bool, nested: bool
) -> None:
    (root / "base" / "config.json").write_text(json.dumps({"text_config": config} if nested else config))
    warnings = cases.plan_of(root / "ties.yml", tmp_path / "out").warnings
    wanted = "vocab_size in config.json is 31, but 'model.embed_tokens.weight' has 32 rows"
    assert (wanted in warnings) is warned


def test_a_chat_template_in_the_output_is_not_replaced(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    cases.save(out, {"a": torch.ones(4)})
    (out / "mine.jinja").write_text("{{ messages }}")
    path = cases.recipe(root, "linear", name="chat.yml", parameters={"weight": 0.5}, chat_template="../out/mine.jinja")
    refused(path, out, "output.is-input", "mine.jinja")


def test_the_memory_that_a_scope_over_the_model_can_use(root: Path, tmp_path: Path) -> None:
    parameters = {"weight": 1.0, "density": 0.4, "scope": "model"}
    path = cases.recipe(root, "ties", name="model.yml", parameters=parameters)
    plan = cases.plan_of(path, tmp_path / "out", **OPTIONS, memory="8GiB")
    data = plan.to_dict()
    n = sum(prod(s) for s in SMALL.values())
    tiles = 2 * 4 * 4096 * 2  # threads, two models with base and output, elements, bytes
    entries = 3 * 2 * 40 * n
    assert tiles + entries <= data["peak_memory"] <= tiles + entries + (2 << 20) < data["memory"] // 100
    report = cases.run_of(path, tmp_path / "out", **OPTIONS, memory="8GiB")
    assert report.peak_tensor_memory <= data["peak_memory"]
    least = cases.plan_of(path, tmp_path / "out", **OPTIONS, memory="1MiB").to_dict()
    assert least["peak_memory"] <= 1 << 20
