"""PEFT adapters: tensors in any spelling and a config, to modules of the base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...adapters.model import Adapter, Module
from ...errors import InputError, MergeError
from .config import scaling_of
from .extras import extras_of, tied_heads
from .factors import Pair, build_module, check_pair, locate, raise_all, some
from .keys import Key, parse_key
from .orientation import Orientation
from .refused import refuse
from .sites import Kind, Moved
from .stored import Source, Stored

__all__ = ["build_peft"]


def build_peft(
    tensors: Mapping[str, Stored],
    config: Mapping[str, Any],
    source: Source,
    *,
    shapes: Mapping[str, tuple[int, ...]] | None,
    name: str = "",
    metadata: Mapping[str, str] | None = None,
    alpha_needed: bool = True,
    form: str = "peft",
    path: str = "",
) -> Adapter:
    """An adapter from its tensors and config.

    Parameters
    ----------
    shapes : tensor name -> shape of the base, None if no base is known.
    name : which adapter to take where names in memory hold several; "" if there is one.
    metadata : of the file. alpha_needed : whether a config without lora_alpha is an error (else alpha = rank).
    form, path : for the adapter's description.

    Raises
    ------
    InputError, PlanError : a refused field, a factor without its partner, shapes that do not fit, unexpected tensors.
    """
    where = source.path or source.label
    refuse(config, source.label)
    keys = _of_adapter({t: parse_key(t) for t in tensors}, name, where)
    scaling = scaling_of(config, source.label, alpha_needed=alpha_needed)
    pairs, problems = _pairs(keys, tensors, where)
    raise_all(problems)
    if not pairs:
        raise InputError(
            "no LoRA factors found",
            code="adapter.empty",
            file=where,
            expected="tensors such as base_model.model.<module>.lora_A.weight",
            got=some(list(tensors)) or "an empty file",
        )
    moved = Moved(list(pairs), shapes, where)
    tied = tied_heads(pairs, config, shapes, moved)
    keys = {t: k for t, k in keys.items() if k.module not in tied}
    pairs = {m: p for m, p in pairs.items() if m not in tied}
    extras, problems = extras_of(keys, tensors, config, pairs, moved, where)
    raise_all(problems)
    flags = Orientation(config, metadata or {}, source.label)
    modules: dict[str, Module] = {}
    for stored_as in sorted(pairs):
        module = moved(stored_as)
        embedding, pair = pairs[stored_as]
        kind: Kind = "embedding" if embedding else flags.kind(stored_as, len(pair.a.shape))
        try:
            check_pair(module, pair, kind, where)
            alpha, scale, wanted = scaling.of(stored_as, pair.a.shape[0])
            if wanted is not None and wanted != pair.a.shape[0]:
                raise InputError(
                    f"rank of module '{module}' is not the one of the config",
                    code="adapter.rank",
                    file=where,
                    tensor=pair.a.name,
                    expected=f"rank {wanted}",
                    got=f"shape {list(pair.a.shape)}",
                )
            replaced = extras.get(f"{module}.weight")
            base = replaced.shape if replaced is not None else locate(module, shapes, where)
            modules[module] = build_module(module, kind, pair, (alpha, scale), base, where)
        except MergeError as error:
            problems.append(error)
    raise_all(problems)
    flags.check(modules, where)
    notes = [moved.note] if moved.note else []
    notes += [f"{where}: factors of '{m}' repeat those of the embedding, to which the base ties it" for m in tied]
    if scaling.alpha == 0:
        notes.append(f"{source.label}: lora_alpha is 0, so the adapter changes nothing")
    return Adapter(
        label=source.label,
        modules=dict(sorted(modules.items())),
        base=str(config.get("base_model_name_or_path") or ""),
        extras=extras,
        config=config,
        form=form,
        path=path,
        notes=tuple(notes),
        digest=source.sha256,
    )


def _of_adapter(keys: Mapping[str, Key], name: str, where: str) -> dict[str, Key]:
    """The keys of one adapter: those with its name, and those without any."""
    names = sorted({k.adapter for k in keys.values() if k.adapter})
    if name and name not in names:
        expected = f"one of {names}" if names else "no name: its tensors carry none"
        raise InputError(f"no adapter '{name}'", code="adapter.name", file=where, expected=expected, got=name)
    if not name and len(names) > 1:
        raise InputError(
            f"several adapters: {', '.join(names)}",
            code="adapter.name",
            file=where,
            hint="Name one of them with `name`",
        )
    wanted = name or (names[0] if names else "")
    return {t: k for t, k in keys.items() if k.adapter in ("", wanted)}


def _pairs(
    keys: Mapping[str, Key], tensors: Mapping[str, Stored], where: str
) -> tuple[dict[str, tuple[bool, Pair]], list[MergeError]]:
    """Module -> (whether an embedding, its factors), and what is wrong with the names."""
    halves: dict[tuple[str, bool], dict[str, Stored]] = {}
    problems: list[MergeError] = []
    for tensor, key in keys.items():
        if key.kind in ("A", "B", "embedding_A", "embedding_B"):
            found = halves.setdefault((key.module, key.kind.startswith("e")), {})
            if key.kind[-1] in found:
                other = found[key.kind[-1]].name
                message = f"two tensors for one factor: the other is '{other}'"
                problems.append(InputError(message, code="adapter.doubled", file=where, tensor=tensor))
            found[key.kind[-1]] = tensors[tensor]
        elif key.kind in ("bias", "foreign"):
            what = "lora_bias" if key.kind == "bias" else key.leaf
            message = f"tensor of a variant of LoRA ({what}), which is refused: it is not part of B A"
            problems.append(InputError(message, code="adapter.refused", file=where, tensor=tensor))
    pairs: dict[str, tuple[bool, Pair]] = {}
    for (module, embedding), both in halves.items():
        if len(both) == 1:
            half, alone = next(iter(both.items()))
            message = f"factor {half} of module '{module}' has no partner"
            expected = f"also lora_{'embedding_' if embedding else ''}{'A' if half == 'B' else 'B'}"
            problems.append(InputError(message, code="adapter.half", file=where, tensor=alone.name, expected=expected))
        elif module in pairs:
            message = f"module '{module}' has factors of a linear layer and of an embedding"
            problems.append(InputError(message, code="adapter.doubled", file=where))
        elif "base_layer" in module.split("."):
            message = "factors below another adapted layer (target_parameters, MultiheadAttention) are refused"
            problems.append(InputError(message, code="adapter.refused", file=where, tensor=both["A"].name))
        else:
            pairs[module] = embedding, Pair(both["B"], both["A"])
    return pairs, problems
