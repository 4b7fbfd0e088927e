"""PEFT adapters: tensors in any spelling and a config, to modules of the base."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ...adapters.model import Adapter, Module
from ...errors import InputError, MergeError
from .config import matching, scaling_of
from .factors import Pair, build_module, check_pair, locate, raise_all
from .keys import Key, parse_key
from .refused import refuse
from .sites import Kind, common_prefix
from .stored import Source, Stored

__all__ = ["build_peft"]

_EMBEDDINGS = ("embed_tokens", "lm_head")
_LISTED = 5


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
    refuse(config, where)
    keys = _of_adapter({t: parse_key(t) for t in tensors}, name, where)
    scaling = scaling_of(config, where, alpha_needed=alpha_needed)
    pairs, problems = _pairs(keys, tensors, where)
    raise_all(problems)
    if not pairs:
        raise InputError(
            "no LoRA factors found",
            code="adapter.empty",
            file=where,
            expected="tensors such as base_model.model.<module>.lora_A.weight",
            got=_some(list(tensors)) or "an empty file",
        )
    moved = _moved(list(pairs), shapes, where)
    extras, problems = _extras(keys, tensors, config, pairs, moved, where)
    raise_all(problems)
    flags = _Orientation(config, metadata or {}, where)
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
    if name and names and name not in names:
        raise InputError(f"no adapter '{name}'", code="adapter.name", file=where, expected=f"one of {names}", got=name)
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
        elif module == "base_layer" or module.endswith(".base_layer"):
            message = "factors below another adapted layer (target_parameters) are refused"
            problems.append(InputError(message, code="adapter.refused", file=where, tensor=both["A"].name))
        else:
            pairs[module] = embedding, Pair(both["B"], both["A"])
    return pairs, problems


class _moved:
    """Module path as stored -> path in the base."""

    def __init__(self, modules: list[str], shapes: Mapping[str, tuple[int, ...]] | None, where: str) -> None:
        change = common_prefix(modules, shapes) if shapes is not None else ("", "")
        # Nothing fits: the paths stay, and the first lookup names the tensor that the base lacks.
        self.removed, self.added = change or ("", "")
        self.note = ""
        if self.removed or self.added:
            self.note = f"{where}: module paths begin with '{self.removed}' where the base has '{self.added}'"

    def __call__(self, module: str) -> str:
        if not module.startswith(self.removed):
            return module
        return self.added + module[len(self.removed) :]


def _extras(
    keys: Mapping[str, Key],
    tensors: Mapping[str, Stored],
    config: Mapping[str, Any],
    pairs: Mapping[str, object],
    moved: _moved,
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


class _Orientation:
    """Which linear modules store their weight as (in, out).

    PEFT has one flag for all. Ours is also a list of patterns (as in rank_pattern) for models with both, and files
    that we wrote say it in their metadata.
    """

    def __init__(self, config: Mapping[str, Any], metadata: Mapping[str, str], where: str) -> None:
        flag = config.get("fan_in_fan_out") or False
        try:
            self.patterns: dict[str, None] | None = dict.fromkeys(json.loads(metadata["mergekernels.fan_in_fan_out"]))
        except (KeyError, ValueError, TypeError):
            self.patterns = None
        if not isinstance(flag, bool):
            if not isinstance(flag, list) or not all(isinstance(p, str) for p in flag):
                raise InputError(
                    "field 'fan_in_fan_out' of the adapter's config is unusable",
                    code="adapter.config",
                    file=where,
                    expected="true, false or a list of patterns",
                    got=repr(flag),
                )
            self.patterns, flag = dict.fromkeys(flag), False
        self.flag = flag

    def kind(self, module: str, dims: int) -> Kind:
        """Kind of a module that is no embedding."""
        if dims > 2:
            return "conv"
        flipped = self.flag if self.patterns is None else matching(self.patterns, module) is not None
        return "fan_in_fan_out" if flipped else "linear"

    def check(self, modules: Mapping[str, Module], where: str) -> None:
        """Refuses square modules whose orientation nothing shows, where the base contradicts the flag elsewhere."""
        if self.patterns is not None:
            return
        said: Kind = "fan_in_fan_out" if self.flag else "linear"
        flat = [m.site for m in modules.values() if len(m.site.weight_shape) == 2 and m.site.kind != "embedding"]
        against = [s for s in flat if s.kind != said]
        square = [s for s in flat if s.weight_shape[0] == s.weight_shape[1]]
        if against and square:
            raise InputError(
                f"fan_in_fan_out = {str(self.flag).lower()} is wrong for module '{against[0].module}', so the "
                f"orientation of square modules is unknown: {_some([s.module for s in square])}",
                code="adapter.orientation",
                file=where,
                hint="Pass config={'fan_in_fan_out': [patterns of the modules stored as (in, out)]}",
            )


def _some(names: list[str]) -> str:
    shown = ", ".join(f"'{n}'" for n in names[:_LISTED])
    return shown + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
