"""What an adapter's config may say: fields that only steer training, fields that are read, fields that are refused.

Nothing that changes the mathematics is ignored: a field known to change it is refused by name, and an unknown field
is refused unless its value says "off" (null, false, empty).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import InputError, MergeError, PlanError, cut

__all__ = ["refuse"]

_READ = frozenset(
    {
        "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out",
        "modules_to_save", "base_model_name_or_path", "bias", "init_lora_weights",
    }
)  # fmt: skip
# Which modules were trained shows in the file; dropout, initialisation data and offloading leave no trace in the delta.
# Tied weights have their own factors in the file. qalora_group_size and megatron_core mean something only beside
# use_qalora and megatron_config. lora_dtype and lorap_* are a trainer's settings of the optimiser.
_TRAINING = frozenset(
    {
        "task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "lora_dropout", "target_modules",
        "exclude_modules", "layers_to_transform", "layers_pattern", "eva_config", "corda_config", "lora_ga_config",
        "loftq_config", "megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying", "modules_to_tie",
        "target_modules_to_tie", "lora_dtype", "lorap_lr_ratio", "lorap_emb_lr",
    }
)  # fmt: skip
_WHY = {
    "use_dora": "DoRA is not linear in its factors",
    "lora_bias": "its B has a bias, which no weight can hold",
    "use_qalora": "QALoRA pools its inputs before A",
    "alora_invocation_tokens": "aLoRA acts on some tokens only",
    "arrow_config": "Arrow routes between adapters at run time",
    "kasa_config": "KaSA changes the base and the factors",
    "velora_config": "VeLoRA is not handled",
    "monteclora_config": "MonteCLoRA is not handled",
    "use_bdlora": "BD-LoRA's factors are block diagonal",
    "layer_replication": "its layers are copies that the base does not have",
    "trainable_token_indices": "it replaces rows of the embedding",
    "megatron_config": "its factors are sharded over a Megatron group",
    "target_parameters": "its factors belong to stacked experts",
}
_MUTATED = ("pissa", "olora", "corda", "lora_ga")
_PLAIN_INIT = (True, False, None, "gaussian", "orthogonal", "mica", "eva")


def refuse(config: Mapping[str, Any], where: str) -> None:
    """Checks every field of a config.

    Parameters
    ----------
    config : as read from adapter_config.json. where : the file or adapter that errors name.

    Raises
    ------
    InputError : one field is refused; names it and its value. PlanError : several are.
    """
    problems = [p for field, value in config.items() if (p := _problem(field, value, where)) is not None]
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise PlanError(problems)


def _problem(field: str, value: Any, where: str) -> MergeError | None:
    if field == "peft_type":
        if value in (None, "LORA"):
            return None
        return _error(field, value, where, "only LoRA adapters can be merged", expected="'LORA'")
    if field == "bias":
        why = "it trained biases, which are not part of a low-rank delta"
        return None if value in (None, "none") else _error(field, value, where, why, expected="'none'")
    if field == "init_lora_weights":
        return _init_problem(value, where)
    if field in _WHY:
        off = value is None or (field != "alora_invocation_tokens" and _is_off(value))
        return None if off else _error(field, value, where, _WHY[field])
    if field in _READ or field in _TRAINING or _is_off(value):
        return None
    return _error(
        field,
        value,
        where,
        "the field is unknown, so what it changes is unknown",
        hint="Remove it from the config if it does not change the adapter's weights",
    )


def _init_problem(value: Any, where: str) -> MergeError | None:
    if any(value is known or (isinstance(value, str) and value == known) for known in _PLAIN_INIT):
        return None
    name = str(value).lower()
    if name.startswith(_MUTATED):
        return _error(
            "init_lora_weights",
            value,
            where,
            "its base was changed at initialisation, so B A is not the delta against the original base",
            hint="Convert it with PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )
    why = "its base was changed and quantised at initialisation" if name == "loftq" else "the initialisation is unknown"
    return _error("init_lora_weights", value, where, why)


def _is_off(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, (str, list, tuple, dict, set)) and not value)


def _error(
    field: str, value: Any, where: str, why: str, *, expected: str | None = None, hint: str | None = None
) -> InputError:
    return InputError(
        f"adapter with {field} is refused: {why}",
        code="adapter.refused",
        file=where,
        expected=expected,
        got=f"{field} = {cut(repr(value))}",
        hint=hint,
    )
