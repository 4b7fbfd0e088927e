"""Which kind of file an adapter's tensors come from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from .mangled import is_mangled
from .named import METADATA, component

__all__ = ["Form", "detect"]

Form = Literal["peft", "named"]
_DIFFUSERS_FILE = "pytorch_lora_weights"
_HALF = re.compile(r"\.lora_(?:down|up)\.|\.lora\.(?:down|up)\.|\.lora_linear_layer\.|_lora\.(?:down|up)\.")


def detect(names: Iterable[str], config: Mapping[str, Any], metadata: Mapping[str, str], file: str = "") -> Form:
    """Returns "peft" for tensors that an adapter_config.json belongs to, "named" for files whose names say everything.

    Parameters
    ----------
    names : of the tensors. config : of a config beside them, {} if there is none. metadata, file : of the file.
    """
    listed = list(names)
    if config and listed and listed[0].startswith("base_model.model."):
        return "peft"
    if any(_HALF.search(n) or is_mangled(n.split(".")[0]) for n in listed):
        return "named"
    if METADATA in metadata or (not config and file.startswith(_DIFFUSERS_FILE)):
        return "named"
    if config or not listed:
        return "peft"
    # Without a config, names that begin with a pipeline's component are diffusers'. In memory "transformer." may also
    # be the first module of a language model, where alpha = rank would be a guess.
    parts = {component(n) for n in listed}
    return "named" if "" not in parts and (file or not any(p.startswith("transformer") for p in parts)) else "peft"
