"""`verify`: any changed byte is found; recomputing a sample by the reference catches results that were never right."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct

import pytest
import torch

from engine_cases import TIES, family, recipe, run_of, save
from mergekernels.engine.digests import checkpoint_sha256, file_sha256
from mergekernels.engine.recompute import sample_names
from mergekernels.engine.verify import MANIFEST_NAME, verify
from mergekernels.errors import ArgumentError, InputError
from mergekernels.report.verify import verify_text


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A published folder of a few kilobytes in two files, and what made it."""
    root = tmp_path_factory.mktemp("tiny")
    g = torch.Generator().manual_seed(0)
    for name in ("base", "tuned1", "tuned2"):
        tensors = {f"layers.{i}.w": torch.randn(9, 11, generator=g).bfloat16() for i in range(3)}
        tensors |= {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 2), "ids": torch.arange(5)}
        save(root / name, tensors)
    run_of(recipe(root, "ties", **TIES), root / "out", shard_size=400)
    return root / "out"


def flip(path, position, bit):
    """Flips one bit; the undoing is the same call."""
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ (1 << bit)]))


def test_what_was_published_verifies(tiny):
    seen = []
    report = verify(tiny, progress=lambda done, total: seen.append((done, total)))
    assert report.ok and not report.problems and not report.notes
    manifest = json.loads((tiny / MANIFEST_NAME).read_text())
    assert report.checkpoint_sha256 == manifest["checkpoint_sha256"]
    assert report.files == len(list(tiny.iterdir())) and len(manifest["files"]) > 1
    assert report.tensors == 6 == len(manifest["tensors"])
    # Headers are read twice: parsed, then hashed with the tensors.
    assert report.bytes_read == sum(p.stat().st_size for p in tiny.iterdir())
    assert seen[-1][0] == seen[-1][1]
    assert "verified" in verify_text(report)


def test_any_flipped_byte_is_found(tiny, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(tiny, out)
    assert verify(out).ok
    missed, flips = [], 0
    for path in sorted(out.iterdir()):
        whole = path.suffix == ".safetensors" or path.name in (MANIFEST_NAME, "model.safetensors.index.json")
        for position in range(0, path.stat().st_size, 1 if whole else 29):
            bit = (position * 5 + 3) % 8
            flip(path, position, bit)
            report = verify(out, threads=1)
            if report.ok or not any(path.name in str(p) or path.name in (p.file or "") for p in report.problems):
                missed.append((path.name, position, bit))
            flip(path, position, bit)
            flips += 1
    assert not missed
    assert flips > 3000
    assert verify(out).ok


@pytest.mark.parametrize("bit", range(8))
def test_every_bit_of_the_padding_of_a_header(tiny, tmp_path, bit):
    out = tmp_path / "out"
    shutil.copytree(tiny, out)
    path = next(p for p in sorted(out.glob("*.safetensors")) if p.read_bytes()[_header_end(p) - 1 :][:1] == b" ")
    flip(path, _header_end(path) - 1, bit)
    assert not verify(out).ok


def _header_end(path):
    return 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]


def damaged(tiny, tmp_path, change):
    """The problems, as text, after `change` to a copy."""
    out = tmp_path / "out"
    shutil.copytree(tiny, out)
    change(out)
    report = verify(out)
    assert not report.ok
    return [str(p) for p in report.problems]


def test_missing_and_cut_files(tiny, tmp_path):
    first = sorted(p.name for p in tiny.glob("*.safetensors"))[0]
    problems = damaged(tiny, tmp_path / "a", lambda out: (out / first).unlink())
    assert any(first in p and "not there" in p for p in problems)
    problems = damaged(tiny, tmp_path / "b", lambda out: os.truncate(out / first, 300))
    assert any(first in p and "the size is another; expected" in p for p in problems)
    problems = damaged(tiny, tmp_path / "c", lambda out: (out / "config.json").unlink())
    assert any("config.json" in p for p in problems)
    problems = damaged(tiny, tmp_path / "d", lambda out: (out / "config.json").write_text("{}"))
    assert any("config.json: the size is another" in p for p in problems)


def test_extra_files(tiny, tmp_path):
    problems = damaged(
        tiny, tmp_path, lambda out: shutil.copy(next(out.glob("*.safetensors")), out / "other.safetensors")
    )
    assert any("other.safetensors: a model file that is not in the manifest" in p for p in problems)
    out = tmp_path / "noted"
    shutil.copytree(tiny, out)
    (out / "notes.txt").write_text("mine")
    report = verify(out)
    assert report.ok and report.notes == ("notes.txt is not in the manifest",)


def test_index_that_does_not_fit(tiny, tmp_path):
    """The index is wrong, and every digest was made to agree with it."""

    def change(out):
        path = out / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        del index["weight_map"]["layers.1.w"]
        path.write_text(json.dumps(index))
        _seal(out)

    problems = damaged(tiny, tmp_path, change)
    assert any("layers.1.w" in p for p in problems) and not any("digest" in p for p in problems)


def test_damage_to_the_manifest(tiny, tmp_path):
    problems = damaged(tiny, tmp_path / "a", lambda out: os.truncate(out / MANIFEST_NAME, 500))
    assert any("the manifest is damaged" in p for p in problems)
    problems = damaged(
        tiny,
        tmp_path / "b",
        lambda out: (out / MANIFEST_NAME).write_text(
            (out / MANIFEST_NAME).read_text().replace('"seed": 0', '"seed": 1')
        ),
    )
    assert any("does not have its own digest" in p for p in problems)
    problems = damaged(tiny, tmp_path / "c", lambda out: (out / MANIFEST_NAME).write_text('{"format": "x"}'))
    assert any("another format; expected mergekernels.manifest/1; got x" in p for p in problems)

    def escape(out):
        text = json.loads((out / MANIFEST_NAME).read_text())
        text["small_files"][0]["name"] = "../secret"
        (out / MANIFEST_NAME).write_text(json.dumps(text))

    assert any("not a file name" in p for p in damaged(tiny, tmp_path / "d", escape))


