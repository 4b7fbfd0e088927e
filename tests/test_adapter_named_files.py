"""kohya, webui and diffusers files: names, alphas, components, and names that a base settles."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from adapter_files import draw
from mergekernels.adapters.model import Adapter, Factors, Site
from mergekernels.errors import ArgumentError, InputError, OutputError, PlanError
from mergekernels.formats.adapters import kohya_names, read_adapter, write_kohya

A, B = draw(2, 6), draw(8, 2)
UNET = "down_blocks.0.attentions.1.to_q"
TE = "text_model.encoder.layers.3.self_attn.q_proj"


def product(adapter: Adapter, module: str) -> torch.Tensor:
    return adapter.modules[module].factors().dense()


def kohya(tmp_path: Path, *names: str, alpha: torch.Tensor | None = None, **more: torch.Tensor) -> Path:
    tensors: dict[str, torch.Tensor] = dict(more)
    for i, name in enumerate(names):
        tensors[f"{name}.lora_down.weight"] = A + i
        tensors[f"{name}.lora_up.weight"] = B.clone()
        if alpha is not None:
            tensors[f"{name}.alpha"] = alpha.clone()
    save_file(tensors, tmp_path / "lora.safetensors", {"ss_base_model_version": "sd_v1"})
    return tmp_path / "lora.safetensors"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64", "int64", "int32"])
def test_alpha_is_a_tensor_of_any_type(tmp_path: Path, dtype: str) -> None:
    adapter = read_adapter(kohya(tmp_path, "lora_unet_x", alpha=torch.tensor(5, dtype=getattr(torch, dtype))))
    module = adapter.modules["lora_unet_x"]
    assert (adapter.form, adapter.base, module.alpha, module.scale) == ("kohya", "sd_v1", 5.0, 2.5)
    torch.testing.assert_close(product(adapter, "lora_unet_x"), 2.5 * B @ A)


def test_without_alpha_the_scale_is_one(tmp_path: Path) -> None:
    adapter = read_adapter(kohya(tmp_path, "lora_unet_x"))
    assert (adapter.modules["lora_unet_x"].alpha, adapter.modules["lora_unet_x"].scale) == (2.0, 1.0)


def test_a_base_settles_the_names(tmp_path: Path) -> None:
    mangled = [f"lora_unet_{UNET.replace('.', '_')}", f"lora_te1_{TE.replace('.', '_')}"]
    file = kohya(tmp_path, *mangled)
    single = {f"model.diffusion_model.{UNET}.weight": (8, 6), f"embedders.0.transformer.{TE}.weight": (8, 6)}
    adapter = read_adapter(file, base=single)
    assert [m.site.weight for m in adapter.modules.values()] == sorted(single)
    torch.testing.assert_close(product(adapter, f"embedders.0.transformer.{TE}"), B @ (A + 1))
    unet = read_adapter(file, base={f"{UNET}.weight": (8, 6)}, name="unet")
    assert list(unet.modules) == [UNET]
    assert kohya_names(adapter) == dict(zip([n[:-7] for n in single], mangled, strict=True))
    with pytest.raises(InputError, match=r"no module that becomes 'lora_te1_text_model.*name='te1'"):
        read_adapter(file, base={f"{UNET}.weight": (8, 6)})
    with pytest.raises(InputError, match=r"no component 'te2'.*te1.*unet"):
        read_adapter(file, name="te2")


def test_a_name_that_fits_two_modules(tmp_path: Path) -> None:
    file = kohya(tmp_path, "lora_unet_to_q_proj")
    # A whole path goes before the end of another, but underscores may also have been dots.
    assert list(read_adapter(file, base={"to_q.proj.weight": (8, 6), "x.to_q_proj.weight": (8, 6)}).modules) == [
        "to_q.proj"
    ]
    for both in (["to_q.proj", "to.q_proj"], ["a.to_q.proj", "b.to_q.proj"]):
        with pytest.raises(InputError, match=rf"may be 2 modules of the base: '{sorted(both)[0]}', "):
            read_adapter(file, base={f"{m}.weight": (8, 6) for m in both})


def test_two_names_for_one_module(tmp_path: Path) -> None:
    file = kohya(tmp_path, "lora_unet_to_q", "lora_te_to_q")
    with pytest.raises(InputError, match="two modules of the file are module 'to_q' of the base"):
        read_adapter(file, base={"to_q.weight": (8, 6)})


def test_convolutions_and_the_form_of_the_base(tmp_path: Path) -> None:
    tensors = {
        "lora_unet_conv.lora_down.weight": draw(2, 4, 3, 3),
        "lora_unet_conv.lora_up.weight": draw(8, 2, 1, 1),
        "lora_unet_proj.lora_down.weight": draw(2, 4, 1, 1),
        "lora_unet_proj.lora_up.weight": draw(8, 2, 1, 1),
        "lora_unet_flat.lora_down.weight": draw(2, 4),
        "lora_unet_flat.lora_up.weight": draw(8, 2),
    }
    save_file(tensors, tmp_path / "c.safetensors")
    plain = read_adapter(tmp_path / "c.safetensors").modules
    assert plain["lora_unet_conv"].site == Site("lora_unet_conv", "conv", (8, 4, 3, 3))
    assert plain["lora_unet_proj"].site == Site("lora_unet_proj", "conv", (8, 4, 1, 1))
    base = {"conv.weight": (8, 4, 3, 3), "proj.weight": (8, 4), "flat.weight": (8, 4, 1, 1)}
    adapter = read_adapter(tmp_path / "c.safetensors", base=base)
    assert adapter.modules["proj"].site == Site("proj", "linear", (8, 4))
    assert adapter.modules["flat"].site == Site("flat", "conv", (8, 4, 1, 1))
    site = adapter.modules["conv"].site
    # A convolution with the product's kernel is the two convolutions one after the other.
    image = draw(1, 4, 5, 5)
    down, up = tensors["lora_unet_conv.lora_down.weight"], tensors["lora_unet_conv.lora_up.weight"]
    chained = torch.conv2d(torch.conv2d(image, down), up)
    torch.testing.assert_close(torch.conv2d(image, site.to_weight(product(adapter, "conv"))), chained)


SPELLINGS = {
    "unet.{}.lora_A.weight": "unet.{}.lora_B.weight",
    "unet.{}.lora.down.weight": "unet.{}.lora.up.weight",
    "unet.{}.lora_down.weight": "unet.{}.lora_up.weight",
    "unet.{}.lora_linear_layer.down.weight": "unet.{}.lora_linear_layer.up.weight",
    "unet.{}.lora_A.default_0.weight": "unet.{}.lora_B.default_0.weight",
}


@pytest.mark.parametrize("down", SPELLINGS)
@pytest.mark.parametrize("memory", [False, True])
def test_spellings_of_diffusers(tmp_path: Path, down: str, memory: bool) -> None:
    tensors = {down.format(UNET): A, SPELLINGS[down].format(UNET): B}
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    adapter = read_adapter(tensors if memory else tmp_path)
    assert list(adapter.modules) == [f"unet.{UNET}"]
    torch.testing.assert_close(product(adapter, f"unet.{UNET}"), B @ A)
    assert list(read_adapter(tensors, name="unet").modules) == [UNET]
    assert list(read_adapter(tensors, base={f"{UNET}.weight": (8, 6)}).modules) == [UNET]
    assert list(read_adapter(tensors, base={f"model.unet.{UNET}.weight": (8, 6)}).modules) == [f"model.unet.{UNET}"]


def test_attention_processors() -> None:
    tensors: dict[str, torch.Tensor] = {}
    for target in ("to_q", "to_out"):
        tensors[f"mid.attn1.processor.{target}_lora.down.weight"] = A
        tensors[f"mid.attn1.processor.{target}_lora.up.weight"] = B
    assert list(read_adapter(tensors).modules) == ["mid.attn1.to_out.0", "mid.attn1.to_q"]


def test_metadata_of_diffusers(tmp_path: Path) -> None:
    tensors = {
        "transformer.blocks.0.to_q.lora_A.weight": A,
        "transformer.blocks.0.to_q.lora_B.weight": B,
        "transformer.blocks.1.to_q.lora_A.weight": A.clone(),
        "transformer.blocks.1.to_q.lora_B.weight": B.clone(),
        "text_encoder.q_proj.lora_A.weight": draw(3, 6),
        "text_encoder.q_proj.lora_B.weight": draw(8, 3),
    }

    def write(**fields: object) -> Path:
        config = {"transformer.r": 2, "transformer.lora_alpha": 8, "text_encoder.r": 3, "text_encoder.lora_alpha": 3}
        config |= {k.replace("__", "."): v for k, v in fields.items()}  # type: ignore[misc]
        save_file(tensors, tmp_path / "w.safetensors", {"format": "pt", "lora_adapter_metadata": json.dumps(config)})
        return tmp_path / "w.safetensors"

    adapter = read_adapter(write(transformer__alpha_pattern={"blocks.1.to_q": 1}))
    scales = {m: x.scale for m, x in adapter.modules.items()}
    assert adapter.form == "diffusers"
    assert scales == {
        "text_encoder.q_proj": 1.0,
        "transformer.blocks.0.to_q": 4.0,
        "transformer.blocks.1.to_q": 0.5,
    }
    assert read_adapter(write(transformer__use_rslora=True), name="transformer").modules[
        "blocks.0.to_q"
    ].scale == pytest.approx(8 / 2**0.5, rel=1e-15)
    with pytest.raises(InputError, match="use_dora = True"):
        read_adapter(write(transformer__use_dora=True))
    with pytest.raises(InputError, match=r"transformer.blocks.0.to_q.lora_A.weight.*expected rank 5"):
        read_adapter(write(transformer__r=5, transformer__rank_pattern={"1.to_q": 2}))
    flat = {k.removeprefix("transformer."): v for k, v in tensors.items() if k.startswith("transformer")}
    metadata = {"lora_adapter_metadata": json.dumps({"r": 2, "lora_alpha": 8})}
    save_file(flat, tmp_path / "flat.safetensors", metadata)
    assert read_adapter(tmp_path / "flat.safetensors").modules["blocks.0.to_q"].scale == 4.0


def test_alpha_that_contradicts_the_metadata(tmp_path: Path) -> None:
    tensors = {"unet.x.lora_A.weight": A, "unet.x.lora_B.weight": B, "unet.x.alpha": torch.tensor(4.0)}
    metadata = {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 4})}
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    assert read_adapter(tmp_path / "a.safetensors").modules["unet.x"].scale == 2.0
    metadata = {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 2})}
    save_file(tensors, tmp_path / "b.safetensors", metadata)
    with pytest.raises(InputError, match=r"unet.x.alpha.*expected scale 1.0; got alpha 4.0"):
        read_adapter(tmp_path / "b.safetensors")


@pytest.mark.parametrize(
    "name",
    ["dora_scale", "lora_mid.weight", "hada_w1_a", "lokr_w1", "oft_blocks", "diff", "diff_b", "lora_up.bias", "w_norm"],
)
def test_variants_are_refused_by_name(tmp_path: Path, name: str) -> None:
    file = kohya(tmp_path, "lora_unet_x", **{f"lora_unet_x.{name}": torch.ones(2)})
    with pytest.raises(InputError, match=f"'lora_unet_x.{name}': tensor of a variant of LoRA is refused"):
        read_adapter(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_unet_x.lora_up.weight": None}, "factor A of module 'lora_unet_x' has no partner; expected also up"),
        ({"lora_unet_x.lora_down.weight": None}, "factor B of module 'lora_unet_x' has no partner"),
        ({"lora_unet_x.lora_up.weight": draw(8, 3)}, "the ranks of A and B differ"),
        ({"lora_unet_x.lora_down.weight": torch.ones(2)}, "expected 2 dimensions, or 3 to 5"),
        ({"lora_unet_x.lora_down.weight": torch.ones(0, 6)}, "expected rank 1 or more"),
        ({"lora_unet_x.alpha": torch.ones(3)}, "alpha.*not a number"),
        ({"lora_unet_x.alpha": torch.tensor(float("nan"))}, "alpha of module 'lora_unet_x' is not finite"),
        ({"lora_unet_y.alpha": torch.tensor(1.0)}, "alpha of module 'lora_unet_y', which has no factors"),
        ({"lora_unet_x.something": torch.ones(3)}, "lora_unet_x.something': neither a LoRA factor nor an alpha"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, change: dict[str, torch.Tensor | None], message: str) -> None:
    tensors = load_file(kohya(tmp_path, "lora_unet_x", "lora_unet_z"))
    tensors = {k: v for k, v in {**tensors, **change}.items() if v is not None}
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises((InputError, PlanError), match=message):
        read_adapter(tmp_path / "bad.safetensors")


def test_written_and_read_back(tmp_path: Path) -> None:
    sites = {
        Site("down.0.to_q", "linear", (8, 6)): 2,
        Site("down.0.conv", "conv", (8, 4, 3, 3)): 300,
        Site("lora_te_x", "linear", (8, 6)): 1,
    }
    modules = {s: Factors(draw(s.shape[0], r, seed=1), draw(r, s.shape[1], seed=2)) for s, r in sites.items()}
    file = tmp_path / "new" / "out.safetensors"
    write_kohya(file, modules, base_name="sd_v1", metadata={"weights": [1]}, names={"down.0.conv": "lora_unet_c"})
    assert sorted(p.name for p in file.parent.iterdir()) == ["out.safetensors"]
    adapter = read_adapter(file)
    assert list(adapter.modules) == ["lora_te_x", "lora_unet_c", "lora_unet_down_0_to_q"]
    for site, name in zip(sites, ["lora_unet_down_0_to_q", "lora_unet_c", "lora_te_x"], strict=True):
        module = adapter.modules[name]
        assert (module.site.weight_shape, module.rank, module.scale) == (site.weight_shape, sites[site], 1.0)
        assert torch.equal(product(adapter, name), modules[site].dense())
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
        assert opened.get_tensor("lora_unet_c.alpha") == 300
    assert (metadata["ss_network_dim"], metadata["mergekernels.weights"]) == ("Dynamic", "[1]")
    with pytest.raises(OutputError, match="already there"):
        write_kohya(file, modules)
    write_kohya(file, dict([*modules.items()][:1]), overwrite=True, dtype="bfloat16")
    assert read_adapter(file).modules["lora_unet_down_0_to_q"].dtype == "BF16"


def test_components_of_diffusers_get_their_names_in_a_kohya_file(tmp_path: Path) -> None:
    """Loaders look for lora_unet_down_blocks_..., and ignore lora_unet_unet_down_blocks_... without a word."""
    modules = {
        f"unet.{UNET}": "lora_unet_down_blocks_0_attentions_1_to_q",
        f"text_encoder.{TE}": "lora_te_text_model_encoder_layers_3_self_attn_q_proj",
        "transformer.transformer_blocks.0.attn.to_q": "lora_transformer_transformer_blocks_0_attn_to_q",
        "transformer.h.0.self_attention.dense": "lora_unet_transformer_h_0_self_attention_dense",
        "model.layers.0.q_proj": "lora_unet_model_layers_0_q_proj",
    }
    write_kohya(tmp_path / "one.safetensors", {Site(m, "linear", (8, 6)): Factors(B, A) for m in modules})
    found = {n.partition(".")[0] for n in load_file(tmp_path / "one.safetensors")}
    assert found == set(modules.values())
    two = [f"text_encoder.{TE}", f"text_encoder_2.{TE}"]
    write_kohya(tmp_path / "two.safetensors", {Site(m, "linear", (8, 6)): Factors(B, A) for m in two})
    found = {n.partition(".")[0] for n in load_file(tmp_path / "two.safetensors")}
    assert found == {f"lora_te{i}_text_model_encoder_layers_3_self_attn_q_proj" for i in (1, 2)}


def test_what_a_kohya_file_cannot_hold(tmp_path: Path) -> None:
    factors = Factors(draw(8, 2), draw(2, 6))
    with pytest.raises(ArgumentError, match="kind embedding"):
        write_kohya(tmp_path / "x", {Site("e", "embedding", (6, 8)): factors})
    with pytest.raises(ArgumentError, match=r"two modules would be called 'lora_unet_a_b'.*'a.b'"):
        write_kohya(tmp_path / "x", {Site(m, "linear", (8, 6)): factors for m in ("a.b", "a_b")})
    assert list(tmp_path.iterdir()) == []
