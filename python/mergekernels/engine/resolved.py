"""A recipe after resolution against its inputs: numbers only, one entry per output tensor.

`engine.recipe` makes it (parameters, gradients, filters, slices, names are gone), `engine.plan` lays it out in files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .._methods.protocol import Method
from ..formats.checkpoint import Checkpoint
from ..tensors import DType

__all__ = ["AdapterOutput", "ResolvedMerge", "ResolvedTensor", "Source", "sources_of"]


@dataclass(frozen=True)
class Source:
    """One input tensor: position of its checkpoint in `ResolvedMerge.inputs`, and its name there."""

    input: int
    tensor: str


@dataclass(frozen=True)
class ResolvedTensor:
    """One output tensor.

    action "merge": `method` is applied to `models` (and `base`). action "buffer": an integer or bool tensor, equal in
    all sources and copied; where sources differ the base's value is taken with a warning, and without a base the unit
    aborts. action "copy": the single source's bytes.
    dtype : of the output. cast : load cast of models and base (None for none). params : recipe name -> value, per-model
    ones as tuples, complete with defaults and checked.
    companions : how many of `models`, the last ones, are not models but accompany them, one each.
    marks : packed masks of the models, bytes, see `ops.keep.Marked`; none or one per model.
    block : (number of its layer block, number of blocks of the output), None outside the layer stack.
    """

    name: str
    shape: tuple[int, ...]
    dtype: DType
    action: Literal["merge", "buffer", "copy"]
    models: tuple[Source, ...]
    base: Source | None = None
    cast: DType | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    companions: int = 0
    marks: tuple[Source, ...] = ()
    block: tuple[int, int] | None = None


def sources_of(tensor: ResolvedTensor) -> tuple[Source, ...]:
    """The models, then the base if there is one."""
    return tensor.models if tensor.base is None else (*tensor.models, tensor.base)


@dataclass(frozen=True)
class AdapterOutput:
    """The merged task vector as an adapter instead of a checkpoint.

    rank : most ranks per module. energy : or the least rank that holds this share of the sum of squares. None where the
    method decides. spread : where singular values go, "b", "sqrt" or "a". dtype : of the factors, a safetensors name.
    """

    rank: int | None = None
    energy: float | None = None
    spread: Literal["b", "sqrt", "a"] = "b"
    dtype: str = "F32"


@dataclass(frozen=True)
class ResolvedMerge:
    """Everything that determines the bytes of the output.

    then : names and parameters of the modifiers that follow the method. custom : the method itself, where it is none of
    the registered ones.
    output : None for a checkpoint; else `tensors` are the weights that may change, in the compute dtype.
    tensors : in order of name (UTF-8 bytes). donor : input whose config and other small files are copied.
    tokenizer : input whose tokenizer files are copied. config : fields of config.json to set.
    aliases : tied tensors, left out of the output (name -> name of the tensor that stands for it).
    recipe : the recipe as plain data, for the manifest. warnings : said by `plan` and `run`, never fatal.
    """

    method: str
    dialect: str
    nan: Literal["error", "propagate"]
    seed: int
    inputs: tuple[Checkpoint, ...]
    tensors: tuple[ResolvedTensor, ...]
    donor: int
    tokenizer: int
    chat_template: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    recipe_file: str = ""
    then: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    custom: Method | None = None
    output: AdapterOutput | None = None
    warnings: tuple[str, ...] = ()
