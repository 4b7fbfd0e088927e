"""kohya, webui and diffusers files: everything is in one safetensors file, whose names say the modules.

`alpha` is a tensor beside the factors (kohya), or is in the metadata (diffusers); where it is in neither, alpha = rank.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from ...adapters.model import Adapter, Module
from ...errors import FormatError, InputError, MergeError
from .config import Scaling, scaling_of
from .factors import build_module, check_pair, locate, raise_all
from .halves import Named, split
from .mangled import component_of, is_mangled, resolve
from .refused import refuse
from .sites import common_prefix
from .stored import Source, Stored

__all__ = ["METADATA", "build_named", "component"]

METADATA = "lora_adapter_metadata"
_COMPONENT = re.compile(r"(?P<component>(?:unet|prior|transformer|text_encoder)(?:_[0-9])?|diffusion_model)\.")
_ALPHA_AGREES = 1e-6


def component(module: str) -> str:
    """The part of a pipeline that a module's name in the file begins with ("unet", "te1", "text_encoder"), or ""."""
    if is_mangled(module):
        return component_of(module)
    found = _COMPONENT.match(module)
    return found["component"] if found else ""


def build_named(
    tensors: Mapping[str, Stored],
    source: Source,
    *,
    shapes: Mapping[str, tuple[int, ...]] | None,
    config: Mapping[str, Any],
    name: str = "",
    metadata: Mapping[str, str],
    form: str = "",
    path: str = "",
) -> Adapter:
    """An adapter from the tensors of one file.

    With a base, modules are those of the base; without one they keep their names in the file, component included
    ("lora_unet_down_blocks_0_...", "unet.down_blocks.0....").

    Parameters
    ----------
    shapes : of the base, by tensor name. config : fields that the caller adds to those of the metadata.
    name : a component ("unet", "te1", "text_encoder"), whose prefix then goes from diffusers' names; "" for all.
    metadata : of the file. form, path : for the adapter's description; form "" for what the names show.

    Raises
    ------
    InputError, PlanError : refused variants, factors without partner, names that are no module of the base, or several.
    """
    where = source.path or source.label
    halves, problems = split(tensors, where)
    raise_all(problems)
    found = halves.modules
    parts = sorted({component(m) for m in found} - {""})
    if name:
        found = {m: n for m, n in found.items() if component(m) == name}
        if not found:
            raise InputError(f"no component '{name}'", code="adapter.name", file=where, expected=f"one of {parts}")
    if not found:
        raise InputError(
            "no LoRA factors found",
            code="adapter.empty",
            file=where,
            expected="tensors such as <module>.lora_down.weight or <module>.lora_A.weight",
            got="an empty file",
        )
    scalings = _scalings(metadata, config, {component(m) for m in found if not is_mangled(m)}, where)
    places, notes, problems = _places(found, shapes, bool(name), parts, where)
    raise_all(problems)
    modules: dict[str, Module] = {}
    for stored_as, module in sorted(places.items(), key=lambda item: item[1]):
        try:
            if module in modules:
                message = f"two modules of the file are module '{module}' of the base"
                raise InputError(message, code="adapter.ambiguous", file=where, tensor=stored_as)
            pair = found[stored_as].pair
            check_pair(module, pair, "linear", where)
            scale = _scale(found[stored_as], scalings.get(component(stored_as)), where)
            modules[module] = build_module(module, "linear", pair, scale, locate(module, shapes, where), where)
        except MergeError as error:
            problems.append(error)
    raise_all(problems)
    return Adapter(
        label=source.label,
        modules=modules,
        base=_base_name(metadata, config),
        config={**metadata, **config},
        form=form or ("kohya" if halves.kohya else "diffusers"),
        path=path,
        notes=tuple(notes),
        digest=source.sha256,
    )


def _base_name(metadata: Mapping[str, str], config: Mapping[str, Any]) -> str:
    """The version of the base that kohya's scripts write; file names of bases differ from user to user."""
    return str(config.get("base_model_name_or_path") or metadata.get("ss_base_model_version") or "")


