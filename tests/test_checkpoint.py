"""Checkpoint folders: which files are read, what the index must say, and the hub cache."""

from __future__ import annotations

import json

import pytest

from mergekernels.errors import FormatError, InputError, PlanError
from mergekernels.formats.checkpoint import open_checkpoint
from mergekernels.formats.hub import cache_folder, looks_like_hub, snapshot
from mergekernels.formats.safetensors import inspect
from recipe_checkpoints import llama_shapes, safetensors_bytes, save

INDEX = "model.safetensors.index.json"


def edit_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("shards", [1, 3])
def test_open(tmp_path, shards):
    folder = save(tmp_path / "m", shards=shards)
    checkpoint = open_checkpoint(folder, label="org/m")
    assert checkpoint.label == "org/m"
    assert checkpoint.config["num_hidden_layers"] == 3
    assert {n: t.shape for n, t in checkpoint.tensors.items()} == llama_shapes()
    assert len(checkpoint.files) == shards
    assert checkpoint.warnings == ()
    for name, tensor in checkpoint.tensors.items():
        file = checkpoint.files[tensor.file]
        header = inspect(file.path)
        assert tensor.offset == header.data_start + header.entries[name].begin
        assert tensor.nbytes == header.entries[name].nbytes
        assert (file.size, file.mtime_ns, file.inode) == (header.size, header.mtime_ns, header.inode)
        assert file.header_sha256 == header.sha256


