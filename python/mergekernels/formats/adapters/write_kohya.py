"""Writing an adapter as one file in kohya's spelling, which webui, ComfyUI and sd-scripts read."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...adapters.model import Adapter, Factors, Site
from ...errors import ArgumentError
from ...tensors import F32, DType, dtype_of
from .factors import Pair
from .folder import Planned, write_file, write_tensors
from .mangled import is_mangled
from .named import component
from .write_peft import check_factors, metadata_strings

if TYPE_CHECKING:
    import torch

__all__ = ["kohya_names", "write_kohya"]

_PIPELINE = re.compile(r"(?:transformer|prior)\w*\.(?:\w*transformer_blocks|down_blocks|mid_block|up_blocks)\.")


def write_kohya(
    file: str | PathLike[str],
    modules: Mapping[Site, Factors],
    *,
    names: Mapping[str, str] | None = None,
    prefix: str = "lora_unet",
    base_name: str = "",
    dtype: str = "F32",
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes lora_down, lora_up and alpha (= rank, scale 1) of each module; the file appears complete or not at all.

    Parameters
    ----------
    file : must not be there unless `overwrite`.
    modules : site -> factors, every scale inside b; linear layers and convolutions, ranks may differ, none may be 0.
    names : module path -> its name in the file, as `kohya_names` takes them from an input. Other modules keep a name
        that is in kohya's spelling already; "unet.", "text_encoder." and other components of diffusers become
        "lora_unet_", "lora_te_" ("lora_te1_" beside "lora_te2_"); the rest get `prefix`, "_" and their path with
        underscores.
    base_name : version of the base as kohya's scripts name it ("sdxl_base_v1-0"), "" for none.
    dtype : of the factors in the file, "F32", "BF16", "F16" or "F64" (or torch's name); alphas are float32.
    metadata : provenance for the safetensors metadata, as for `write_peft`.

    Raises
    ------
    ArgumentError : no modules, rank 0, factors that do not fit their site, embeddings or transposed weights, two
        modules with one name, an unknown dtype.
    OutputError : the file is taken, or writing failed.
    """
    stored = dtype_of(dtype)
    if stored is None or not stored.is_float:
        raise ArgumentError("unknown dtype", code="adapter.dtype", expected="F32, BF16, F16 or F64", got=repr(dtype))
    check_factors(modules)
    tensors = _keys(modules, names or {}, prefix, stored)
    ranks = {f.rank for f in modules.values()}
    dim = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
    strings = {
        **metadata_strings(metadata or {}),
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": dim,
        "ss_network_alpha": dim,
    }
    if base_name:
        strings["ss_base_model_version"] = base_name
    write_file(Path(file), lambda path: write_tensors(path, tensors, strings), overwrite=overwrite)


def kohya_names(adapter: Adapter) -> dict[str, str]:
    """Module path -> its name in the file, of an adapter read from a kohya file."""
    names: dict[str, str] = {}
    for path, module in adapter.modules.items():
        if isinstance(module.load, Pair) and module.load.a.name.endswith(".lora_down.weight"):
            names[path] = module.load.a.name.removesuffix(".lora_down.weight")
    return names


def _keys(modules: Mapping[Site, Factors], names: Mapping[str, str], prefix: str, dtype: DType) -> dict[str, Planned]:
    tensors: dict[str, Planned] = {}
    owners: dict[str, str] = {}
    parts = {component(site.module) for site in modules}
    for site, factors in modules.items():
        if site.kind not in ("linear", "conv"):
            raise ArgumentError(
                f"a kohya file cannot hold a module of kind {site.kind}",
                code="adapter.kind",
                tensor=site.module,
                hint="Write a PEFT folder",
            )
        name = names.get(site.module) or _mangled(site.module, prefix, parts)
        other = owners.setdefault(name, site.module)
        if other != site.module:
            message = f"two modules would be called '{name}' in the file; the other is '{other}'"
            raise ArgumentError(message, code="adapter.ambiguous", tensor=site.module, hint="Give them `names`")
        rank, kernel = factors.rank, site.weight_shape[2:]
        ones = tuple(1 for _ in kernel)
        tensors[f"{name}.lora_down.weight"] = dtype, (rank, site.weight_shape[1], *kernel), _give(factors.a)
        tensors[f"{name}.lora_up.weight"] = dtype, (site.weight_shape[0], rank, *ones), _give(factors.b)
        tensors[f"{name}.alpha"] = F32, (), _number(rank)
    return tensors


def _mangled(module: str, prefix: str, parts: Collection[str]) -> str:
    """The name of a module that has none yet. parts : components that the modules of the file belong to."""
    if is_mangled(module):
        return module
    part = component(module)
    if not part or (part in ("transformer", "prior") and not _PIPELINE.match(module)):
        return f"{prefix}_{module.replace('.', '_')}"  # of one model, whose first module may be called "transformer"
    first = {"unet": "unet", "diffusion_model": "unet"}.get(part, part.replace("text_encoder", "te").replace("_", ""))
    first = "te1" if first == "te" and any(other.startswith("text_encoder_") for other in parts) else first
    return f"lora_{first}_{module.removeprefix(f'{part}.').replace('.', '_')}"


def _give(tensor: torch.Tensor) -> Any:
    return lambda: tensor


def _number(value: int) -> Any:
    def make() -> torch.Tensor:
        import torch

        return torch.tensor(float(value))

    return make
