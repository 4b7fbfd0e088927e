"""Experts as a vector and a bit per weight: layout, what comes back, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import cli_process
import engine_cases as cases
import mergekernels as mk
import rounds_cases as rounds
from mergekernels.engine.masks import compress, restore
from mergekernels.engine.masks.layout import index_bytes
from mergekernels.engine.recipe import load_recipe, resolve
from mergekernels.errors import ArgumentError, DataError, InputError, MergeError, PlanError
from test_engine_rounds import read

NAMES = tuple(rounds.SHAPES)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rounds.family(tmp_path_factory.mktemp("family"))


def recipe(root: Path, method: str, name: str = "masks", **top: Any) -> Path:
    return rounds.recipe(root, method, f"{name}-{method}", **top)


def expected(method: str, thresholds: tuple[float, ...] = (0.2, 0.2, 0.2)) -> tuple[dict[str, torch.Tensor], Any, Any]:
    """(vector in float32, bits by expert, scales) by the authors' formulas."""
    base, *models = rounds.tensors()
    vector, bits = {}, [{} for _ in models]
    own, kept = [0.0] * len(models), [0.0] * len(models)
    for name in NAMES:
        deltas = [m[name].float() - base[name].float() for m in models]
        total = torch.zeros_like(deltas[0])
        for d in deltas:
            total = total + d
        if method == "tall_mask":
            vector[name] = total
            for t, d in enumerate(deltas):
                bits[t][name] = d.abs() > thresholds[t] * (total - d).abs()
            continue
        sign = torch.where(total > 0, 1.0, -1.0)
        agree = [d * sign > 0 for d in deltas]
        best = torch.stack([torch.where(a, d.abs(), 0.0) for a, d in zip(agree, deltas, strict=True)]).amax(0)
        vector[name] = sign * best
        for t, d in enumerate(deltas):
            bits[t][name] = agree[t]
            own[t] += d.double().abs().mean().item()
            kept[t] += torch.where(agree[t], vector[name], 0.0).double().abs().mean().item()
    scales = [1.0] * len(models) if method == "tall_mask" else [a / b for a, b in zip(own, kept, strict=True)]
    return vector, bits, scales


