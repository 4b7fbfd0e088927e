"""Which layer block of a model a tensor belongs to, from the tensors' names."""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["number_blocks", "pattern_problem"]

# What architectures call their stack of blocks. The first in a name counts: what is numbered inside a block (the
# experts of a mixture, T5's `layer` inside `block`) is no block.
_STACK = re.compile(r"(?:^|\.)(?:layers|layer|blocks|block|resblocks|h)\.(\d+)\.")


def pattern_problem(pattern: str) -> str | None:
    """Why a pattern cannot number blocks, None if it can."""
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        return f"a regular expression; got {pattern!r} ({error})"
    return None if groups == 1 else f"one group that captures the number of the block; got {groups} in {pattern!r}"


def number_blocks(names: Iterable[str], pattern: str | None = None) -> dict[str, tuple[int, int]]:
    """For every name inside a block, (number of the block, number of blocks); blocks count from 0.

    Without a pattern a block is what follows the first of `layers`, `layer`, `blocks`, `block`, `resblocks` or `h` with
    a number, as in `model.layers.7.mlp.up_proj.weight`. Of several such stacks the one with the most blocks counts;
    equally long ones (an encoder and a decoder) count each by itself.

    pattern : a regular expression that is searched in the names; its one group captures the number.
    """
    expression = _STACK if pattern is None else re.compile(pattern)
    stacks: dict[str, dict[str, int]] = {}
    for name in names:
        match = expression.search(name)
        if match is not None and match.group(1) is not None and match.group(1).isdecimal():
            stack = name[: match.start(1)] if pattern is None else ""
            stacks.setdefault(stack, {})[name] = int(match.group(1))
    longest = max((max(found.values()) + 1 for found in stacks.values()), default=0)
    return {
        name: (number, longest)
        for found in stacks.values()
        if max(found.values()) + 1 == longest
        for name, number in found.items()
    }
