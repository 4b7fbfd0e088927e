"""The checks of single values in a recipe, and the keys that are refused by name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ...errors import cut, nearest
from ...tensors import FLOAT_DTYPES
from ..resolved import AdapterOutput

__all__ = [
    "A_WRONG_VALUE",
    "PLANNED",
    "Loc",
    "Reference",
    "Wrong",
    "dtype",
    "layer_range",
    "layers",
    "mapping",
    "nan",
    "nearest",
    "output",
    "reference",
    "seed",
    "string",
]

Loc = tuple[str | int, ...]

PLANNED = {
    "tokenizer": "building a vocabulary (`tokenizer:`) is planned with row-wise gathers of embeddings; "
    "use tokenizer_source: base or a model, which copies that tokenizer",
    "modules": "recipes for models of several modules are planned; use models: or slices: for the whole checkpoint",
    "residual_weight": "mergekit reads residual_weight and never uses it; remove it",
    "name": "named results of recipes with several documents are planned; run one recipe per document",
    "override_architecture": "there is no table of architectures here; remove it",
}
"""Keys of the language that this version refuses by name."""


@dataclass(frozen=True)
class Reference:
    """A model as a recipe names it, with the adapter on it if there is one.

    exact : `path` came as a mapping, and `@` and `+` in it mean nothing.
    """

    path: str
    revision: str | None = None
    exact: bool = False
    lora: Reference | None = None

    def __str__(self) -> str:
        text = f"{self.path}@{self.revision}" if self.revision else self.path
        return text if self.lora is None else f"{text}+{self.lora}"


class Wrong(Exception):
    """A value that is not usable."""

    def __init__(self, message: str, expected: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.expected = expected
        self.hint = hint


A_WRONG_VALUE = "has a wrong value"


def string(value: Any, loc: Loc) -> str:
    """A string."""
    if not isinstance(value, str):
        raise Wrong(A_WRONG_VALUE, "a string")
    return value


def mapping(value: Any, loc: Loc) -> dict[str, Any]:
    """A mapping."""
    if not isinstance(value, dict):
        raise Wrong(A_WRONG_VALUE, "a mapping")
    return value


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def output(value: Any, loc: Loc) -> AdapterOutput | None:
    """What to write: None for a checkpoint."""
    if not isinstance(value, dict):
        raise Wrong(A_WRONG_VALUE, "a mapping, such as {kind: adapter, rank: 16}")
    extra = [key for key in value if key not in _OUTPUT]
    if extra:
        raise Wrong(f"unknown key '{cut(str(extra[0]))}'", "one of " + ", ".join(_OUTPUT), nearest(extra[0], _OUTPUT))
    kind = value.get("kind")
    if kind not in ("checkpoint", "adapter"):
        raise Wrong("has no known kind", "kind: adapter, or kind: checkpoint")
    if kind == "checkpoint":
        if len(value) > 1:
            raise Wrong("a checkpoint has no rank, energy or spread", "{kind: checkpoint}")
        return None
    rank, energy, spread = value.get("rank"), value.get("energy"), value.get("spread", "b")
    if rank is not None and not (_is_integer(rank) and rank >= 1):
        raise Wrong("rank is not usable", "an integer of at least 1")
    number = isinstance(energy, (int, float)) and not isinstance(energy, bool)
    if energy is not None and not (number and 0.0 < energy <= 1.0):
        raise Wrong("energy is not usable", "a number in (0, 1]")
    if (rank is None) == (energy is None):
        raise Wrong("an adapter has a rank or an energy", "one of the two")
    if spread not in ("b", "sqrt", "a"):
        raise Wrong("spread is not usable", "b, sqrt or a")
    return AdapterOutput(rank, None if energy is None else float(energy), spread)


def seed(value: Any, loc: Loc) -> int:
    """An unsigned integer of 64 bits."""
    if not _is_integer(value) or not 0 <= value < 2**64:
        raise Wrong(A_WRONG_VALUE, f"an integer from 0 to {2**64 - 1}")
    return int(value)


def nan(value: Any, loc: Loc) -> str:
    """The policy for NaN and infinity."""
    if value not in ("error", "propagate"):
        raise Wrong(A_WRONG_VALUE, "'error' or 'propagate'")
    return str(value)


def layer_range(value: Any, loc: Loc) -> tuple[int, int]:
    """[first, end]."""
    if isinstance(value, list) and len(value) == 2 and all(_is_integer(v) for v in value):
        first, end = value
        if 0 <= first < end:
            return first, end
    raise Wrong(A_WRONG_VALUE, "[first, end], two integers with 0 <= first < end")


def dtype(value: Any, loc: Loc) -> str:
    """Torch's name of a floating dtype."""
    names = [d.torch for d in FLOAT_DTYPES]
    if value in names:
        return str(value)
    text = value if isinstance(value, str) else ""
    integer = text.startswith(("int", "uint"))
    hint = "Integer arithmetic would round every weight" if integer else nearest(text, names)
    raise Wrong("not a dtype that a merge can have", "one of " + ", ".join(names), hint)


def layers(value: Any, loc: Loc) -> str:
    """A pattern with one `*`."""
    if not isinstance(value, str) or value.count("*") != 1 or "*" not in value.split("."):
        raise Wrong("not a pattern of a layer stack", "dotted names with one * for the number, such as model.layers.*")
    return value


_OUTPUT = ("kind", "rank", "energy", "spread")
_KEYS = ("model", "path", "revision", "lora")


def reference(value: Any, loc: Loc) -> Reference:
    """A reference from a string or from a mapping with path and revision, also under `model`, with `lora` beside it."""
    if isinstance(value, str) and value.strip():
        return Reference(value)
    if isinstance(value, dict):
        for key in value:
            if key == "override_architecture" and value[key] is not None:
                raise Wrong(f"'{key}' is not supported: {PLANNED[key]}")
            if key not in (*_KEYS, "override_architecture"):
                raise Wrong(f"unknown key '{cut(str(key))}'", hint=nearest(str(key), _KEYS))
        if value.get("lora") is not None:
            model = reference({k: v for k, v in value.items() if k != "lora"}, loc)
            adapter = reference(value["lora"], loc)
            if model.lora is not None or adapter.lora is not None:
                raise Wrong("an adapter on an adapter", "one model and one adapter", "List the model twice, each once")
            return replace(model, lora=adapter)
        if "model" in value and "path" not in value and "revision" not in value:
            return reference(value["model"], loc)
        path, revision = value.get("path"), value.get("revision")
        if "model" not in value and isinstance(path, str) and path and isinstance(revision, (str, type(None))):
            return Reference(path, revision, exact=True)
    raise Wrong(
        "not a model reference",
        "a path, org/name, org/name@revision, model+adapter or {path: ..., revision: ..., lora: adapter}",
    )