def unpack(mask: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    bits = (mask[:, None].int() >> torch.arange(8)) & 1
    n = torch.Size(shape).numel()
    assert not bits.flatten()[n:].any()
    return bits.flatten()[:n].bool().view(shape)


@pytest.mark.parametrize("method", ["tall_mask", "emr"])
def test_vector_masks_and_experts(root: Path, tmp_path: Path, method: str) -> None:
    path = recipe(root, method, out_dtype="float32")
    report = compress(path, tmp_path / "m", tile=4096, threads=3)
    vector, bits, scales = expected(method)
    assert report.scales == pytest.approx(scales, rel=1e-12)
    stored = load_file(tmp_path / "m/vector.safetensors")
    assert set(stored) == set(NAMES)
    index = json.loads((tmp_path / "m/masks.json").read_text())
    base = rounds.tensors()[0]
    for t in range(rounds.MODELS):
        masks = load_file(tmp_path / f"m/mask-{t:05d}.safetensors")
        expert = restore(tmp_path / "m", f"tuned{t + 1}", tmp_path / f"e{t}")
        found = read(tmp_path / f"e{t}")
        for name in NAMES:
            assert torch.equal(stored[name], vector[name]), name
            assert torch.equal(unpack(masks[name], rounds.SHAPES[name]), bits[t][name]), (t, name)
            scaled = torch.tensor(index["experts"][t]["scale"]).float() * stored[name]
            wanted = base[name].float() + torch.where(bits[t][name], scaled, 0.0)
            assert torch.equal(found[name], wanted.bfloat16()), (t, name)
        assert expert.checkpoint_sha256
        assert mk.verify(tmp_path / f"e{t}").ok
    assert index["experts"][0]["scale"] == report.scales[0]


def test_the_bits_do_not_depend_on_threads_tiles_memory_or_backend(root: Path, tmp_path: Path) -> None:
    path = recipe(root, "emr")
    variants: list[dict[str, Any]] = [
        {"threads": 1, "tile": 4096},
        {"threads": 8, "tile": 8192},
        {"threads": 2, "memory": 2_500_000},
        {"backend": "reference"},
    ]
    seen = []
    for i, options in enumerate(variants):
        report = compress(path, tmp_path / str(i), **options)
        assert report.peak_tensor_memory <= report.memory
        seen.append(cases.published(tmp_path / str(i)))
    assert all(s == seen[0] for s in seen)


def test_tall_masks_of_a_ties_sum_over_the_model(root: Path, tmp_path: Path) -> None:
    path = recipe(root, "tall_mask", "ties", parameters={"inner": "ties", "threshold": 0.4}, out_dtype="float32")
    compress(path, tmp_path / "m", tile=4096)
    base, *models = rounds.tensors()
    whole = mk.merge_state_dicts(models, "tall_mask", base=base, inner="ties", threshold=0.4, out_dtype=torch.float32)
    stored = load_file(tmp_path / "m/vector.safetensors")
    for name in NAMES:
        assert torch.equal(base[name].float() + stored[name], whole[name]), name
    by_tensor = recipe(root, "tall_mask", "tensor", parameters={"inner": "ties", "scope": "tensor"})
    with pytest.raises(ArgumentError, match="not made of what each tensor measures by itself"):
        compress(by_tensor, tmp_path / "n")
    assert not (tmp_path / "n").exists()


def test_the_command_line(root: Path, tmp_path: Path) -> None:
    def call(*arguments: object) -> tuple[int, str]:
        done = cli_process.call(*arguments)
        return done.returncode, done.stdout + done.stderr

    experts = [root / f"tuned{i}" for i in (1, 2)]
    status, text = call("masks", "compress", *experts, tmp_path / "m", "--base", root / "base", "--method", "emr")
    assert status == 0 and "a vector and 2 masks" in text
    status, text = call("masks", "restore", tmp_path / "m", "1", tmp_path / "e")
    assert status == 0 and "checkpoint_sha256" in text
    assert call("masks", "compress", *experts, tmp_path / "n")[0] == 2
    status, text = call("masks", "restore", tmp_path / "m", "tuned7", tmp_path / "f")
    assert status == 3 and "no expert is called 'tuned7'" in text
    assert call("masks", "restore", tmp_path / "nothing", "0", tmp_path / "f")[0] == 3
    assert call("masks", "compress", recipe(root, "linear", parameters={"weight": 1}), tmp_path / "n")[0] == 2
    both = recipe(root, "tall_mask", "both")
    for more in (["--method", "emr"], ["--base", root / "base"]):
        status, text = call("masks", "compress", both, tmp_path / "n", *more)
        assert status == 2 and f"both-tall_mask.yml beside {more[0]}" in text.replace("\n", " ")
    status, text = call("masks", "compress", *experts, tmp_path / "n", "--base", root / "base", "--method", "ties")
    assert status == 2 and "ties has no masks; expected tall_mask or emr" in text
    assert not (tmp_path / "n").exists() and not (tmp_path / "f").exists()


@pytest.mark.parametrize("method", ["tall_mask", "emr"])
def test_lambda_has_no_effect_and_a_warning_says_so(root: Path, tmp_path: Path, method: str) -> None:
    plain = compress(recipe(root, method), tmp_path / "m")
    scaled = compress(recipe(root, method, "scaled", parameters={"lambda": 0.5}), tmp_path / "n")
    assert plain.scales == scaled.scales
    said = [[w for w in report.warnings if "lambda has no effect" in w] for report in (plain, scaled)]
    assert [len(found) for found in said] == [0, 1]
    for file in ("vector.safetensors", "mask-00000.safetensors"):
        assert (tmp_path / "m" / file).read_bytes() == (tmp_path / "n" / file).read_bytes()


@pytest.mark.parametrize("at", [None, 0, 19_999])
def test_an_integer_tensor_of_an_expert_that_is_lost_is_named(tmp_path: Path, at: int | None) -> None:
    """Masks hold nothing of it, and the expert gets the base's back. It is longer than a tile."""
    for name in ("base", "a", "b"):
        (tmp_path / name).mkdir()
        positions = torch.arange(20_000)
        if name == "b" and at is not None:
            positions[at] += 1
        weight = torch.full((4,), float(len(name)))
        save_file({"positions": positions, "weight": weight}, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text("{}")
    recipe = {
        "merge_method": "tall_mask",
        "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / n)} for n in "ab"],
    }
    report = compress(resolve(load_recipe(recipe)), tmp_path / "m", tile=4096)
    said = [w for w in report.warnings if "every expert gets the base's back" in w]
    assert len(said) == (at is not None) and all("tensor 'positions'" in w for w in said)
    restore(tmp_path / "m", "b", tmp_path / "e")
    assert torch.equal(read(tmp_path / "e")["positions"], torch.arange(20_000))


@pytest.fixture(scope="module")
def made(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "m"
    compress(recipe(root, "tall_mask", "made"), out)
    return out


def copied(made: Path, to: Path) -> Path:
    to.mkdir()
    for file in made.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def test_another_base_is_refused(root: Path, made: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="another base than the one of the masks"):
        restore(made, "0", tmp_path / "e", base=root / "tuned1")  # same names, shapes and dtypes
    smaller = {n: t[:1] if t.ndim else t for n, t in rounds.tensors()[0].items()}
    cases.save(tmp_path / "small", smaller)
    with pytest.raises(MergeError, match="this is not the base of the masks"):
        restore(made, "0", tmp_path / "e", base=tmp_path / "small")
    with pytest.raises(InputError, match="no such base"):
        restore(made, "0", tmp_path / "e", base=tmp_path / "nowhere")
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize("file", ["vector.safetensors", "mask-00001.safetensors"])
def test_a_changed_byte_is_found(made: Path, tmp_path: Path, file: str) -> None:
    folder = copied(made, tmp_path / "m")
    raw = bytearray((folder / file).read_bytes())
    raw[-1] ^= 1
    (folder / file).write_bytes(raw)
    with pytest.raises(InputError, match="was changed after it was written"):
        restore(folder, "1", tmp_path / "e")
    if file.startswith("mask"):
        restore(folder, "0", tmp_path / "e")


def test_a_damaged_index_and_more_masks_than_models_are_refused(made: Path, tmp_path: Path) -> None:
    folder = copied(made, tmp_path / "m")
    text = (folder / "masks.json").read_text()
    (folder / "masks.json").write_text(text.replace('"scale": 1.0', '"scale": 2.0', 1))
    with pytest.raises(InputError, match="the index of the masks is damaged: its digest is another"):
        restore(folder, "0", tmp_path / "e")
    data = json.loads(text)
    del data["masks_sha256"]
    data["tensors"][0]["mask_sha256"].append("0" * 64)
    (folder / "masks.json").write_bytes(index_bytes(data))
    with pytest.raises(InputError, match=r"more masks than models; expected 3 masks, one per model; got 4"):
        restore(folder, "0", tmp_path / "e")


def test_an_index_whose_parts_do_not_fit_is_refused(made: Path, tmp_path: Path) -> None:
    folder = copied(made, tmp_path / "m")
    text = (folder / "masks.json").read_text()

    def edited(edit: Callable[[dict[str, Any]], object]) -> None:
        data = json.loads(text)
        del data["masks_sha256"]
        edit(data)
        (folder / "masks.json").write_bytes(index_bytes(data))

    for edit in (
        lambda d: d.pop("base"),
        lambda d: d.update(base="base"),
        lambda d: d["experts"][0].update(scale=float("nan")),
        lambda d: d["experts"][0].update(scale=10**400),
        lambda d: d["experts"][0].update(scale=True),
        lambda d: d["tensors"][0].pop("name"),
        lambda d: d["tensors"][0].update(shape=["a"]),
        lambda d: d["tensors"][0].update(base_sha256=5),
        lambda d: d["tensors"][0].update(restored=["I64"] * 3),
    ):
        edited(edit)
        with pytest.raises(InputError, match="the index of the masks is damaged"):
            restore(folder, "0", tmp_path / "e")
    (folder / "masks.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match="the index of the masks is damaged"):
        restore(folder, "0", tmp_path / "e")
    edited(lambda d: d["tensors"].pop(0))
    with pytest.raises(PlanError, match="that the index of the masks lacks"):
        restore(folder, "0", tmp_path / "e")
    assert not (tmp_path / "e").exists()


def test_nonfinite_values_leave_nothing(tmp_path: Path) -> None:
    states = rounds.tensors()
    name = "model.layers.0.tall.weight"
    states[2][name][4200, 1] = float("nan")
    for folder, state in zip(("base", "tuned1", "tuned2", "tuned3"), states, strict=True):
        cases.save(tmp_path / folder, state)
    with pytest.raises(DataError, match=f"first at flat index {4200 * 7 + 1}") as caught:
        compress(recipe(tmp_path, "emr"), tmp_path / "m", tile=4096)
    assert "tuned2" in str(caught.value) and caught.value.tensor == name
    assert not (tmp_path / "m").exists()


def test_an_error_on_disk_leaves_nothing_and_the_same_call_succeeds(root: Path, tmp_path: Path) -> None:
    path = recipe(root, "emr", "faults")
    wanted = compress(path, tmp_path / "whole")
    assert wanted.experts
    for at in (3, 9, 20):
        with pytest.raises(MergeError):
            compress(path, tmp_path / "m", io=cases.FaultyIo(at, cases.EIO, ("pwrite", "rename")))
        assert not (tmp_path / "m").exists()
    compress(path, tmp_path / "m")
    assert cases.published(tmp_path / "m") == cases.published(tmp_path / "whole")
    assert cases.beside(tmp_path / "m") == []
    with pytest.raises(MergeError, match="the output exists"):
        compress(path, tmp_path / "m")


def test_integer_tensors_come_from_the_base(tmp_path: Path) -> None:
    for i, folder in enumerate(("base", "tuned1", "tuned2", "tuned3")):
        state = {"w": torch.randn(70, 90).bfloat16() + i, "ids": torch.arange(9)}
        cases.save(tmp_path / folder, state)
    compress(recipe(tmp_path, "tall_mask"), tmp_path / "m")
    restore(tmp_path / "m", "2", tmp_path / "e")
    assert torch.equal(read(tmp_path / "e")["ids"], torch.arange(9))
