"""Adapters that are refused, each by name: variants in the config, factors that are no pair, folders without one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from adapter_files import PLAIN, draw, linear_pair, peft_folder
from mergekernels.errors import ArgumentError, FormatError, InputError, PlanError
from mergekernels.formats.adapters import read_adapter

PATH = "model.q_proj"
TENSORS = linear_pair(PATH, 8, 2, 6)
A, B = (f"base_model.model.{PATH}.lora_{x}.weight" for x in "AB")

REFUSED: dict[str, list[Any]] = {
    "use_dora": [True],
    "lora_bias": [True],
    "bias": ["all", "lora_only"],
    "use_qalora": [True],
    "alora_invocation_tokens": [[1, 2], []],
    "arrow_config": [{"top_k": 3}],
    "kasa_config": [{"x": 1}],
    "velora_config": [{"num_groups": 2}],
    "monteclora_config": [{"x": 1}],
    "use_bdlora": [{"target_modules_bd_a": ["q"]}],
    "layer_replication": [[[0, 2]]],
    "trainable_token_indices": [[1, 2], {"embed_tokens": [1]}],
    "megatron_config": [{"tensor_model_parallel_size": 2}],
    "target_parameters": [["experts.gate_up_proj"]],
    "peft_type": ["ADALORA", "IA3", "LOHA", "LOKR", "VERA", "lora"],
    "init_lora_weights": ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "PiSSA", "something", 3],
    "a_field_of_the_future": [True, 0, 1.5, "x", ["x"], {"x": None}],
}
ACCEPTED: dict[str, list[Any]] = {
    "init_lora_weights": [True, False, None, "gaussian", "orthogonal", "mica", "eva"],
    "use_dora": [False, None],
    "arrow_config": [None],
    "target_parameters": [None, []],
    "layer_replication": [None],
    "lora_dropout": [0.1],
    "eva_config": [{"rho": 2.0}],
    "corda_config": [{"corda_method": "ipm"}],
    "lora_ga_config": [{"direction": "ArB2r"}],
    "loftq_config": [{}],
    "qalora_group_size": [32],
    "megatron_core": ["megatron.core"],
    "runtime_config": [{"ephemeral_gpu_offload": True}],
    "ensure_weight_tying": [True],
    "exclude_modules": [["k_proj"]],
    "layers_to_transform": [[0]],
    "lorap_emb_lr": [1e-6],
    "a_field_of_the_future": [None, False, "", [], {}],
}


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in REFUSED.items() for v in values])
def test_fields_that_are_refused(tmp_path: Path, field: str, value: Any) -> None:
    with pytest.raises(InputError) as caught:
        read_adapter(peft_folder(tmp_path / "a", TENSORS, **{field: value}))
    error = caught.value
    assert error.code == "adapter.refused" and f"{field} = {value!r}" in str(error) and str(tmp_path) in str(error)


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in ACCEPTED.items() for v in values])
def test_fields_that_are_not(tmp_path: Path, field: str, value: Any) -> None:
    adapter = read_adapter(peft_folder(tmp_path / "a", TENSORS, **{field: value}))
    assert adapter.modules[PATH].scale == 3.0 and adapter.config[field] == value


def test_several_refused_fields_at_once(tmp_path: Path) -> None:
    with pytest.raises(PlanError) as caught:
        read_adapter(peft_folder(tmp_path / "a", TENSORS, use_dora=True, bias="all"))
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora_alpha": ...}, "no lora_alpha"),
        ({"lora_alpha": None}, "no lora_alpha"),
        ({"lora_alpha": "8"}, "'lora_alpha'.*expected a finite number; got '8'"),
        ({"lora_alpha": float("nan")}, "'lora_alpha'.*got nan"),
        ({"r": 3}, "rank of module 'model.q_proj' is not the one of the config; expected rank 3"),
        ({"r": 0}, "'r'.*expected a positive integer; got 0"),
        ({"r": True}, "'r'.*got True"),
        ({"rank_pattern": {"q_proj": 1}}, "expected rank 1"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\].*positive integers"),
        ({"alpha_pattern": {"q_proj": None}}, r"alpha_pattern\['q_proj'\].*finite numbers"),
        ({"alpha_pattern": {"q_(": 1}}, r"alpha_pattern has a pattern that is no regular expression.*'q_\('"),
        ({"alpha_pattern": [1]}, "alpha_pattern.*an object"),
        ({"use_rslora": 1}, "'use_rslora'.*true or false"),
        ({"fan_in_fan_out": "yes"}, "'fan_in_fan_out'.*true, false or a list"),
    ],
)
def test_configs_that_do_not_fit(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_adapter(peft_folder(tmp_path / "a", TENSORS, **fields))


FULL = "base_model.model.model.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({A: None}, "factor B of module 'model.q_proj' has no partner; expected also lora_A"),
        ({B: None}, "factor A of module 'model.q_proj' has no partner; expected also lora_B"),
        ({A: draw(3, 6)}, r"expected B of shape \[out, 3\] beside A \[3, 6\]; got B \[8, 2\]"),
        ({B: draw(8, 2, 1, 1)}, r"ranks of A and B differ.*got B \[8, 2, 1, 1\]"),
        ({A: draw(2, 4, 3, 3), B: draw(8, 2, 3, 3)}, r"expected B of shape \[out, 2, 1, 1\]"),
        ({A: draw(2), B: draw(8)}, r"expected 2 dimensions.*got shape \[2\]. A sharded run"),
        ({A: torch.ones(0, 6), B: torch.ones(8, 0)}, r"expected rank 1 or more; got shape \[0, 6\]"),
        ({B: torch.ones(0, 2)}, "expected rank 1 or more"),
        ({A: draw(1, 1, 1, 1, 1, 1), B: draw(1, 1, 1, 1, 1, 1)}, "3 to 5 for a convolution"),
        ({A: torch.ones(2, 6, dtype=torch.int8)}, "expected bfloat16, float16, float32 or float64; got int8"),
        ({A: torch.ones(2, 6).to(torch.float8_e4m3fn)}, "got float8_e4m3fn"),
        ({"base_model.model.model.q_proj.lora_B.bias": draw(8)}, "variant of LoRA .lora_bias."),
        ({"base_model.model.model.q_proj.lora_magnitude_vector": draw(8)}, "lora_magnitude_vector"),
        ({"base_model.model.model.q_proj.lora_E": draw(2, 1)}, "lora_E"),
        ({"base_model.model.model.q_proj.ia3_l": draw(8, 1)}, "ia3_l"),
        ({"base_model.model.model.norm.weight": draw(8)}, "neither a LoRA factor nor named by modules_to_save"),
        ({"base_model.model.model.k.base_layer.weight": draw(8)}, "get_peft_model_state_dict"),
        ({f"model.{PATH.split('.')[1]}.lora_A.weight": draw(2, 6)}, "two tensors for one factor"),
        (
            {
                "base_model.model.model.q_proj.lora_embedding_A": draw(2, 6),
                "base_model.model.model.q_proj.lora_embedding_B": draw(8, 2),
            },
            "factors of a linear layer and of an embedding",
        ),
        (
            {
                "base_model.model.experts.base_layer.lora_A.weight": draw(2, 6),
                "base_model.model.experts.base_layer.lora_B.weight": draw(8, 2),
            },
            "target_parameters",
        ),
        (
            {
                "base_model.model.attn.base_layer.out_proj.lora_A.weight": draw(2, 6),
                "base_model.model.attn.base_layer.out_proj.lora_B.weight": draw(8, 2),
            },
            "MultiheadAttention",
        ),
        ({A: draw(2, 4, 3, 3), B: draw(8, 1, 1, 1)}, "A convolution with groups cannot be merged"),
        ({A: None, B: None}, "no LoRA factors found.*got an empty file"),
        ({A: None, B: None, FULL: draw(8, 6)}, "no LoRA factors found.*got 'base_model.model.model.q_proj.weight'"),
    ],
)
def test_factors_that_are_no_pair(tmp_path: Path, change: dict[str, torch.Tensor | None], message: str) -> None:
    tensors = {k: v for k, v in {**TENSORS, **change}.items() if v is not None}
    with pytest.raises(InputError, match=message) as caught:
        read_adapter(peft_folder(tmp_path / "a", tensors, r=...))
    assert str(tmp_path) in str(caught.value)


def test_everything_wrong_is_listed_but_not_without_end(tmp_path: Path) -> None:
    tensors = {**TENSORS, **{f"base_model.model.norm{i}.weight": draw(8) for i in range(50)}}
    with pytest.raises(PlanError) as caught:
        read_adapter(peft_folder(tmp_path / "a", tensors))
    assert len(caught.value.problems) == 6 and "45 more tensors" in str(caught.value)


def test_a_mapping_needs_alpha() -> None:
    with pytest.raises(InputError, match=r"adapter: the config has no lora_alpha.*config=\{'lora_alpha': ...\}"):
        read_adapter(TENSORS)
    with pytest.raises(InputError, match="no lora_alpha"):  # a language model may begin with "transformer" too
        read_adapter({"transformer.h.lora_A.weight": draw(2, 6), "transformer.h.lora_B.weight": draw(8, 2)})
    assert read_adapter(TENSORS, config={"lora_alpha": 4}, label="mine").modules[PATH].scale == 2.0


def test_values_that_are_no_tensors() -> None:
    with pytest.raises(InputError, match=f"mine: tensor '{A}': not a tensor; got list"):
        read_adapter({**TENSORS, A: [[1.0]]}, config={"lora_alpha": 4}, label="mine")
    with pytest.raises(ArgumentError, match="a path or a mapping"):
        read_adapter(3)  # type: ignore[arg-type]


def test_folders_without_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such adapter"):
        read_adapter(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"not an adapter.*adapter_model.safetensors"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(PLAIN))
    torch.save(TENSORS, tmp_path / "adapter_model.bin")
    for path in (tmp_path, tmp_path / "adapter_model.bin"):
        with pytest.raises(InputError, match=r"adapter_model.bin: a pickle file.*safe_serialization=True"):
            read_adapter(path)
    for name in ("one", "two"):
        peft_folder(tmp_path / "both" / name, TENSORS)
    with pytest.raises(InputError, match="sub-folders: one, two"):
        read_adapter(tmp_path / "both")
    second = read_adapter(tmp_path / "both", name="two")
    assert list(second.modules) == [PATH] and second.path == second.label == str(tmp_path / "both" / "two")
    for path, name in ((tmp_path / "both", "three"), (tmp_path / "both" / "one", "one")):
        with pytest.raises(InputError, match=r"sub-folders: one, two|no adapter 'one'; expected no name"):
            read_adapter(path, name=name)


def test_configs_that_are_not_json(tmp_path: Path) -> None:
    for text, message in [("{", "not valid JSON"), ("[]", "not a JSON object"), ('{"r": 1, "r": 2}', "duplicate key")]:
        (peft_folder(tmp_path / "a", TENSORS) / "adapter_config.json").write_text(text)
        with pytest.raises(FormatError, match=f"adapter_config.json: .*{message}"):
            read_adapter(tmp_path / "a")


def test_a_file_that_is_not_safetensors(tmp_path: Path) -> None:
    (peft_folder(tmp_path / "a", TENSORS) / "adapter_model.safetensors").write_bytes(b"\x08" + b"\0" * 20)
    with pytest.raises(FormatError, match=r"adapter_model\.safetensors"):
        read_adapter(tmp_path / "a")
    save_file({}, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(InputError, match="an empty file"):
        read_adapter(tmp_path / "a")
