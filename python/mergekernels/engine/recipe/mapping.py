"""Which tensor of which source makes which output tensor: by name, layer by layer, with tied heads resolved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...formats.checkpoint import Checkpoint
from .names import Stack, config_flag, find_head_and_embedding, is_embedding_side
from .slices import Slice

__all__ = ["Output", "Tying", "depth", "expand", "find_tying"]


@dataclass(frozen=True)
class Output:
    """One output tensor. tensors : its name in each source of `slice`, None where that source lacks it.

    t : position in the slice's gradients, None outside the stack.
    """

    name: str
    slice: Slice
    t: float | None
    tensors: tuple[str | None, ...]


@dataclass(frozen=True)
class Tying:
    """Output head and input embedding. tied : inputs whose head is their embedding. output : the merge's is too."""

    head: str
    embedding: str
    tied: frozenset[int]
    output: bool


def depth(checkpoint: Checkpoint, stack: Stack | None) -> tuple[int, list[int]]:
    """(number of layers, numbers missing below the highest) of a checkpoint."""
    if stack is None:
        return 0, []
    found = {split[0] for name in checkpoint.tensors if (split := stack.split(name)) is not None}
    top = max(found, default=-1) + 1
    return top, [n for n in range(min(top, 100_000)) if n not in found]


def find_tying(slices: Sequence[Slice], inputs: Sequence[Checkpoint], warnings: list[str]) -> Tying | None:
    """How embedding and head are tied in each input and in the output; None where no head is stored anywhere.

    An input ties them if its config says so, or if it has no head and a config that does not say. The output ties them
    if all its sources do.
    """
    used = list(dict.fromkeys(s.input for slice_ in (slices[0], slices[-1]) for s in slice_.sources))
    head, embedding = find_head_and_embedding(dict.fromkeys(name for i in used for name in inputs[i].tensors))
    if head is None or embedding is None:
        return None
    width = next(inputs[i].tensors[head].shape[1:] for i in used if head in inputs[i].tensors)
    tied: set[int] = set()
    for i in used:
        tensors = inputs[i].tensors
        if embedding not in tensors:
            continue
        flag = config_flag(inputs[i].config, "tie_word_embeddings")
        says_tied = flag is True
        if says_tied or (flag is None and head not in tensors and tensors[embedding].shape[1:] == width):
            tied.add(i)
        if head in tensors and says_tied:
            warnings.append(
                f"{inputs[i].label}: '{head}' is stored, but the config ties it to '{embedding}', which is used"
            )
    output = len(tied) == len(used)
    if not output:
        warnings += [f"{inputs[i].label}: '{embedding}' stands for '{head}'" for i in used if i in tied]
    if output and {s.input for s in slices[0].sources} != {s.input for s in slices[-1].sources}:
        warnings.append(f"'{head}' is tied to '{embedding}', which the first slice's models make")
    return Tying(head, embedding, frozenset(tied), output)


def expand(
    slices: Sequence[Slice], inputs: Sequence[Checkpoint], stack: Stack | None, tying: Tying | None
) -> list[Output]:
    """The output tensors: before the stack, its layers, after the stack."""
    layers: list[dict[int, list[str]]] = []
    outside: list[list[str]] = []
    for checkpoint in inputs:
        by_layer: dict[int, list[str]] = {}
        rest: list[str] = []
        for name in checkpoint.tensors:
            split = stack.split(name) if stack is not None else None
            if split is None:
                rest.append(name)
            else:
                by_layer.setdefault(split[0], []).append(split[1])
        layers.append(by_layer)
        outside.append(rest)
    outputs = _outside(slices[0], inputs, outside, tying, first=True)
    number = 0
    for slice_ in slices:
        for offset in range(slice_.length):
            assert stack is not None
            t = offset / (slice_.length - 1) if slice_.length > 1 else 1.0
            present = [set(layers[s.input].get(s.first + offset, ())) for s in slice_.sources]
            for rest_ in dict.fromkeys(r for s in slice_.sources for r in layers[s.input].get(s.first + offset, ())):
                names = tuple(
                    stack.join(s.first + offset, rest_) if rest_ in has else None
                    for s, has in zip(slice_.sources, present, strict=True)
                )
                outputs.append(Output(stack.join(number, rest_), slice_, t, names))
            number += 1
    return outputs + _outside(slices[-1], inputs, outside, tying, first=False)


def _outside(
    slice_: Slice, inputs: Sequence[Checkpoint], outside: list[list[str]], tying: Tying | None, *, first: bool
) -> list[Output]:
    """The tensors before (`first`) or after the stack, from the sources of `slice_`."""
    found: list[Output] = []
    for name in dict.fromkeys(n for s in slice_.sources for n in outside[s.input]):
        if is_embedding_side(name) != first:
            continue
        tensors: list[str | None] = []
        for s in slice_.sources:
            here: str | None = name if name in inputs[s.input].tensors else None
            if tying is not None and name == tying.head:
                if tying.output:
                    break
                if s.input in tying.tied:
                    here = tying.embedding
            tensors.append(here)
        else:
            found.append(Output(name, slice_, None, tuple(tensors)))
    return found