def test_folders_of_others_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"was not published by mergekernels.*`mergekernels diff A B`"):
        verify(save(tmp_path / "model", {"x": torch.zeros(2)}))
    with pytest.raises(InputError, match="no such folder"):
        verify(tmp_path / "absent")
    with pytest.raises(ArgumentError, match="recompute is not a count"):
        verify(tmp_path, recompute=-1)


def _seal(out):
    """Makes every digest of a changed folder agree again."""
    path = out / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    records = {t["name"]: t for t in manifest["tensors"]}
    for entry in manifest["files"]:
        raw = (out / entry["name"]).read_bytes()
        end = _header_end(out / entry["name"])
        header = json.loads(raw[8:end])
        for name in entry["tensors"]:
            begin, stop = header[name]["data_offsets"]
            records[name]["sha256"] = hashlib.sha256(raw[end + begin : end + stop]).hexdigest()
        entry["sha256"] = file_sha256(raw[:end], [records[n]["sha256"] for n in entry["tensors"]])
    for entry in manifest["small_files"]:
        data = (out / entry["name"]).read_bytes()
        entry |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest["checkpoint_sha256"] = checkpoint_sha256(
        (t["name"], t["dtype"], tuple(t["shape"]), t["sha256"]) for t in records.values()
    )
    manifest["manifest_sha256"] = ""
    text = json.dumps(manifest, indent=1) + "\n"
    own = hashlib.sha256(text.encode()).hexdigest()
    head, tail = text.rsplit('""', 1)
    path.write_text(head + f'"{own}"' + tail)


RECIPES = {
    "linear": ("linear", {"parameters": {"weight": 0.7}}),
    "ties": ("ties", TIES),
    "ties of the paper": ("ties", {"parameters": {"density": 0.3}, "dialect": "paper"}),
    "ties over the model": ("ties", {"parameters": {"weight": 1.0, "density": 0.4, "scope": "model"}}),
    "task arithmetic, cast": (
        "task_arithmetic",
        {"parameters": {"weight": 0.4}, "dtype": "float16", "out_dtype": "float32"},
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recomputing_gives_the_same_bytes(tmp_path, name):
    method, top = RECIPES[name]
    family(tmp_path, models=2)
    run_of(recipe(tmp_path, method, **top), tmp_path / "out")
    report = verify(tmp_path / "out", recompute=100)
    assert report.ok, report.problems
    assert len(report.recomputed) == report.tensors == 9
    assert "9 tensors recomputed" in verify_text(report)


def test_recomputing_finds_values_that_digests_agree_with(tmp_path):
    family(tmp_path, models=2)
    run_of(recipe(tmp_path, "ties", **TIES), tmp_path / "out")
    out = tmp_path / "out"
    for path in sorted(out.glob("*.safetensors")):
        end = _header_end(path)
        header = json.loads(path.read_bytes()[8:end])
        if "model.layers.1.mlp.weight" in header:
            begin, _ = header["model.layers.1.mlp.weight"]["data_offsets"]
            flip(path, end + begin + 2 * 1234, 0)
            flip(path, end + begin + 2 * 777, 3)
        if "model.position_ids" in header:
            flip(path, end + header["model.position_ids"]["data_offsets"][0] + 8 * 7, 1)
    _seal(out)
    assert verify(out).ok
    report = verify(out, recompute=100)
    assert [(p.tensor, p.code) for p in report.problems] == [
        ("model.layers.1.mlp.weight", "verify.recompute"),
        ("model.position_ids", "verify.recompute"),
    ]
    assert "other values in 2 elements, the first at flat index 777" in str(report.problems[0])
    assert "in 1 elements, the first at flat index 7" in str(report.problems[1])


def test_the_sample_follows_from_the_hash():
    names = [f"t{i}" for i in range(50)]
    first = sample_names(names, "aa" * 32, 5)
    assert first == sample_names(names[::-1], "aa" * 32, 5) and len(set(first)) == 5
    assert first != sample_names(names, "bb" * 32, 5)
    assert sample_names(names, "aa" * 32, 99) == sorted(names)
    assert set(first) < set(sample_names(names, "aa" * 32, 6))


def test_inputs_that_are_gone_or_changed(tmp_path):
    folders = family(tmp_path, models=2)
    run_of(recipe(tmp_path, "ties", **TIES), tmp_path / "out")
    file = folders[1] / "model-00001-of-00002.safetensors"
    os.utime(file, ns=(1, 1))
    report = verify(tmp_path / "out", recompute=1)
    assert report.ok and "another modification time" in report.notes[0]
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b'"format":"pt"', b'"format":"np"'))
    with pytest.raises(
        InputError, match=r"input '.*tuned1' was changed since the merge: model-00001-of-00002\.safetensors"
    ):
        verify(tmp_path / "out", recompute=1)
    assert verify(tmp_path / "out").ok
    shutil.rmtree(folders[1])
    with pytest.raises(InputError, match=r"tuned1: the input '.*tuned1' of this merge is gone"):
        verify(tmp_path / "out", recompute=1)
    assert verify(tmp_path / "out").ok