def test_other_single_files(tmp_path):
    folder = save(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert len(open_checkpoint(folder).tensors) == 12
    direct = open_checkpoint(folder / "weights.safetensors")
    assert len(direct.tensors) == 12
    assert direct.config == open_checkpoint(folder).config != {}
    (folder / "more.safetensors").write_bytes(safetensors_bytes({"a": (1,)}))
    with pytest.raises(InputError, match=r"several safetensors files and no .*: 'more\.safetensors', 'weights"):
        open_checkpoint(folder)


def test_links_into_a_cache(tmp_path):
    folder = save(tmp_path / "blobs", shards=2)
    linked = tmp_path / "snapshot"
    linked.mkdir()
    for i, file in enumerate(sorted(folder.iterdir())):
        file.rename(folder / f"{i:x}")
        (linked / file.name).symlink_to(f"../blobs/{i:x}")
    assert len(open_checkpoint(linked).tensors) == 12


def test_index_decides(tmp_path):
    folder = save(tmp_path / "m", shards=2)
    (folder / "consolidated.safetensors").write_bytes(b"broken")
    (folder / "model.safetensors").write_bytes(b"broken")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    checkpoint = open_checkpoint(folder)
    assert len(checkpoint.tensors) == 12
    assert [w.split(": ", 1)[1] for w in checkpoint.warnings] == ["ignored, the index beside it decides"]


def test_total_size_is_only_a_warning(tmp_path):
    folder = save(tmp_path / "m", shards=2)
    edit_index(folder, lambda i: i["metadata"].update(total_size=1))
    (warning,) = open_checkpoint(folder).warnings
    assert warning.endswith("total_size is 1, the tensors have 400 bytes")


def test_nothing_to_merge(tmp_path):
    with pytest.raises(InputError, match="no such checkpoint folder"):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(InputError, match="no safetensors file in the folder"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(InputError) as caught:
        open_checkpoint(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: only pickle files ('pytorch_model.bin'), which can run code when they are read; "
        f"expected safetensors. "
        "Convert it: load it with transformers and call save_pretrained(folder, safe_serialization=True)"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "no weight_map"),
        ("{}", "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "duplicate key 'a'"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "bare name of a .safetensors file in the same folder; got '../x"),
        ('{"weight_map": {"a": "/x.safetensors"}}', "got '/x.safetensors'"),
        ('{"weight_map": {"a": "..\\\\x.safetensors"}}', "unusable file name"),
        ('{"weight_map": {"a": "x\\u0000.safetensors"}}', "unusable file name"),
        ('{"weight_map": {"a": "x.bin"}}', "got 'x.bin'"),
        ('{"weight_map": {"a": 1}}', "unusable file name"),
        ('{"weight_map": {"a": "x.safetensors"}}', "shard 'x.safetensors' of the index is missing"),
    ],
)
def test_bad_index(tmp_path, text, message):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises((FormatError, InputError)) as caught:
        open_checkpoint(tmp_path)
    assert message in str(caught.value)
    assert caught.value.file == str(tmp_path / INDEX)


def test_index_against_headers(tmp_path):
    folder = save(tmp_path / "m", shards=2)

    def change(index):
        one, two = sorted(set(index["weight_map"].values()))
        del index["weight_map"]["model.norm.weight"]
        index["weight_map"]["ghost"] = one
        name = next(n for n, f in index["weight_map"].items() if f == two)
        index["weight_map"][name] = one
        change.moved = name

    edit_index(folder, change)
    with pytest.raises(PlanError) as caught:
        open_checkpoint(folder)
    assert [p.message for p in caught.value.problems] == [
        "1 tensors of the index are in no file: 'ghost'",
        "1 tensors of the files are not in the index: 'model.norm.weight'",
        f"1 tensors are in another file than the index says: '{change.moved}'",
    ]


def test_stored_twice(tmp_path):
    folder = save(tmp_path / "m", shards=2)
    shard = sorted(folder.glob("*.safetensors"))[1]
    header = {n: e.shape for n, e in inspect(shard).entries.items()}
    shard.write_bytes(safetensors_bytes(header | {"model.embed_tokens.weight": (8, 4)}))
    with pytest.raises(FormatError, match=r"stored in two files: 'model\.embed_tokens\.weight'"):
        open_checkpoint(folder)


def test_all_broken_files_are_listed(tmp_path):
    folder = save(tmp_path / "m", shards=3)
    one, two, _ = sorted(folder.glob("*.safetensors"))
    one.write_bytes(b"123")
    two.unlink()
    (folder / "config.json").write_text("{")
    with pytest.raises(PlanError) as caught:
        open_checkpoint(folder)
    messages = [str(p) for p in caught.value.problems]
    assert len(messages) == 3
    assert messages[0].startswith(f"{folder}/config.json: not valid JSON")
    assert "file too short" in messages[1]
    assert "shard 'model-00002-of-00003.safetensors' of the index is missing" in messages[2]


@pytest.mark.parametrize("text", ["[1]", "nonsense", "\xff"])
def test_bad_config(tmp_path, text):
    folder = save(tmp_path / "m")
    (folder / "config.json").write_bytes(text.encode("latin1"))
    with pytest.raises(FormatError, match=r"config\.json: not"):
        open_checkpoint(folder)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    for name in ("HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    model = tmp_path / "hub" / "models--org--name"
    for commit in ("a" * 40, "b" * 40):
        save(model / "snapshots" / commit)
    for ref, commit in {"main": "a", "v1": "b", "refs/pr/1": "b"}.items():
        path = model / "refs" / ref
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(commit * 40)
    (model / "refs" / "gone").write_text("c" * 40)
    (model / "refs" / "evil").write_text("../../../")
    return model


@pytest.mark.parametrize(
    ("revision", "commit"), [(None, "a"), ("main", "a"), ("v1", "b"), ("refs/pr/1", "b"), ("b" * 40, "b")]
)
def test_hub_cache(cache, revision, commit):
    assert snapshot("org/name", revision) == cache / "snapshots" / (commit * 40)


@pytest.mark.parametrize("revision", ["v2", "c" * 40, "gone", "evil"])
def test_hub_cache_misses(cache, revision):
    with pytest.raises(InputError) as caught:
        snapshot("org/name", revision)
    assert str(caught.value) == (
        f"model 'org/name' at revision '{revision}' is neither a local folder nor in the hub cache. "
        f"Download it with: hf download org/name --revision {revision}"
    )
    with pytest.raises(InputError, match=r"Download it with: hf download org/other$"):
        snapshot("org/other")


@pytest.mark.parametrize("revision", ["../main", "a/../../b", "/etc", "x y", "-x"])
def test_revisions_are_no_paths(cache, revision):
    with pytest.raises(InputError, match="not a revision"):
        snapshot("org/name", revision)


def test_cache_folder(monkeypatch):
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    assert str(cache_folder()) == "/home/me/.cache/huggingface/hub"
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert str(cache_folder()) == "/cache/huggingface/hub"
    monkeypatch.setenv("HF_HOME", "/hf")
    assert str(cache_folder()) == "/hf/hub"
    monkeypatch.setenv("HF_HUB_CACHE", "~/hub")
    assert str(cache_folder()) == "/home/me/hub"


def test_forms_of_hub_references():
    assert looks_like_hub("org/name-7B_v1.0")
    for other in ("name", "a/b/c", "./name", "../name", "/abs", "org/", "/name", "org/na me", "org/a..b", "~/x"):
        assert not looks_like_hub(other)
