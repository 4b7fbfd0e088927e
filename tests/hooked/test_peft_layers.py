"""PEFT's functions over tensors, conversion to LoRA, merging into the base; merge_modules on transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft", reason="needs PEFT in this environment")

from peft import LoHaConfig, LoKrConfig, get_peft_model
from peft.tuners.lora.conversion import convert_to_lora, save_as_lora
from peft.utils import merge_utils
from peft_cases import ALL, Net, adapted, deltas, lora
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import mergekernels as mk
import mergekernels.integrations.peft as fast
from mergekernels.errors import DataError

pytestmark = pytest.mark.peer


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    fast.reset_stats()
    yield
    fast.disable()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,), (37, 5), (2, 3, 4)])
@pytest.mark.parametrize("name", ["task_arithmetic", "magnitude_prune", "ties"])
def test_functions_over_tensors(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(*shape, 2)[..., 0].to(dtype) for _ in range(3)]  # strided
    before = [t.clone() for t in tensors]
    weights = torch.tensor([0.5, -1.0, 2.0])
    options = () if name == "task_arithmetic" else (0.4,)
    theirs = getattr(merge_utils, name)(tensors, weights, *options)
    with fast.enabled():
        ours = getattr(merge_utils, name)(tensors, weights, *options)
        leaf = [t.clone().requires_grad_() for t in tensors]
        getattr(merge_utils, name)(leaf, weights, *options).sum().backward()
    assert fast.stats().served == {name: 1} and fast.stats().passed_on[name] == {"a gradient is wanted": 1}
    assert all(t.grad is not None for t in leaf)
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    # PEFT sums bfloat16 values for the signs in bfloat16
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6 if dtype != torch.bfloat16 else 2e-2)
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))


def test_pruning() -> None:
    tensor = torch.randn(40, 50)
    theirs = merge_utils.prune(tensor, 0.3, "magnitude")
    with fast.enabled(seed=1):
        assert torch.equal(merge_utils.prune(tensor, 0.3, "magnitude"), theirs)
        drawn = merge_utils.prune(tensor, 0.25, "random", rescale=True)
        merge_utils.prune(tensor, 0.25, "random")
    kept = drawn != 0
    assert torch.equal(drawn[kept], tensor[kept] * 4) and 0.2 < float(kept.float().mean()) < 0.3
    assert fast.stats().passed_on == {"prune": {"random pruning without rescaling": 1}}


@pytest.mark.parametrize("rank", [3, 0.7, 0.999])
@pytest.mark.parametrize("kind", [LoHaConfig, LoKrConfig, "lora"])
def test_conversion_to_lora(kind: Any, rank: float, tmp_path: Path) -> None:
    """The same ranks, and the same best approximation of each layer's update."""
    torch.manual_seed(0)
    if kind == "lora":
        model = adapted(lora(8, 3, ["q_proj", "c_attn", "head"]))
        name = "a0"
    else:
        model = get_peft_model(Net(), kind(r=4, target_modules=["q_proj", "head"], init_weights=False))
        name = "default"
    config, theirs = convert_to_lora(model, rank=rank, adapter_name=name)
    with fast.enabled():
        mine, ours = convert_to_lora(model, rank=rank, adapter_name=name)
        save_as_lora(tmp_path, model, rank=rank, adapter_name=name)
    assert fast.stats().served["convert_to_lora"] == 2 * len(ours) // 2 and not fast.stats().passed_on
    assert ours.keys() == theirs.keys() and mine.rank_pattern == config.rank_pattern
    for key in (k for k in ours if "lora_A" in k):
        other = key.replace("lora_A", "lora_B")
        want = theirs[other] @ theirs[key]
        assert ours[key].shape == theirs[key].shape and ours[key].dtype == theirs[key].dtype
        assert float((ours[other] @ ours[key] - want).norm() / want.norm()) < 1e-5, key
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert all(torch.equal(saved[k], v) for k, v in ours.items())


