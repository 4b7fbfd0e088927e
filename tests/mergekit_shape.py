"""A folder with a package called mergekit that has the shape of version 0.1.5, or of 0.1.4, and sums for arithmetic.

Its methods return the sum of their inputs, which no method of ours does: whoever computed is plain to see.
"""

from __future__ import annotations

from pathlib import Path

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
from types import SimpleNamespace
from typing import Any

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

    def merge_group(self, group, /, **parameters):
        return sum(e.tensor for e in group.entries)

_METHODS = {}

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
            text += f"def {name}({signature}):\n    inputs = {signature.split(',')[0]}\n"
            text += (
                "    return sum(inputs.tensors if hasattr(inputs, 'tensors') else [e.tensor for e in inputs.entries])\n"
            )
            text += f"_register({name!r}, {name})\n\n"
    (package / "merge_methods.py").write_text(text)
    return folder
