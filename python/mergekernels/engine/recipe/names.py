"""What tensor names say: layer stack, embedding and head, optional buffers. Patterns, no table of architectures."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

__all__ = ["Stack", "find_head_and_embedding", "find_stack", "is_embedding_side", "is_optional_buffer", "is_vocabulary"]

_NUMBER = re.compile(r"(?:^|\.)(0|[1-9][0-9]{0,6})(?=\.|$)")
_EMBEDDING = re.compile(
    r"(?:^|\.)(?:embed_tokens|wte|word_embeddings|tok_embeddings|embed_in|shared|embeddings)\.weight$"
)
_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out)\.weight$|^output\.weight$")
_OPTIONAL = re.compile(r"(?:^|\.)(?:inv_freq|masked_bias|position_ids)$|\.(?:attn|attention)\.bias$")
_FIRST = ("wte", "wpe")


@dataclass(frozen=True)
class Stack:
    """A layer stack: names ``prefix + number + suffix...``; `suffix` is empty unless a pattern fixed it."""

    prefix: str
    suffix: str = ""

    @staticmethod
    def of_pattern(pattern: str) -> Stack:
        """The stack that ``model.layers.*`` names."""
        prefix, suffix = pattern.split("*")
        return Stack(prefix, suffix)

    def split(self, name: str) -> tuple[int, str] | None:
        """(layer, rest of the name) of a tensor of the stack, None for one outside."""
        if not name.startswith(self.prefix):
            return None
        match = re.compile(r"(0|[1-9][0-9]{0,6})(?=\.|$)").match(name, len(self.prefix))
        if match is None or not name.startswith(self.suffix, match.end()):
            return None
        return int(match.group(1)), name[match.end() :]

    def join(self, layer: int, rest: str) -> str:
        """The name of a tensor of the stack."""
        return f"{self.prefix}{layer}{rest}"

    def __str__(self) -> str:
        return f"{self.prefix}*{self.suffix}"


def find_stack(names: Iterable[str]) -> Stack | None:
    """The longest sequence ``*.N.*`` with N = 0, 1, 2, ... without a gap; None if there is none.

    Only the first number of a name counts, so that experts inside layers are no stack of their own. Of equally long
    sequences the one with more tensors wins, then the first in order of name.
    """
    numbers: dict[str, set[int]] = {}
    tensors: dict[str, int] = {}
    for name in names:
        match = _NUMBER.search(name)
        if match is not None:
            prefix = name[: match.start(1)]
            numbers.setdefault(prefix, set()).add(int(match.group(1)))
            tensors[prefix] = tensors.get(prefix, 0) + 1
    whole = [p for p, found in numbers.items() if len(found) == max(found) + 1]
    if not whole:
        return None
    return Stack(min(whole, key=lambda p: (-len(numbers[p]), -tensors[p], p)))


def find_head_and_embedding(names: Iterable[str]) -> tuple[str | None, str | None]:
    """(output head, input embedding), each only if exactly one name looks like it."""
    heads, embeddings = set(), set()
    for name in names:
        if _HEAD.search(name):
            heads.add(name)
        elif _EMBEDDING.search(name):
            embeddings.add(name)
    return heads.pop() if len(heads) == 1 else None, embeddings.pop() if len(embeddings) == 1 else None


def is_embedding_side(name: str) -> bool:
    """Whether a tensor outside the stack belongs before it (then the first slice decides) or after it."""
    if _HEAD.search(name):
        return False
    return any(part in _FIRST or ("embed" in part and "unembed" not in part) for part in name.split("."))


def is_vocabulary(name: str) -> bool:
    """Whether dimension 0 of the tensor counts tokens."""
    return bool(_HEAD.search(name) or _EMBEDDING.search(name))


def is_optional_buffer(name: str, shapes: Iterable[tuple[int, ...]]) -> bool:
    """Whether a tensor may be missing: rotary frequencies, position ids, causal masks stored as attention biases."""
    if not _OPTIONAL.search(name):
        return False
    return not name.endswith(".bias") or all(len(s) == 4 and s[:2] == (1, 1) for s in shapes)


def config_flag(config: Mapping[str, object], key: str) -> object:
    """A value of config.json, or of its text_config; None if neither has it."""
    if key in config:
        return config[key]
    text = config.get("text_config")
    return text.get(key) if isinstance(text, Mapping) else None
