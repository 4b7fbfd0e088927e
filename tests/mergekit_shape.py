"""A folder with a package called mergekit that has the shape of version 0.1.5, or of 0.1.4, and sums for arithmetic.

Its methods return the sum of their inputs, which no method of ours does: whoever computed is plain to see. Only the
few numbers by which its version is recognised are merged as 0.1.5 would.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch

import mergekernels.integrations.mergekit as fast

_METHODS = {
    "linear": "batch, weight, normalize=True",
    "slerp": "batch, t",
    "nuslerp": "group, weight, nuslerp_row_wise=False, nuslerp_flatten=True",
    "multislerp": "group, weight, normalize_weights=True, eps=1e-8",
    "karcher": "group, max_iter=10, tol=1e-5",
    "sce": "group, int8_mask=False, select_topk=1.0",
    "ram": "group, epsilon=1e-5",
    "ramplus_tl": "group, r=0.1, alpha=0.2, epsilon=1e-5",
    "model_stock": "group, filter_wise=False",
    "nearswap": "group, t",
    "arcee_fusion": "group",
    "passthrough": "group, scale=None",
}

_SECOND = """
from dataclasses import dataclass
from enum import Enum
from types import SimpleNamespace
from typing import Any

WRONG = ""  # the name of a method that shall have other rules

def _recognised(name, tensors):
    from mergekernels.integrations.mergekit.check import SHAPE
    return name != WRONG and tuple(tensors[0].shape[-2:]) == SHAPE

def _ours(translated):
    from mergekernels.integrations.mergekit.compute import merged
    from mergekernels.integrations.mergekit.options import Options
    return merged(translated, Options(None, "propagate", "reference", 1))

def _answer(name, inputs, given):
    if hasattr(inputs, "tensors"):
        if not _recognised(name, inputs.tensors):
            return sum(inputs.tensors)
        import torch
        from mergekernels.merging import merge
        if name == "linear":
            weights = given["weight"][0].tolist()
            return merge(list(inputs.tensors), "linear", weights=weights, normalize=given["normalize"])
        a, b = inputs.tensors
        return merge([b], "slerp", base=a, t=float(given["t"][0]))
    tensors = [entry.tensor for entry in inputs.entries]
    if not _recognised(name, tensors):
        return sum(tensors)
    from mergekernels.integrations.mergekit.translate import function
    return _ours(function(name, inputs, given))

class PerInputValues(dict):
    pass

class Kind(str, Enum):
    sum = "sum"
    magnitude = "magnitude"
    random = "random"
    magnitude_outliers = "magnitude_outliers"
    della_magprune = "della_magprune"

@dataclass(frozen=True)
class TensorMetadata:
    name: Any = None
    vocabulary_axis: Any = None

@dataclass(frozen=True)
class TensorEntry:
    id: Any
    tensor: Any
    is_base: bool = False

@dataclass(frozen=True)
class TensorGroup:
    entries: tuple
    metadata: Any = TensorMetadata()

    @property
    def base(self):
        return next((e for e in self.entries if e.is_base), None)

    @property
    def non_base(self):
        return tuple(e for e in self.entries if not e.is_base)

@dataclass(frozen=True)
class TensorBatch:
    tensors: tuple
    base_index: Any = None

@dataclass(frozen=True)
class GeneralizedTaskArithmeticMerge:
    consensus_method: Any
    sparsification_method: Any
    method_name: str

    @property
    def spec(self):
        return SimpleNamespace(name=self.method_name)

    def merge_group(self, group, /, **parameters):
        tensors = [entry.tensor for entry in group.entries]
        if not _recognised(self.method_name, tensors):
            return sum(tensors)
        from mergekernels.integrations.mergekit.translate import arithmetic
        return _ours(arithmetic(self, group, parameters))

_METHODS = {
    name: GeneralizedTaskArithmeticMerge(vote and Kind.sum, rule and Kind(rule), name)
    for name, vote, rule in [
        ("task_arithmetic", None, None),
        ("ties", True, "magnitude"),
        ("dare_linear", None, "random"),
        ("dare_ties", True, "random"),
        ("breadcrumbs", None, "magnitude_outliers"),
        ("breadcrumbs_ties", True, "magnitude_outliers"),
        ("della_linear", None, "della_magprune"),
        ("della", True, "della_magprune"),
    ]
}

def registered_methods():
    return tuple(_METHODS.values())

def _register(name, implementation):
    _METHODS[name] = SimpleNamespace(spec=SimpleNamespace(name=name), implementation=implementation)

"""


def write(folder: Path, generation: str = "0.1.5", **signatures: str) -> Path:
    """The folder, to be put on the path. signatures : of methods that shall differ from 0.1.5's; "" leaves one out."""
    package = folder / "mergekit"
    (package / "scripts").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "scripts" / "__init__.py").write_text("")
    (package / "scripts" / "run_yaml.py").write_text(
        "import sys\n"
        "import mergekit.merge_methods\n"
        "class main:\n"
        "    @staticmethod\n"
        "    def main(prog_name=None):\n"
        "        print(prog_name, *sys.argv[1:])\n"
        "        sys.exit(3 if 'fail' in sys.argv else 0)\n"
    )
    if generation == "0.1.4":
        (package / "merge_methods.py").write_text("REGISTERED_MERGE_METHODS = {}\n")
        return folder
    text = _SECOND
    for name, signature in (_METHODS | signatures).items():
        if signature:
            first, *names = [part.split("=")[0].strip() for part in signature.split(",")]
            given = ", ".join(f"{n}={n}" for n in names)
            text += f"def {name}({signature}):\n    return _answer({name!r}, {first}, dict({given}))\n"
            text += f"_register({name!r}, {name})\n\n"
    (package / "merge_methods.py").write_text(text)
    return folder


class Kind(str, Enum):
    """As mergekit's: strings with a value."""

    sum = "sum"
    count = "count"
    magnitude = "magnitude"
    random = "random"
    magnitude_outliers = "magnitude_outliers"
    della_magprune = "della_magprune"


def forget() -> None:
    """No package called mergekit has been imported."""
    for name in [n for n in sys.modules if n.partition(".")[0] == "mergekit"]:
        del sys.modules[name]


def imports(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """For a fixture: a function that imports a mergekit of the shape asked for; everything is undone afterwards."""
    monkeypatch.syspath_prepend(str(folder))

    def make(generation: str = "0.1.5", **signatures: str) -> Any:
        forget()
        write(folder, generation, **signatures)
        importlib.invalidate_caches()
        return importlib.import_module("mergekit.merge_methods")

    forget()
    fast.reset_stats()
    yield make
    fast.disable()
    fast.reset_stats()
    forget()


def group_of(package: Any, tensors: list[torch.Tensor], base: Any = None, name: str | None = "layer.0") -> Any:
    """A group of inputs called 0, 1, ..., the base last."""
    entries = [package.TensorEntry(i, t) for i, t in enumerate(tensors)]
    if base is not None:
        entries.append(package.TensorEntry("base", base, is_base=True))
    return package.TensorGroup(tuple(entries), package.TensorMetadata(name=name))


def tensors(count: int = 3, shape: tuple[int, ...] = (4, 8), dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Deterministic, without equal magnitudes."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]


def method(package: Any, name: str) -> Any:
    """The registered one."""
    return next(m for m in package.registered_methods() if m.spec.name == name)


def per_input(count: int, **values: float) -> dict[str, dict[int, float]]:
    """The same value for each input."""
    return {name: dict.fromkeys(range(count), value) for name, value in values.items()}
