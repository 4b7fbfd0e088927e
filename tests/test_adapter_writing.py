"""PEFT folders that are written: every field of the config, patterns, metadata, and never half a folder."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from adapter_files import draw, linear_pair, peft_folder
from mergekernels.adapters.model import Factors, Site
from mergekernels.adapters.saving import check_target
from mergekernels.errors import ArgumentError, OutputError
from mergekernels.formats.adapters import read_adapter, write_kohya, write_peft


def linear(module: str, rank: int = 2, out: int = 8, n: int = 6) -> dict[Site, Factors]:
    return {Site(module, "linear", (out, n)): Factors(draw(out, rank, seed=rank), draw(rank, n, seed=rank))}


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return config


def test_every_field_of_the_config(tmp_path: Path) -> None:
    modules = {**linear("model.a", 2), **linear("model.b", 3), **linear("model.c", 3)}
    given = {"task_type": "CAUSAL_LM", "revision": "v2", "auto_mapping": {"x": 1}, "use_rslora": True, "lora_alpha": 99}
    returned = write_peft(
        tmp_path / "a", modules, base_name="org/base", config=given, extras={"head.weight": lambda: draw(2, 2)}
    )
    assert returned == config_of(tmp_path / "a")
    assert returned == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "auto_mapping": {"x": 1},
        "revision": "v2",
        "base_model_name_or_path": "org/base",
        "inference_mode": True,
        "r": 3,
        "lora_alpha": 3,
        "lora_dropout": 0.0,
        "target_modules": ["model.a", "model.b", "model.c"],
        "modules_to_save": ["head"],
        "rank_pattern": {"model.a": 2},
        "alpha_pattern": {"model.a": 2},
        "fan_in_fan_out": False,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def test_names_of_tensors_and_metadata(tmp_path: Path) -> None:
    modules = {
        **linear("q"),
        Site("e", "embedding", (9, 4)): Factors(draw(4, 2), draw(2, 9)),
        Site("c", "conv", (8, 4, 3, 2)): Factors(draw(8, 2), draw(2, 24)),
    }
    provenance = {"method": "svd", "weights": [1, 0.5], "kept_energy": {"q": 0.99}}
    extras: dict[str, Callable[[], torch.Tensor]] = {
        "e.weight": lambda: draw(9, 4).half(),
        "s.bias": lambda: torch.arange(3),
    }
    write_peft(tmp_path / "a", modules, metadata=provenance, extras=extras)
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {k: tuple(v.shape) for k, v in tensors.items()} == {
        "base_model.model.q.lora_A.weight": (2, 6),
        "base_model.model.q.lora_B.weight": (8, 2),
        "base_model.model.e.lora_embedding_A": (2, 9),
        "base_model.model.e.lora_embedding_B": (4, 2),
        "base_model.model.e.base_layer.weight": (9, 4),
        "base_model.model.c.lora_A.weight": (2, 4, 3, 2),
        "base_model.model.c.lora_B.weight": (8, 2, 1, 1),
        "base_model.model.s.bias": (3,),
    }
    assert tensors["base_model.model.e.base_layer.weight"].dtype == torch.float16
    assert tensors["base_model.model.s.bias"].tolist() == [0, 1, 2]
    assert config_of(tmp_path / "a")["modules_to_save"] == ["s"]
    with safe_open(tmp_path / "a" / "adapter_model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata == {
        "format": "pt",
        "mergekernels.method": "svd",
        "mergekernels.weights": "[1, 0.5]",
        "mergekernels.kept_energy": '{"q": 0.99}',
    }


def test_the_bytes_are_those_of_the_reference_writer(tmp_path: Path) -> None:
    modules = {**linear("b", 3), **linear("a", 2)}
    write_peft(tmp_path / "a", modules, dtype="bfloat16")
    ours = tmp_path / "a" / "adapter_model.safetensors"
    save_file(load_file(ours), tmp_path / "theirs", {"format": "pt"})
    assert ours.read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16", "F64"])
def test_one_rounding(tmp_path: Path, dtype: str) -> None:
    b, a = draw(8, 2).double() * 1.000001, draw(2, 6).double()
    write_peft(tmp_path / "a", {Site("q", "linear", (8, 6)): Factors(b.T.contiguous().T, a)}, dtype=dtype)
    torch_dtype = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}[dtype]
    module = read_adapter(tmp_path / "a").modules["q"]
    assert module.dtype == dtype
    stored_b, stored_a = module.load()
    assert torch.equal(stored_b, b.to(torch_dtype)) and torch.equal(stored_a, a.to(torch_dtype))


def peft_rule(patterns: dict[str, int], module: str, default: int) -> int:
    """The rank that PEFT takes: the first pattern that matches the path, or its end after a dot."""
    return next((r for p, r in patterns.items() if re.match(rf"(.*\.)?({p})$", module)), default)


@pytest.mark.parametrize("seed", range(40))
def test_patterns_give_every_module_its_rank(tmp_path: Path, seed: int) -> None:
    """Paths that end in each other, with characters that mean something in an expression."""
    rng = random.Random(seed)
    pieces = ["a", "b", "a+", "b(1)", "a-b", "xa"]
    paths = {".".join(rng.choices(pieces, k=rng.randint(1, 3))) for _ in range(12)}
    modules: dict[Site, Factors] = {}
    for path in sorted(paths):
        modules |= linear(path, rng.choice([1, 2, 2, 3]))
    write_peft(tmp_path / "a", modules)
    config = config_of(tmp_path / "a")
    for site, factors in modules.items():
        assert peft_rule(config["rank_pattern"], site.module, config["r"]) == factors.rank
        assert peft_rule(config["alpha_pattern"], site.module, config["lora_alpha"]) == factors.rank
    assert {m: x.scale for m, x in read_adapter(tmp_path / "a").modules.items()} == dict.fromkeys(sorted(paths), 1.0)


def test_modules_of_the_base_that_end_like_a_target(tmp_path: Path) -> None:
    base = {f"{m}.weight": (8, 6) for m in ("q", "x.q", "y.x.q", "k")}
    write_peft(tmp_path / "a", linear("q"), base=base)
    assert config_of(tmp_path / "a")["exclude_modules"] == ["x.q", "y.x.q"]
    write_peft(tmp_path / "b", {**linear("q"), **linear("y.x.q")}, base=base)
    excluded = config_of(tmp_path / "b")["exclude_modules"]
    assert [bool(re.fullmatch(excluded, m)) for m in ("q", "x.q", "y.x.q", "k")] == [False, True, False, True]
    write_peft(tmp_path / "c", linear("y.x.q"), base=base)
    assert "exclude_modules" not in config_of(tmp_path / "c")


def test_both_orientations_come_back(tmp_path: Path) -> None:
    modules = {**linear("h.q", n=8), Site("q", "fan_in_fan_out", (8, 8)): Factors(draw(8, 2), draw(2, 8))}
    write_peft(tmp_path / "a", modules)
    assert config_of(tmp_path / "a")["fan_in_fan_out"] is True
    assert {m: x.site.kind for m, x in read_adapter(tmp_path / "a").modules.items()} == {
        "h.q": "linear",
        "q": "fan_in_fan_out",
    }


@pytest.mark.parametrize(
    ("modules", "more", "message"),
    [
        ({}, {}, "at least one module"),
        (
            {Site("q", "linear", (8, 6)): Factors(draw(8, 0), draw(0, 6))},
            {},
            "one rank, 1 or more.*zero delta as rank 1",
        ),
        ({Site("q", "linear", (8, 6)): Factors(draw(8, 2), draw(3, 6))}, {}, "one rank"),
        ({Site("q", "linear", (6, 8)): Factors(draw(8, 2), draw(2, 6))}, {}, r"expected \[6, 8\]; got \[8, 6\]"),
        ({**linear("q"), **linear("q", out=4)}, {}, "given twice"),
        (linear("q"), {"dtype": "int8"}, "unknown dtype"),
        (linear("m.q"), {"extras": {"m.weight": lambda: draw(1)}}, "PEFT would not adapt 'm.q' beside"),
    ],
)
def test_what_cannot_be_written(tmp_path: Path, modules: Any, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        write_peft(tmp_path / "a", modules, **more)
    assert list(tmp_path.iterdir()) == []


def write_one(path: Path, modules: dict[Site, Factors], **more: Any) -> None:
    (write_kohya if path.suffix else write_peft)(path, modules, **more)


@pytest.mark.parametrize("name", ["folder", "file.safetensors"])
def test_a_failed_write_leaves_what_was_there(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "x" / name
    write_one(target, linear("lora_unet_q", 2))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def no_space(fd: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", no_space)
        for where in (target, tmp_path / "y" / name):
            with pytest.raises(OutputError, match="cannot write the adapter: No space left"):
                write_one(where, linear("lora_unet_q", 3), overwrite=True)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    write_one(target, linear("lora_unet_q", 3), overwrite=True)
    assert read_adapter(target).modules["lora_unet_q"].rank == 3
    assert sorted(p.name for p in (tmp_path / "x").iterdir()) == [name]


def test_an_old_folder_comes_back_if_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_peft(tmp_path / "a", linear("q", 2))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    rename = Path.rename

    def only_aside(self: Path, target: Path) -> Path:
        if not str(self).endswith(".old") and not str(target).endswith(".old"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", only_aside)
        with pytest.raises(OutputError, match="Input/output error"):
            write_peft(tmp_path / "a", linear("q", 3), overwrite=True)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_nothing_is_replaced_unasked(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    write_peft(tmp_path / "a", linear("q"))  # an empty folder is no output
    with pytest.raises(OutputError, match=r"already there.*overwritten"):
        write_peft(tmp_path / "a", linear("q"))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="already there"):
        write_kohya(tmp_path / "file", linear("q"))
    with pytest.raises(OutputError, match="already there, and is no folder"):
        write_peft(tmp_path / "file", linear("q"), overwrite=True)
    with pytest.raises(OutputError, match="already there, and is no file"):
        write_kohya(tmp_path / "a", linear("q"), overwrite=True)
    assert (tmp_path / "file").read_text() == "mine"


def test_scaled_factors_come_back_as_they_were(tmp_path: Path) -> None:
    """Read (alpha 6, rsLoRA), written with scale 1, read: the same delta."""
    read = read_adapter(peft_folder(tmp_path / "a", linear_pair("q", 8, 2, 6), use_rslora=True))
    factors = read.modules["q"].factors()
    write_peft(tmp_path / "b", {read.modules["q"].site: factors})
    again = read_adapter(tmp_path / "b").modules["q"]
    assert again.scale == 1.0 and torch.equal(again.factors().dense(), factors.dense())


@pytest.mark.parametrize("other", ["model.safetensors", "notes.txt", "runs/"])
def test_a_folder_that_holds_anything_else_is_never_replaced(tmp_path: Path, other: str) -> None:
    """A base model, for example, or a folder of models."""
    modules = {Site("q", "linear", (4, 3)): Factors(torch.ones(4, 1), torch.ones(1, 3))}
    folder = tmp_path / "a"
    write_peft(folder, modules)
    (folder / "README.md").write_text("card")
    write_peft(folder, modules, overwrite=True)
    if other.endswith("/"):
        (folder / other).mkdir()
    else:
        (folder / other).write_text("mine")
    before = sorted(p.name for p in folder.iterdir())
    with pytest.raises(OutputError, match="holds more than an adapter, and is not replaced") as caught:
        write_peft(folder, modules, overwrite=True)
    assert other.rstrip("/") in str(caught.value)
    with pytest.raises(OutputError, match="holds more than an adapter"):
        check_target(folder, overwrite=True)
    assert sorted(p.name for p in folder.iterdir()) == before
    for nameless in ("/", "."):
        with pytest.raises(OutputError):
            check_target(nameless, overwrite=True)