def test_conversion_beyond_the_rank_is_peft_s_error() -> None:
    model = adapted(lora(8, 3, ["q_proj"]))
    with fast.enabled(), pytest.raises(ValueError, match="larger than the weight shape"):
        convert_to_lora(model, rank=30, adapter_name="a0")
    assert fast.stats().passed_on == {"convert_to_lora": {"a rank beyond the layer's": 1}}


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_adapters_into_the_base_with_one_rounding(dtype: torch.dtype, safe: bool) -> None:
    configs = [lora(4, 6), lora(3, 8, use_rslora=True), lora(2, 1, ["q_proj", "c_attn", "embed"])]
    names = ["a0", "a1", "a2"]
    plain, hooked = adapted(*configs, dtype=dtype), adapted(*configs, dtype=dtype)
    exact = {p: m.base_layer.weight.data.double() for p, m in hooked.base_model.model.named_modules() if p in ALL}
    for name in names:
        for path, delta in deltas(hooked, name).items():
            turned = delta.T if path in ("embed", "c_attn") else delta
            exact[path] = exact[path] + turned.reshape(exact[path].shape)
    plain.merge_adapter(names, safe_merge=safe)
    with fast.enabled():
        hooked.merge_adapter(names, safe_merge=safe)
    calls = fast.stats()
    assert calls.served == {"merge": 7} and not calls.passed_on, str(calls)
    for path, want in exact.items():
        ours = hooked.base_model.model.get_submodule(path)
        theirs = plain.base_model.model.get_submodule(path)
        assert ours.merged_adapters == theirs.merged_adapters
        got, other = ours.base_layer.weight.data, theirs.base_layer.weight.data
        one, two = (float((w.double() - want).norm()) for w in (got, other))
        assert one <= (1e-6 * float(want.norm()) if dtype == torch.float32 else 0.95 * two), (path, one, two)
        if dtype == torch.bfloat16:  # rounded once, but for sums in float32 that lie on the middle
            assert float((got == want.to(dtype)).float().mean()) > 0.99
    hooked.unmerge_adapter()
    assert not hooked.base_model.model.q_proj.merged
    merged = adapted(*configs, dtype=dtype)
    with fast.enabled(dialect="peft"):
        merged.merge_adapter(names)
    again = adapted(*configs, dtype=dtype)
    again.merge_adapter(names)
    assert all(torch.equal(a, b) for a, b in zip(merged.parameters(), again.parameters(), strict=True))


def test_unload_gives_the_merged_base() -> None:
    model = adapted(lora(4, 6), lora(4, 8))
    ids = torch.arange(6)[None]
    model.base_model.set_adapter(["a0", "a1"])
    want = model(ids)
    with fast.enabled():
        merged = model.merge_and_unload(safe_merge=True, adapter_names=["a0", "a1"])
    assert type(merged) is Net and fast.stats().served == {"merge": 7}
    torch.testing.assert_close(merged(ids), want, rtol=1e-4, atol=1e-4)
    broken = adapted(lora(4, 6), lora(4, 8))
    broken.base_model.model.head.lora_B["a1"].weight.data[0, 0] = float("inf")
    with fast.enabled(), pytest.raises(ValueError, match="NaNs detected"):
        broken.merge_and_unload(safe_merge=True, adapter_names=["a0", "a1"])


def _llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=True))


def _gpt2(seed: int) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16))


@pytest.mark.parametrize("make", [_llama, _gpt2])
def test_merge_modules_on_transformers(make: Any, tmp_path: Path) -> None:
    """Saved and loaded, and equal to the engine's merge of the saved checkpoints."""
    models, base = [make(1), make(2)], make(0)
    new = mk.merge_modules(models, "ties", base=base, weights=1.0, density=0.4)
    assert new.lm_head.weight is new.get_input_embeddings().weight
    new.save_pretrained(tmp_path / "new")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    ids = torch.arange(8)[None]
    torch.testing.assert_close(again(ids).logits, new.eval()(ids).logits)
    for name, model in (("base", base), ("m0", models[0]), ("m1", models[1])):
        model.save_pretrained(tmp_path / name)
    recipe = {
        "merge_method": "ties",
        "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / n), "parameters": {"weight": 1.0, "density": 0.4}} for n in ("m0", "m1")],
    }
    mk.run(recipe, str(tmp_path / "run"))
    engine = load_file(next((tmp_path / "run").glob("*.safetensors")))
    ours = load_file(tmp_path / "new" / "model.safetensors")
    assert engine.keys() == ours.keys() and all(torch.equal(v, ours[k]) for k, v in engine.items())
    models[0].get_parameter(next(n for n, _ in new.named_parameters())).data[0, 0] = float("nan")
    with pytest.raises(DataError, match="model 0"):
        mk.merge_modules(models, "linear", weights=1.0)
    assert isinstance(new, nn.Module)
