"""Adapter files without a config: which tensors are down and up halves of a module, and which are its alpha.

The spellings, oldest last::

    M.lora_down.weight          M.lora_up.weight            kohya, webui, ComfyUI
    M.lora_A.weight             M.lora_B.weight             diffusers since PEFT; also M.lora_A.NAME.weight
    M.lora.down.weight          M.lora.up.weight            diffusers
    M.lora_linear_layer.down.weight                         diffusers, text encoders
    M.processor.to_q_lora.down.weight                       diffusers, attention processors of module M
    M.alpha                                                 a number
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ...errors import InputError, MergeError
from .factors import Pair
from .stored import Stored

__all__ = ["Halves", "Named", "split"]

_HALF = re.compile(
    r"(?P<module>.+?)(?:"
    r"\.lora_(?P<kohya>down|up)\.weight"
    r"|\.lora_(?P<peft>A|B)(?:\.[^.]+)?\.weight"
    r"|\.(?:lora|lora_linear_layer)\.(?P<plain>down|up)\.weight"
    r"|\.processor\.(?P<target>to_q|to_k|to_v|to_out)_lora\.(?P<processor>down|up)\.weight"
    r")"
)
_ALPHA = re.compile(r"(?P<module>.+?)(?:\.lora|\.lora_linear_layer)?\.alpha")
_VARIANTS = {
    "dora_scale": "DoRA is not linear in its factors",
    "lora_magnitude_vector": "DoRA is not linear in its factors",
    "lora_mid": "a third factor between down and up (Tucker form) is not handled",
    "hada": "LoHa is not a product of two factors",
    "lokr": "LoKr is not a product of two factors",
    "oft": "OFT is not a product of two factors",
    "ia3": "IA3 is not a product of two factors",
    "diff": "full deltas beside factors are not handled",
    "bias": "its B has a bias, which no weight can hold",
    "set_weight": "full weights beside factors are not handled",
    "norm": "deltas of norms beside factors are not handled",
}
_VARIANT = re.compile(
    r"\.(?:(?P<dora_scale>dora_scale)|(?P<lora_magnitude_vector>lora_magnitude_vector)|(?P<lora_mid>lora_mid)"
    r"|(?P<hada>hada_)|(?P<lokr>lokr_)|(?P<oft>oft_|oft\b)|(?P<ia3>ia3_)|(?P<diff>diff(?:_b)?$)"
    r"|(?P<bias>(?:lora_(?:up|down|A|B)|lora)\.bias$|bias_(?:indices|values|size)$)|(?P<set_weight>set_weight$)"
    r"|(?P<norm>[wb]_norm$))"
)


@dataclass(frozen=True)
class Named:
    """A module of the file. stem : its name as written there. module : path, where the spelling says more."""

    stem: str
    module: str
    pair: Pair
    alpha: Stored | None


@dataclass(frozen=True)
class Halves:
    """What the names of a file say. kohya : whether its halves are called lora_down and lora_up."""

    modules: dict[str, Named]
    kohya: bool


def split(tensors: Mapping[str, Stored], where: str) -> tuple[Halves, list[MergeError]]:
    """Pairs and alphas of all modules, and what is wrong with the names.

    Parameters
    ----------
    where : the file or adapter that errors name.
    """
    downs: dict[tuple[str, str], dict[str, Stored]] = {}
    alphas: dict[str, Stored] = {}
    problems: list[MergeError] = []
    kohya = False
    for name, tensor in tensors.items():
        if found := _HALF.fullmatch(name):
            half = found["kohya"] or found["peft"] or found["plain"] or found["processor"]
            kohya = kohya or found["kohya"] is not None
            stem = found["module"]
            module = f"{stem}.{found['target']}" if found["target"] else stem
            # Diffusers' attention has its output layer first in a list of two.
            module = f"{module}.0" if found["target"] == "to_out" else module
            both = downs.setdefault((module, stem), {})
            side = "A" if half in ("A", "down") else "B"
            if side in both:
                message = f"two tensors for one factor: the other is '{both[side].name}'"
                problems.append(InputError(message, code="adapter.doubled", file=where, tensor=name))
            both[side] = tensor
        elif variant := _VARIANT.search(name):
            why = _VARIANTS[str(variant.lastgroup)]
            message = f"tensor of a variant of LoRA is refused: {why}"
            problems.append(InputError(message, code="adapter.refused", file=where, tensor=name))
        elif found := _ALPHA.fullmatch(name):
            alphas[found["module"]] = tensor
        else:
            message = "neither a LoRA factor nor an alpha"
            problems.append(InputError(message, code="adapter.unexpected", file=where, tensor=name))
    modules: dict[str, Named] = {}
    for (module, stem), both in downs.items():
        if len(both) == 1:
            half, alone = next(iter(both.items()))
            message = f"factor {half} of module '{module}' has no partner"
            expected = "also up (B)" if half == "A" else "also down (A)"
            problems.append(InputError(message, code="adapter.half", file=where, tensor=alone.name, expected=expected))
        elif module in modules:
            message = f"module '{module}' is there in two spellings"
            problems.append(InputError(message, code="adapter.doubled", file=where, tensor=both["A"].name))
        else:
            modules[module] = Named(stem, module, Pair(both["B"], both["A"]), alphas.pop(module, None))
    for module, tensor in alphas.items():
        message = f"alpha of module '{module}', which has no factors"
        problems.append(InputError(message, code="adapter.unexpected", file=where, tensor=tensor.name))
    return Halves(modules, kohya), problems
