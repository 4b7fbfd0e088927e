"""Writing an adapter as a PEFT folder."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...adapters.model import Factors, Site
from ...errors import ArgumentError
from ...tensors import DType, dtype_of
from .config import CONFIG, matching
from .folder import Planned, write_folder, write_tensors
from .sites import Base, base_shapes
from .stored import Stored

if TYPE_CHECKING:
    import torch

__all__ = ["adapter_config", "check_factors", "metadata_strings", "peft_keys", "rank_patterns", "write_peft"]

WEIGHTS = "adapter_model.safetensors"
_KEPT = ("task_type", "auto_mapping", "revision")


def write_peft(
    folder: str | PathLike[str],
    modules: Mapping[Site, Factors],
    *,
    base_name: str = "",
    dtype: str = "F32",
    metadata: Mapping[str, Any] | None = None,
    extras: Mapping[str, Callable[[], torch.Tensor]] | None = None,
    config: Mapping[str, Any] | None = None,
    base: Base | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes adapter_config.json and adapter_model.safetensors; the folder appears complete or not at all.

    Parameters
    ----------
    folder : must not be there, or be empty, unless `overwrite`.
    modules : site -> factors in its orientation, every scale inside b; ranks may differ, none may be 0.
    base_name : name of the base model as loaders look it up, "" for none.
    dtype : of the factors in the file, "F32", "BF16", "F16" or "F64" (or torch's name).
    metadata : provenance for the safetensors metadata: name -> text, or anything that JSON holds. "format" is ours.
    extras : full tensors that replace the base's (modules_to_save), name in the base -> loader; kept in their dtype.
    config : fields to take over where the inputs agree: task_type, auto_mapping, revision.
    base : the base model, if it is at hand: PEFT takes a module for a target whose path ends in a target's, and
        exclude_modules then names those that this adapter lacks. Without it PEFT may add factors of zeros there.

    Returns
    -------
    The config as written.

    Raises
    ------
    ArgumentError : no modules, rank 0, factors that do not fit their site, an unknown dtype.
    OutputError : the folder is taken, or writing failed.
    """
    stored = dtype_of(dtype)
    if stored is None or not stored.is_float:
        raise ArgumentError("unknown dtype", code="adapter.dtype", expected="F32, BF16, F16 or F64", got=repr(dtype))
    check_factors(modules)
    replaced = dict(extras or {})
    fields = adapter_config(modules, base_name=base_name, extras=replaced, config=config, shapes=base_shapes(base))
    tensors = peft_keys(modules, stored, replaced)
    strings = {**metadata_strings(metadata or {}), **_orientation(modules), "format": "pt"}
    text = json.dumps(fields, indent=2, sort_keys=False, ensure_ascii=False) + "\n"
    parts = [
        (WEIGHTS, lambda path: write_tensors(path, tensors, strings)),
        (CONFIG, lambda path: _write_text(path, text)),
    ]
    write_folder(Path(folder), parts, overwrite=overwrite)
    return fields


def check_factors(modules: Mapping[Site, Factors]) -> None:
    """Refuses what no adapter file can hold.

    Raises
    ------
    ArgumentError : no modules; rank 0; a product whose shape is not the site's; one module twice.
    """
    if not modules:
        raise ArgumentError("an adapter needs at least one module", code="adapter.empty")
    seen: set[str] = set()
    for site, factors in modules.items():
        if site.module in seen:
            raise ArgumentError("module given twice", code="adapter.doubled", tensor=site.module)
        seen.add(site.module)
        if factors.rank < 1 or int(factors.a.shape[0]) != factors.rank:
            raise ArgumentError(
                "factors need one rank, 1 or more",
                code="adapter.rank",
                tensor=site.module,
                got=f"b {list(factors.b.shape)}, a {list(factors.a.shape)}",
                hint="Write a zero delta as rank 1 of zeros",
            )
        if factors.shape != site.shape:
            raise ArgumentError(
                "factors do not have the shape of their site",
                code="adapter.shape",
                tensor=site.module,
                expected=str(list(site.shape)),
                got=str(list(factors.shape)),
            )


