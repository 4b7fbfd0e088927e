"""What a PEFT file holds beside factors: full tensors, and factors that tied weights repeat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import InputError, MergeError
from .factors import Pair
from .keys import Key
from .sites import Moved
from .stored import Stored

__all__ = ["extras_of", "tied_heads"]

_EMBEDDINGS = ("embed_tokens", "lm_head")
_LISTED = 5


def extras_of(
    keys: Mapping[str, Key],
    tensors: Mapping[str, Stored],
    config: Mapping[str, Any],
    pairs: Mapping[str, object],
    moved: Moved,
    where: str,
) -> tuple[dict[str, Stored], list[MergeError]]:
    """Tensor name in the base -> the full tensor that replaces it, and the tensors that nothing explains.

    PEFT writes modules_to_save, and embeddings with their head where the vocabulary was resized or they are adapted.
    """
    wanted = config.get("modules_to_save") or []
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    extras: dict[str, Stored] = {}
    problems: list[MergeError] = []
    for tensor, key in keys.items():
        if key.kind not in ("saved", "base_layer", "other", "alpha"):
            continue
        module = key.module
        saved = key.kind == "saved" or any(
            part == n or part.endswith(f".{n}") for n in names for part in _ancestors(module)
        )
        embedding = module.rpartition(".")[2] in _EMBEDDINGS
        copied = key.kind == "base_layer" and module in pairs
        if not (saved or embedding or copied):
            message = "neither a LoRA factor nor named by modules_to_save"
            hint = "Pass what PEFT's get_peft_model_state_dict returns" if key.kind == "base_layer" else None
            problems.append(InputError(message, code="adapter.unexpected", file=where, tensor=tensor, hint=hint))
            continue
        extras[f"{moved(module)}.{key.leaf}"] = tensors[tensor]
    if len(problems) > _LISTED:
        more = f"{len(problems) - _LISTED} more tensors like these"
        problems = [*problems[:_LISTED], InputError(more, code="adapter.unexpected", file=where)]
    return dict(sorted(extras.items())), problems


def _ancestors(module: str) -> list[str]:
    pieces = module.split(".")
    return [".".join(pieces[:n]) for n in range(1, len(pieces) + 1)]


def tied_heads(
    pairs: Mapping[str, tuple[bool, Pair]],
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]] | None,
    moved: Moved,
) -> list[str]:
    """Heads whose weight is the embedding's, and whose factors are the embedding's, transposed.

    With ensure_weight_tying PEFT trains one pair of factors for both and writes it twice. A base that ties has one
    tensor, to which the delta is added once.
    """
    if shapes is None or not config.get("ensure_weight_tying"):
        return []
    embeddings = [p for embedding, p in pairs.values() if embedding]
    return [
        module
        for module, (embedding, pair) in pairs.items()
        if not embedding
        and f"{moved(module)}.weight" not in shapes
        and any(e.a.shape == pair.b.shape[::-1] and e.b.shape == pair.a.shape[::-1] for e in embeddings)
    ]
