"""What goes with a combination besides its factors: what must not be lost, and the config of the result."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import ArgumentError
from ...formats.adapters.write_peft import rank_patterns
from ._layers import slot_of

__all__ = ["put_right", "refuse_lossy", "tell_uncombined"]

_LOST = {
    "use_dora": "magnitudes (DoRA)",
    "lora_bias": "biases of lora_B (lora_bias)",
    "alora_invocation_tokens": "invocation tokens (aLoRA)",
    "arrow_config": "a routing (Arrow)",
    "trainable_token_indices": "trained tokens (trainable_token_indices)",
}


def refuse_lossy(model: Any, adapters: Sequence[str], weights: Sequence[float]) -> None:
    """Refuse what PEFT combines without a word and not rightly.

    Raises
    ------
    ArgumentError
    """
    if len(adapters) != len(weights):
        raise ArgumentError(
            "PEFT would leave out adapters or weights",
            code="parameter.count",
            expected=f"{len(adapters)} weights, one per adapter",
            got=str(len(weights)),
        )
    hint = "dialect='peft' leaves this to PEFT."
    for name in adapters:
        config = model.peft_config.get(name)
        for field, what in _LOST.items():
            if getattr(config, field, None):
                raise ArgumentError(
                    f"adapter '{name}' has {what}, which a combination would lose",
                    code="adapter.variant",
                    expected="adapters that are B A alone",
                    hint=hint,
                )


def tell_uncombined(model: Any, adapters: Sequence[str]) -> None:
    """Warn of whole modules that adapters have trained: PEFT gives the new adapter the base's."""
    for name in adapters:
        modules = getattr(model.peft_config.get(name), "modules_to_save", None)
        if modules:
            warnings.warn(
                f"modules_to_save of adapter '{name}' ({', '.join(map(str, modules))}) are not combined: PEFT gives "
                "the new adapter the base's",
                stacklevel=4,
            )


def put_right(model: Any, adapter: str, layers: Mapping[str, Any]) -> None:
    """The config and the layers of a combined adapter: scale 1 everywhere, patterns where ranks differ from r.

    layers : the LoRA layers by path.
    """
    config = model.peft_config[adapter]
    ranks: dict[str, int] = {}
    for name, module in layers.items():
        slot = slot_of(module, adapter)
        if slot is None:
            continue
        rank = slot.rank
        ranks[name] = rank
        module.r[adapter] = module.lora_alpha[adapter] = rank
        module.scaling[adapter] = 1.0
        if hasattr(module, "use_rslora"):
            module.use_rslora[adapter] = False
        if adapter in module.lora_A:
            _resize(module.lora_A[adapter], module.lora_B[adapter], rank)
    config.use_rslora = False
    config.init_lora_weights = True
    config.rank_pattern = rank_patterns(ranks, config.r)
    config.alpha_pattern = dict(config.rank_pattern)


def _resize(lora_a: Any, lora_b: Any, rank: int) -> None:
    """What the two modules say of themselves."""
    for module, names in ((lora_a, ("out_features", "out_channels")), (lora_b, ("in_features", "in_channels"))):
        for name in names:
            if hasattr(module, name):
                setattr(module, name, rank)