def adapter_config(
    modules: Mapping[Site, Factors],
    *,
    base_name: str = "",
    extras: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    shapes: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The fields of adapter_config.json: scale 1 everywhere, so lora_alpha = r; patterns where ranks differ.

    shapes : by tensor name, of the base.
    """
    ranks = {site.module: factors.rank for site, factors in modules.items()}
    common = Counter(ranks.values()).most_common()
    # Most frequent, the smaller on a tie: the file does not depend on the order of the modules.
    rank = min(r for r, count in common if count == common[0][1])
    patterns = rank_patterns(ranks, rank)
    adapted = {site.weight for site in modules}
    saved = sorted({name.rpartition(".")[0] for name in extras or {} if name not in adapted})
    _check_saved(saved, ranks)
    flipped = any(site.kind == "fan_in_fan_out" for site in modules)
    given = config or {}
    beyond = _beyond(ranks, shapes or {})
    return {
        "peft_type": "LORA",
        **{field: given.get(field) for field in _KEPT},
        "base_model_name_or_path": base_name or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": sorted(ranks),
        **({"exclude_modules": beyond} if beyond else {}),
        "modules_to_save": saved or None,
        "rank_pattern": patterns,
        "alpha_pattern": dict(patterns),
        "fan_in_fan_out": flipped,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def _check_saved(saved: Collection[str], targets: Mapping[str, int]) -> None:
    """Refuses full tensors of a module that PEFT's rule would take for one of the targets, or for what holds one."""
    for module in saved:
        rule = re.compile(rf"(^|.*\.){module}($|\..*)")
        for target in targets:
            if rule.match(target):
                raise ArgumentError(
                    f"PEFT would not adapt '{target}' beside a full copy of '{module}' (modules_to_save)",
                    code="adapter.modules-to-save",
                    tensor=target,
                    hint="Leave one of them out",
                )


def _beyond(targets: Mapping[str, int], shapes: Mapping[str, Any]) -> list[str] | str | None:
    """exclude_modules for the base's modules whose paths end in a target's, but are no targets; None if there is none.

    Exclusion also works on the end of a path: where it would hit a target, an expression says everything else.
    """
    modules = {name.removesuffix(".weight") for name in shapes if name.endswith(".weight")}
    beyond = sorted(m for m in modules - set(targets) if _ends_in(m, targets))
    hit = set(beyond)
    if not any(_ends_in(target, hit) for target in targets):
        return beyond or None
    return f"(?!(?:{'|'.join(map(re.escape, sorted(targets)))})$).*"


def _ends_in(path: str, ends: Collection[str]) -> bool:
    """Whether the path, or what follows one of its dots, is among `ends` (a set or a mapping, for speed)."""
    while path not in ends:
        _, dot, path = path.partition(".")
        if not dot:
            return False
    return True


def rank_patterns(ranks: Mapping[str, int], default: int) -> dict[str, int]:
    """Pattern -> rank, such that PEFT's rule gives every module its own.

    Plain paths, which older releases of PEFT look up as they are. A path is also a pattern for paths that end in it,
    so longer ones come first, and modules with the default rank get a pattern where another's would match them.
    """
    order = sorted(ranks, key=lambda m: (-len(m), m))
    needed = {m for m in ranks if ranks[m] != default}
    while True:
        patterns = {(m if re.fullmatch(r"[\w.-]+", m) else re.escape(m)): ranks[m] for m in order if m in needed}
        wrong = {m for m in ranks if (p := matching(patterns, m)) is not None and patterns[p] != ranks[m]} - needed
        if not wrong:
            return patterns
        needed |= wrong


def peft_keys(
    modules: Mapping[Site, Factors], dtype: DType, extras: Mapping[str, Callable[[], torch.Tensor]]
) -> dict[str, Planned]:
    """Key in the file -> what is stored under it."""
    tensors: dict[str, Planned] = {}
    for site, factors in modules.items():
        rank, path = factors.rank, f"base_model.model.{site.module}"
        a, b = tuple(factors.a.shape), tuple(factors.b.shape)
        names = (f"{path}.lora_A.weight", f"{path}.lora_B.weight")
        if site.kind == "embedding":
            names = (f"{path}.lora_embedding_A", f"{path}.lora_embedding_B")
        elif site.kind == "conv":
            a = (rank, *site.weight_shape[1:])
            b = (b[0], rank, *(1 for _ in site.weight_shape[2:]))
        tensors[names[0]] = dtype, a, _give(factors.a)
        tensors[names[1]] = dtype, b, _give(factors.b)
    adapted = {site.weight: site.module for site in modules}
    for name, load in extras.items():
        # Anything but a stored tensor has to be loaded to know its shape.
        values = load if isinstance(load, Stored) else load()
        own = dtype_of(str(values.dtype).removeprefix("torch."))
        if own is None:
            raise ArgumentError("unknown dtype", code="adapter.dtype", tensor=name, got=str(values.dtype))
        key = f"base_model.model.{adapted[name]}.base_layer.weight" if name in adapted else f"base_model.model.{name}"
        tensors[key] = own, tuple(values.shape), load
    return tensors


def _give(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: tensor


def metadata_strings(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Provenance as the strings that safetensors metadata holds: "mergekernels.<name>", JSON where it is no text."""
    return {
        f"mergekernels.{name}": value if isinstance(value, str) else json.dumps(value, sort_keys=True)
        for name, value in metadata.items()
    }


def _orientation(modules: Mapping[Site, Factors]) -> dict[str, str]:
    """Which modules are stored as (in, out), where the config's one flag cannot say it."""
    flipped = sorted(s.module for s in modules if s.kind == "fan_in_fan_out")
    if not flipped or all(s.kind != "linear" for s in modules):
        return {}
    return {"mergekernels.fan_in_fan_out": json.dumps([f"^{re.escape(m)}" for m in flipped])}


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
