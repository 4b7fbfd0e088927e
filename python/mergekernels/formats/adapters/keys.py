"""The spellings of a tensor's name in a PEFT adapter: in a file, in a model's memory, in a sharded checkpoint.

All of these are part A of module `model.q_proj`::

    base_model.model.model.q_proj.lora_A.weight                          on disk
    base_model.model.model.q_proj.lora_A.default.weight                  in memory, adapter "default"
    model_state.model.base_model.model.model.q_proj.lora_A.weight        distributed checkpoint
    model.q_proj.lora_A.weight                                           without the wrapper
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

__all__ = ["Key", "parse_key"]

# Wrappers around the whole model; each may be there or not. A base may have a module that is called "module".
_OUTER = re.compile(r"(?:model_state\.model\.|model_state\.)?(?:(?:module\.)?base_model\.model\.)?")
# Wrappers around any module.
_INNER = re.compile(r"(?:^|(?<=\.))(?:_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module)\.")
_LORA = re.compile(
    r"(?P<module>.+?)\.lora_(?P<part>A|B)(?:\.(?P<adapter>[^.]+))?\.(?P<leaf>weight|bias)"
    r"|(?P<emodule>.+?)\.lora_embedding_(?P<epart>A|B)(?:\.(?P<eadapter>[^.]+))?"
)
_SAVED = re.compile(r"(?P<module>.+)\.modules_to_save\.(?P<adapter>[^.]+)\.(?P<leaf>.+)")
_BASE_LAYER = re.compile(r"(?P<module>.+)\.base_layer\.(?P<leaf>[^.]+)")
# Parts of variants and of other methods, by the piece of the name that only they have.
_FOREIGN = re.compile(
    r"\.(?P<what>lora_magnitude_vector|lora_E|ranknum|lora_[A-Za-z]\w*|ia3_\w+|hada_\w+|lokr_\w+|oft_\w+"
    r"|boft_\w+|vera_\w+|vblora_\w+|hra_\w+|fourierft_\w+|poly_\w+|ln_tuning_\w+|token_adapter|trainable_tokens_\w+"
    r"|randlora_\w+|bone_\w+|miss_\w+|shira_\w+|c3a_\w+|road_\w+|waveft_\w+|osf_\w+|delora_\w+)(?:\.|$)"
)


@dataclass(frozen=True, slots=True)
class Key:
    """What a name says.

    module : dotted path without wrappers; for kind "saved" the tensor's name in the base without its last part.
    kind : "A", "B" (of linear or convolution), "embedding_A", "embedding_B", "bias" (of lora_B), "saved" (a full
    tensor that replaces the base's), "base_layer" (the base's own tensor under an adapted module), "alpha", "foreign"
    (belongs to another method or variant) or "other". leaf : last part of the name, for "foreign" the telling part.
    adapter : its name where the spelling has one, else "".
    """

    module: str
    kind: str
    leaf: str
    adapter: str = ""


# The adapters of one base have the same names.
@lru_cache(maxsize=1 << 16)
def parse_key(name: str) -> Key:
    """Reads one tensor name in any of the spellings."""
    path = _INNER.sub("", name)
    path = _OUTER.sub("", path, count=1)
    if found := _LORA.fullmatch(path):
        if found["emodule"] is not None:
            return Key(found["emodule"], f"embedding_{found['epart']}", "weight", found["eadapter"] or "")
        kind = found["part"] if found["leaf"] == "weight" else "bias"
        return Key(found["module"], kind, found["leaf"], found["adapter"] or "")
    if found := _SAVED.fullmatch(path):
        return Key(found["module"], "saved", found["leaf"], found["adapter"])
    if found := _BASE_LAYER.fullmatch(path):
        return Key(found["module"], "base_layer", found["leaf"])
    if found := _FOREIGN.search(path):
        return Key(path[: found.start()], "foreign", found["what"])
    module, _, leaf = path.rpartition(".")
    return Key(module, "alpha" if leaf == "alpha" else "other", leaf)