def _scalings(
    metadata: Mapping[str, str], config: Mapping[str, Any], components: set[str], where: str
) -> dict[str, Scaling]:
    """Component -> what diffusers' metadata says of it: a LoraConfig whose fields begin with the component's name."""
    fields: dict[str, Any] = {}
    if METADATA in metadata:
        try:
            fields = json.loads(metadata[METADATA])
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{METADATA} is not valid JSON: {error}", code="adapter.config", file=where) from None
        if not isinstance(fields, dict):
            raise FormatError(f"{METADATA} is not a JSON object", code="adapter.config", file=where)
    scalings: dict[str, Scaling] = {}
    for part in components:
        own = {k.removeprefix(f"{part}."): v for k, v in fields.items() if part and k.startswith(f"{part}.")}
        # A file of one model has no components in its metadata.
        own = {**(own or {k: v for k, v in fields.items() if "." not in k}), **config}
        if own:
            refuse(own, where)
            scalings[part] = scaling_of(own, where, alpha_needed=False)
    return scalings


def _scale(named: Named, scaling: Scaling | None, where: str) -> tuple[float, float]:
    """(alpha, scale) of a module: its alpha tensor, else the metadata, else alpha = rank."""
    rank = named.pair.a.shape[0]
    said = None
    if scaling is not None:
        part = component(named.module)
        alpha, scale, wanted = scaling.of(named.module.removeprefix(f"{part}.") if part else named.module, rank)
        if wanted is not None and wanted != rank:
            raise InputError(
                f"rank of module '{named.module}' is not the one of the metadata",
                code="adapter.rank",
                file=where,
                tensor=named.pair.a.name,
                expected=f"rank {wanted}",
                got=f"shape {list(named.pair.a.shape)}",
            )
        said = alpha, scale
    if named.alpha is None:
        return said or (float(rank), 1.0)
    alpha = named.alpha.number()
    if said is not None and scaling is not None and scaling.alpha is not None and _differ(alpha / rank, said[1]):
        raise InputError(
            f"module '{named.module}' has an alpha that is not the one of the metadata",
            code="adapter.alpha",
            file=where,
            tensor=named.alpha.name,
            expected=f"scale {said[1]}",
            got=f"alpha {alpha}, scale {alpha / rank}",
        )
    if not abs(alpha) < float("inf"):
        message = f"alpha of module '{named.module}' is not finite"
        raise InputError(message, code="adapter.alpha", file=where, tensor=named.alpha.name, got=str(alpha))
    return alpha, alpha / rank


def _differ(one: float, two: float) -> bool:
    return abs(one - two) > _ALPHA_AGREES * max(abs(one), abs(two))


def _places(
    found: Mapping[str, Named],
    shapes: Mapping[str, tuple[int, ...]] | None,
    strip: bool,
    parts: list[str],
    where: str,
) -> tuple[dict[str, str], list[str], list[MergeError]]:
    """Name in the file -> module path, notes, problems."""
    mangled = [m for m in found if is_mangled(m)]
    dotted = [m for m in found if not is_mangled(m)]
    if shapes is None:
        plain = {m: m.removeprefix(f"{component(m)}.") if strip else m for m in dotted}
        return {**{m: m for m in mangled}, **plain}, [], []
    places, problems = resolve(mangled, shapes, where)
    notes: list[str] = []
    for part in sorted({component(m) for m in dotted}):
        names = [m for m in dotted if component(m) == part]
        change = common_prefix(names, shapes)
        if change is None:
            message = f"the modules of '{part}' are not in the base, '{names[0]}' for example"
            hint = f"`name` takes one component of the file: {', '.join(parts)}" if len(parts) > 1 else None
            error = InputError(message, code="adapter.target-missing", file=where, tensor=names[0], hint=hint)
            problems.append(error)
            continue
        removed, added = change
        if removed or added:
            notes.append(f"{where}: module paths begin with '{removed}' where the base has '{added}'")
        places |= {m: added + m.removeprefix(removed) for m in names}
    return places, notes, problems
