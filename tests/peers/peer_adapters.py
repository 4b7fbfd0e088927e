"""Runs in the peer's environment: `write FOLDER` makes adapters with PEFT, `read FOLDER` merges those that we wrote.

`write` leaves, for each case, the adapter as PEFT saves it and all weights after PEFT's merge_and_unload.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from peft import AdaLoraConfig, IA3Config, LoHaConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D


class Block(nn.Module):
    """Linear and transposed linear layers, square and not."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(6, 8)
        self.o_proj = nn.Linear(8, 8)
        self.c_attn = Conv1D(10, 6)
        self.c_proj = Conv1D(6, 6)


class Experts(nn.Module):
    """Three experts in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.randn(3, 6, 8))


class Net(nn.Module):
    """One layer of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(20, 6)
        self.layers = nn.ModuleList([Block() for _ in range(2)])
        self.q_proj = nn.Linear(6, 6, bias=False)
        self.conv = nn.Conv2d(4, 8, 3)
        self.pointwise = nn.Conv2d(4, 8, 1)
        self.conv1 = nn.Conv1d(4, 6, 3)
        self.score = nn.Linear(6, 3)
        self.experts = Experts()
        self.attention = nn.MultiheadAttention(6, 2)
        self.grouped = nn.Conv2d(4, 8, 3, groups=2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Enough for methods that look at inputs."""
        return self.score(self.embed_tokens(ids))


def base() -> Net:
    """The base model, always the same."""
    torch.manual_seed(0)
    return Net()


def _lora(**fields: Any) -> Callable[[], Any]:
    return lambda: LoraConfig(**{"r": 4, "lora_alpha": 6, **fields})


LINEAR = ["q_proj", "o_proj"]
ACCEPTED = {
    "plain": _lora(target_modules=LINEAR),
    "rslora": _lora(target_modules=LINEAR, use_rslora=True),
    "patterns": _lora(
        target_modules=LINEAR,
        rank_pattern={"layers.0.q_proj": 2, "^q_proj": 5, ".*o_proj": 3},
        alpha_pattern={"q_proj": 1, r"layers\.[1]\.o_proj": 20},
    ),
    "rslora_patterns": _lora(
        target_modules=LINEAR, use_rslora=True, rank_pattern={"o_proj": 1}, alpha_pattern={"0.q_proj": 3}
    ),
    "transposed": _lora(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True),
    "embedding": _lora(target_modules=["embed_tokens", "q_proj"]),
    "conv": _lora(target_modules=["conv", "pointwise", "conv1"]),
    "saved": _lora(target_modules=LINEAR, modules_to_save=["score"]),
    "gaussian": _lora(target_modules=LINEAR, init_lora_weights="gaussian"),
    "orthogonal": _lora(target_modules=LINEAR, init_lora_weights="orthogonal"),
    "dropout": _lora(target_modules=LINEAR, lora_dropout=0.1, layers_to_transform=[1], layers_pattern="layers"),
}
REFUSED = {
    "dora": _lora(target_modules=LINEAR, use_dora=True),
    "lora_bias": _lora(target_modules=LINEAR, lora_bias=True),
    "bias_all": _lora(target_modules=LINEAR, bias="all"),
    "bias_lora_only": _lora(target_modules=LINEAR, bias="lora_only"),
    "pissa": _lora(target_modules=LINEAR, init_lora_weights="pissa"),
    "pissa_niter": _lora(target_modules=LINEAR, init_lora_weights="pissa_niter_2"),
    "olora": _lora(target_modules=LINEAR, init_lora_weights="olora"),
    "tokens": _lora(target_modules=LINEAR, trainable_token_indices={"embed_tokens": [1, 2]}),
    "parameters": _lora(target_modules=[], target_parameters=["experts.gate"]),
    "attention": _lora(target_modules=["attention"]),
    "grouped": _lora(target_modules=["grouped"]),
    "adalora": lambda: AdaLoraConfig(target_modules=LINEAR, total_step=10, init_r=4, target_r=2),
    "ia3": lambda: IA3Config(target_modules=LINEAR, feedforward_modules=[]),
    "loha": lambda: LoHaConfig(target_modules=LINEAR, r=2),
    "lokr": lambda: LoKrConfig(target_modules=LINEAR, r=2),
}


def _train(model: PeftModel) -> None:
    """Random values wherever training would have put some."""
    generator = torch.Generator().manual_seed(1)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone().contiguous() for k, v in model.state_dict().items()}


def write(folder: Path) -> None:
    """All cases, the base, a model with two adapters, and one converted from PiSSA."""
    (folder / "base").mkdir()
    save_file(_weights(base()), folder / "base" / "model.safetensors")
    for name, config in {**ACCEPTED, **REFUSED}.items():
        model = get_peft_model(base(), config())
        _train(model)
        model.save_pretrained(folder / name)
        if name in ACCEPTED:
            save_file(_weights(model.merge_and_unload()), folder / f"{name}.merged.safetensors")
    _named(folder)
    _converted(folder)
    _transformers(folder)
    (folder / "version").write_text(peft.__version__)


def _llama(tie: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=tie))


def _gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    special = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16, **special))


def _transformers(folder: Path) -> None:
    """Models as people have them: transposed weights, embeddings saved beside their factors, tied heads."""
    head = ["embed_tokens", "lm_head", "q_proj"]
    cases = {
        "llama": (lambda: _llama(False), _lora(target_modules=head, task_type="CAUSAL_LM")),
        "tied": (lambda: _llama(True), _lora(target_modules=["lm_head", "q_proj"], ensure_weight_tying=True)),
        "gpt2": (_gpt2, _lora(target_modules="all-linear", task_type="CAUSAL_LM")),
    }
    for name, (make, config) in cases.items():
        make().save_pretrained(folder / f"{name}.base")
        model = get_peft_model(make(), config())
        _train(model)
        model.save_pretrained(folder / name)
        delta = model.base_model.model.lm_head.get_delta_weight("default") if name == "tied" else None
        merged = model.merge_and_unload()
        if delta is not None:
            # One tensor for embeddings and head: PEFT adds the one delta to it twice.
            merged.lm_head.weight.data -= delta
        merged.save_pretrained(folder / f"{name}.merged")


def _named(folder: Path) -> None:
    """Two adapters in one model: saved in sub-folders, and as they are in memory."""
    model = get_peft_model(base(), ACCEPTED["plain"](), adapter_name="one")
    model.add_adapter("two", ACCEPTED["embedding"]())
    for name in ("two", "one"):
        model.set_adapter(name)
        _train(model)
    (folder / "named").mkdir()
    model.save_pretrained(folder / "named")
    lora = {k: v for k, v in _weights(model).items() if "lora_" in k}
    save_file(lora, folder / "named.memory.safetensors")
    for name in ("one", "two"):
        model = PeftModel.from_pretrained(base(), folder / "named" / name)
        save_file(_weights(model.merge_and_unload()), folder / f"named.{name}.merged.safetensors")


def _converted(folder: Path) -> None:
    """PiSSA, trained, and converted by PEFT into an adapter of the original base."""
    model = get_peft_model(base(), LoraConfig(r=4, lora_alpha=4, target_modules=LINEAR, init_lora_weights="pissa"))
    start = folder / "pissa_start"
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(start)
    _train(model)
    model.save_pretrained(folder / "converted", path_initial_model_for_weight_conversion=str(start))
    save_file(_weights(model.merge_and_unload()), folder / "converted.merged.safetensors")


def read(folder: Path) -> None:
    """Every adapter in FOLDER/ours, merged by PEFT."""
    for adapter in sorted((folder / "ours").iterdir()):
        if adapter.is_dir():
            model = PeftModel.from_pretrained(base(), adapter)
            loaded = {k.replace(".default", "") for k in model.state_dict() if "lora_" in k}
            stored = {k for k in load_file(adapter / "adapter_model.safetensors") if "lora_" in k}
            assert loaded == stored, (adapter, loaded ^ stored)
            save_file(_weights(model.merge_and_unload()), folder / f"ours.{adapter.name}.merged.safetensors")


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))
