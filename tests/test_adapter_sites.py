"""Where in a base the factors of an adapter belong: names, shapes, orientations, tensors that it replaces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from adapter_files import draw, linear_pair, peft_folder
from mergekernels.adapters.model import Adapter
from mergekernels.errors import InputError, PlanError
from mergekernels.formats.adapters import base_shapes, read_adapter
from mergekernels.formats.checkpoint import open_checkpoint
from recipe_checkpoints import save

Q = "model.layers.0.q_proj"
TENSORS = linear_pair(Q, 8, 2, 6)


def read(tmp_path: Path, tensors: dict[str, torch.Tensor], base: Any = None, **fields: Any) -> Adapter:
    return read_adapter(peft_folder(tmp_path / "a", tensors, **{"r": ..., **fields}), base=base)


def test_every_way_to_name_a_base(tmp_path: Path) -> None:
    folder = save(tmp_path / "base", shards=2)
    shapes = base_shapes(folder)
    assert shapes is not None and shapes == base_shapes(str(folder)) == base_shapes(open_checkpoint(folder))
    assert base_shapes({n: torch.empty(s) for n, s in shapes.items()}) == shapes
    assert base_shapes({n: list(s) for n, s in shapes.items()}) == shapes
    assert base_shapes(None) is None
    name = next(n for n, s in shapes.items() if len(s) == 2).removesuffix(".weight")
    out, n = shapes[f"{name}.weight"]
    assert list(read(tmp_path, linear_pair(name, out, 2, n), folder).modules) == [name]


def test_a_target_that_the_base_lacks(tmp_path: Path) -> None:
    both = {**TENSORS, **linear_pair("model.layers.9.q_proj", 8, 2, 6)}
    with pytest.raises(InputError, match=r"model.layers.9.q_proj.weight': the base has no such tensor.*layers.0") as e:
        read(tmp_path, both, {f"{Q}.weight": (8, 6)})
    assert e.value.code == "adapter.target-missing"


@pytest.mark.parametrize(
    ("stored", "held"),
    [
        ("layers.0.q", "model.layers.0.q"),
        ("layers.0.q", "a.b.layers.0.q"),
        ("model.layers.0.q", "layers.0.q"),
        ("a.b.layers.0.q", "layers.0.q"),
    ],
)
def test_one_prefix_for_all_modules(tmp_path: Path, stored: str, held: str) -> None:
    tensors = {**linear_pair(stored, 8, 2, 6), **linear_pair(stored.replace("0", "1"), 8, 2, 6)}
    tensors[f"base_model.model.{stored.replace('0.q', '0.norm')}.weight"] = draw(6)
    base = {f"{held.replace('0.q', x)}.weight": (8, 6) for x in ("0.q", "1.q")}
    adapter = read(tmp_path, tensors, base, modules_to_save=["norm"])
    assert list(adapter.modules) == [held, held.replace("0", "1")]
    assert list(adapter.extras) == [held.replace("0.q", "0.norm.weight")]
    assert len(adapter.notes) == 1 and "where the base has" in adapter.notes[0]
    del base[f"{held.replace('0', '1')}.weight"]
    with pytest.raises((InputError, PlanError), match="no such tensor"):
        read(tmp_path, tensors, base, modules_to_save=["norm"])


def test_a_prefix_that_is_not_the_only_one(tmp_path: Path) -> None:
    base = {"a.layers.0.q.weight": (8, 6), "b.layers.0.q.weight": (8, 6)}
    with pytest.raises(InputError, match=r"'layers.0.q.weight': the base has no such tensor"):
        read(tmp_path, linear_pair("layers.0.q", 8, 2, 6), base)


@pytest.mark.parametrize(
    ("shape", "kind", "weight"),
    [((8, 6), "linear", (8, 6)), ((6, 8), "fan_in_fan_out", (6, 8)), ((8, 6, 1, 1), "conv", (8, 6, 1, 1))],
)
@pytest.mark.parametrize("flag", [False, True])
def test_the_base_settles_the_orientation(
    tmp_path: Path, shape: tuple[int, ...], kind: str, weight: tuple[int, ...], flag: bool
) -> None:
    if kind == "conv" and flag:
        with pytest.raises(InputError, match="do not fit the base"):
            read(tmp_path, TENSORS, {f"{Q}.weight": shape}, fan_in_fan_out=flag)
        return
    site = read(tmp_path, TENSORS, {f"{Q}.weight": shape}, fan_in_fan_out=flag).modules[Q].site
    assert (site.kind, site.weight_shape) == (kind, weight)
    alone = read(tmp_path, TENSORS, fan_in_fan_out=flag).modules[Q].site
    assert (alone.kind, alone.weight_shape) == (("fan_in_fan_out", (6, 8)) if flag else ("linear", (8, 6)))


@pytest.mark.parametrize("shape", [(8, 7), (7, 6), (8,), (8, 6, 3, 3), (4, 12), (8, 6, 1)])
def test_shapes_that_do_not_fit_the_base(tmp_path: Path, shape: tuple[int, ...]) -> None:
    if shape == (8, 6, 1):
        assert read(tmp_path, TENSORS, {f"{Q}.weight": shape}).modules[Q].site.weight_shape == shape
        return
    with pytest.raises(InputError, match=r"expected a weight of shape \[8, 6\]; got") as caught:
        read(tmp_path, TENSORS, {f"{Q}.weight": shape})
    assert str(list(shape)) in str(caught.value) and f"{Q}.weight" in str(caught.value)


def test_square_modules_of_a_model_with_both_orientations(tmp_path: Path) -> None:
    tensors = {
        **linear_pair("h.c_attn", 18, 2, 6, seed=1),
        **linear_pair("h.c_proj", 6, 2, 6, seed=2),
        **linear_pair("lm_head", 20, 2, 6, seed=3),
    }
    base = {"h.c_attn.weight": (6, 18), "h.c_proj.weight": (6, 6), "lm_head.weight": (20, 6)}
    for flag in (False, True):
        with pytest.raises(InputError, match=r"is wrong for module '.*so the orientation .* is unknown: 'h.c_proj'"):
            read(tmp_path, tensors, base, fan_in_fan_out=flag)
    modules = read(tmp_path, tensors, base, fan_in_fan_out=[r"c_\w+"]).modules
    assert {m: x.site.kind for m, x in modules.items()} == {
        "h.c_attn": "fan_in_fan_out",
        "h.c_proj": "fan_in_fan_out",
        "lm_head": "linear",
    }
    del tensors["base_model.model.h.c_proj.lora_A.weight"], tensors["base_model.model.h.c_proj.lora_B.weight"]
    modules = read(tmp_path, tensors, base).modules
    assert modules["h.c_attn"].site.kind == "fan_in_fan_out" and modules["lm_head"].site.kind == "linear"


def test_grouped_convolutions_do_not_fit(tmp_path: Path) -> None:
    path = "base_model.model.conv"
    tensors = {f"{path}.lora_A.weight": draw(2, 4, 3, 3), f"{path}.lora_B.weight": draw(8, 2, 1, 1)}
    with pytest.raises(InputError, match="groups"):
        read(tmp_path, tensors, {"conv.weight": (8, 2, 3, 3)})


def embedding(vocabulary: int = 30) -> dict[str, torch.Tensor]:
    path = "base_model.model.model.embed_tokens"
    return {f"{path}.lora_embedding_A": draw(2, vocabulary), f"{path}.lora_embedding_B": draw(6, 2)}


def test_embeddings_and_their_copies(tmp_path: Path) -> None:
    name = "model.embed_tokens"
    site = read(tmp_path, embedding(), {f"{name}.weight": (30, 6)}).modules[name].site
    assert (site.kind, site.weight_shape, site.shape) == ("embedding", (30, 6), (6, 30))
    with pytest.raises(InputError, match="trained with another vocabulary"):
        read(tmp_path, embedding(), {f"{name}.weight": (28, 6)})
    with pytest.raises(InputError, match=r"expected 2 dimensions; got shape \[2, 30, 1\]"):
        tensors = embedding()
        tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = draw(2, 30, 1)
        read(tmp_path, tensors)
    # PEFT saves the whole embedding beside its factors, and replaces the base's where the vocabulary grew.
    copied = {**embedding(), "base_model.model.model.embed_tokens.base_layer.weight": draw(30, 6, seed=5)}
    adapter = read(tmp_path, copied, {f"{name}.weight": (28, 6)})
    assert adapter.modules[name].site.weight_shape == (30, 6)
    assert torch.equal(adapter.extras[f"{name}.weight"](), draw(30, 6, seed=5))
    # Not adapted, only resized.
    grown = {**TENSORS, "base_model.model.lm_head.weight": draw(30, 6, seed=6)}
    assert list(read(tmp_path, grown).extras) == ["lm_head.weight"]


def test_modules_to_save(tmp_path: Path) -> None:
    saved = {
        "base_model.model.score.weight": draw(3, 6),
        "base_model.model.score.bias": draw(3),
        "base_model.model.head.0.dense.weight": draw(6, 6),
        "base_model.model.head.0.out.modules_to_save.default.weight": draw(2, 6),
    }
    adapter = read(tmp_path, {**TENSORS, **saved}, modules_to_save=["score", "head"])
    assert list(adapter.extras) == ["head.0.dense.weight", "head.0.out.weight", "score.bias", "score.weight"]
    assert torch.equal(adapter.extras["score.bias"](), draw(3))
    with pytest.raises(PlanError, match=r"head.0.dense.weight': neither a LoRA factor nor named by modules_to_save"):
        read(tmp_path, {**TENSORS, **saved, "base_model.model.other.weight": draw(1)}, modules_to_save=["score"])


def test_lazy_mappings_are_asked_again_when_loaded() -> None:
    asked: list[str] = []

    class Lazy(dict[str, torch.Tensor]):
        def __getitem__(self, name: str) -> torch.Tensor:
            asked.append(name)
            return super().__getitem__(name)

    adapter = read_adapter(Lazy(TENSORS), config={"lora_alpha": 2})
    assert sorted(asked) == sorted(TENSORS)
    adapter.modules[Q].load()
    assert len(asked) == 4


def test_a_head_that_the_base_ties_to_its_embeddings(tmp_path: Path) -> None:
    """PEFT trains one pair for both (ensure_weight_tying) and writes it twice, transposed; the base has one tensor."""
    pair = embedding()
    tensors = {
        **pair,
        "base_model.model.lm_head.lora_A.weight": pair["base_model.model.model.embed_tokens.lora_embedding_B"].T,
        "base_model.model.lm_head.lora_B.weight": pair["base_model.model.model.embed_tokens.lora_embedding_A"].T,
        "base_model.model.lm_head.base_layer.weight": draw(30, 6),
        "base_model.model.model.embed_tokens.base_layer.weight": draw(30, 6),
    }
    tied = {"model.embed_tokens.weight": (30, 6)}
    adapter = read(tmp_path, tensors, tied, ensure_weight_tying=True)
    assert list(adapter.modules) == ["model.embed_tokens"] and list(adapter.extras) == ["model.embed_tokens.weight"]
    assert "repeat those of the embedding" in adapter.notes[0]
    both = ["lm_head", "model.embed_tokens"]
    assert list(read(tmp_path, tensors, {**tied, "lm_head.weight": (30, 6)}, ensure_weight_tying=True).modules) == both
    assert list(read(tmp_path, tensors, ensure_weight_tying=True).modules) == both
    alone = {k: v for k, v in tensors.items() if "lm_head.lora" in k}
    for flag in (False, True):
        with pytest.raises(InputError, match=r"lm_head.weight.*may tie its head to the embeddings"):
            read(tmp_path, alone, {**tied, "model.x.weight": (1, 1)}, ensure_weight_tying=flag)
