"""Makes the conformance kit: what the original implementations give on a small fixed family of inputs.

usage: python make_kit.py TOOL [FOLDER]      TOOL: inputs, mergekit, peft, fusionbench, tensorly or formula

Each tool is run by the Python of an environment that has it (`make_kit.sh` makes them all); the script imports nothing
of this package. It replaces the tool's outputs and its entries in kit.json. All arithmetic of the tools is float32.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

SHAPES = {"matrix": (40, 72), "tall": (96, 5), "conv": (6, 8, 3, 3), "vector": (48,), "narrow": (7, 1), "single": (1,)}
MODELS = ("base", "a", "b", "c")
Case = dict[str, Any]


def make_inputs(folder: Path) -> None:
    """The element-wise family and the inputs of methods over matrices."""
    from matrix_inputs import make_matrix_inputs

    make_family(folder)
    make_matrix_inputs(folder)


def make_family(folder: Path) -> None:
    """The family: a base, normal with 0.02, and three fine-tunes of it; no two magnitudes of a model are equal, one
    model leaves one tensor as it is."""
    draw = torch.Generator().manual_seed(20260101)
    tensors = {}
    for name, shape in SHAPES.items():
        base = 0.02 * torch.randn(shape, generator=draw)
        tensors[f"base/{name}"] = base
        shared = torch.randn(shape, generator=draw)
        for t, model in enumerate(MODELS[1:]):
            own = torch.randn(shape, generator=draw)
            size = 1 + torch.randn(shape, generator=draw).abs()
            delta = 0.001 * (1 + 0.5 * t) * (0.6 * shared + 0.8 * own) * size
            tensors[f"{model}/{name}"] = base.clone() if (model, name) == ("b", "vector") else base + delta
        for model in MODELS[1:]:
            tensors[f"importance_{model}/{name}"] = torch.rand(shape, generator=draw) ** 4
    (folder / "inputs").mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "inputs" / "family.safetensors")


def inputs(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, dict[str, torch.Tensor]]:
    """Model -> tensor name -> values."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in load_file(folder / "inputs" / "family.safetensors").items():
        model, name = key.split("/")
        found.setdefault(model, {})[name] = value.to(dtype)
    return found


class Recorder:
    """Stands in for torch.bernoulli and keeps what it draws."""

    def __init__(self) -> None:
        self.masks: list[torch.Tensor] = []
        self._bernoulli = torch.bernoulli

    def __call__(self, p: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One mask."""
        mask = self._bernoulli(p, *args, **kwargs)
        self.masks.append(mask.bool())
        return mask


def write(folder: Path, tool: str, version: str, cases: Iterator[tuple[Case, dict[str, torch.Tensor]]]) -> None:
    """Outputs and entries of one tool."""
    file = folder / "kit.json"
    kit = json.loads(file.read_text()) if file.exists() else {"layout": 1, "cases": []}
    kit["cases"] = [c for c in kit["cases"] if c["tool"] != tool]
    (folder / "outputs").mkdir(parents=True, exist_ok=True)
    for old in (folder / "outputs").glob(f"{tool}-*.safetensors"):
        old.unlink()
    for case, tensors in cases:
        case = {
            "id": f"{tool}-{case['id']}",
            "tool": tool,
            "version": version,
            **{k: case[k] for k in case if k != "id"},
        }
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "outputs" / f"{case['id']}.safetensors")
        kit["cases"].append(case)
    kit["cases"].sort(key=lambda c: c["id"])
    from matrix_inputs import ADAPTERS

    kit["adapters"] = ADAPTERS
    file.write_text(json.dumps(kit, indent=1) + "\n")


def case(
    id_: str, method: str, models: str = "abc", base: bool = True, *, bound: float = 2**-21, **fields: Any
) -> Case:
    """One entry. models: one letter each. params: names of recipes; per-model values as lists. bound: largest allowed
    difference, relative to the largest magnitude of the expected tensor, or with norm "frobenius" the norm of the
    difference relative to the norm of the expected tensor. takes: "adapters" for methods of adapters."""
    fields.setdefault("dialect", "default")
    fields.setdefault("params", {})
    return {
        "id": id_,
        "method": method,
        "models": list(models),
        "base": "base" if base else None,
        "bound": bound,
        **fields,
    }


MERGEKIT = [
    case("linear", "linear", base=False, params={"weight": [1.0, 0.5, 0.25]}),
    case("linear-sum", "linear", base=False, params={"weight": [0.3, 0.5, -0.2], "normalize": False}),
    case("task_arithmetic", "task_arithmetic", params={"weight": [1.0, -0.5, 0.7], "lambda": 0.6}),
    case("task_arithmetic-normalize", "task_arithmetic", params={"weight": [1.0, 0.5, 0.7], "normalize": True}),
    case("ties", "ties", params={"weight": [1.0, 0.5, 0.7], "density": 0.2}),
    case("ties-densities", "ties", params={"weight": [1.0, 1.0, 0.3], "density": [0.9, 0.5, 0.01], "lambda": 1.5}),
    case("ties-sum", "ties", params={"weight": [1.0, 1.0, 1.0], "density": 0.5, "normalize": False}),
    case("ties-rescale", "ties", params={"weight": [1.0, 0.5, 0.7], "density": 0.3, "rescale": True}),
    case("dare_linear", "dare_linear", params={"weight": [1.0, 0.5, 0.7], "density": 0.3}),
    case("dare_linear-norescale", "dare_linear", params={"weight": [1.0, 0.5, 0.7], "density": 0.3, "rescale": False}),
    case("dare_ties", "dare_ties", params={"weight": [1.0, 0.5, 0.7], "density": [0.3, 0.53, 1.0]}),
    case("dare_ties-normalize", "dare_ties", params={"weight": [1.0, 1.0, 1.0], "density": 0.5, "normalize": True}),
    case("della", "della", params={"weight": [1.0, 0.5, 0.7], "density": 0.5, "epsilon": 0.2}),
    case(
        "della_linear",
        "della_linear",
        params={"weight": [1.0, 0.5, 0.7], "density": 0.4, "epsilon": 0.1, "lambda": 1.1},
    ),
    case("breadcrumbs", "breadcrumbs", params={"weight": [1.0, 0.5, 0.7], "density": 0.8, "gamma": 0.05}),
    case("breadcrumbs_ties", "breadcrumbs_ties", params={"weight": [1.0, 0.5, 0.7], "density": 0.5, "gamma": 0.1}),
    case(
        "breadcrumbs-rescale",
        "breadcrumbs",
        params={"weight": [1.0, 0.5, 0.7], "density": 0.9, "gamma": 0.3, "rescale": True},
    ),
    case("sce", "sce", params={"select_topk": 0.4}),
    case("sce-all", "sce", params={"select_topk": 1.0}),
    case("ram", "ram", params={"epsilon": 0.001}),
    case("ramplus_tl", "ramplus_tl", params={"epsilon": 0.001, "r": 0.3, "alpha": 0.5}),
    case("nearswap", "nearswap", "a", params={"t": 0.001}),
    # Its divergences cancel almost entirely: in float32 the noise of either tool decides about some entries.
    case("arcee_fusion", "arcee_fusion", "a", dtype="float64"),
    case("passthrough", "passthrough", "a", False, params={"scale": 0.3}),
    case("slerp", "slerp", "a", params={"t": 0.4}, bound=2**-19),
    case("nuslerp", "nuslerp", "ab", False, params={"weight": [1.0, 0.4]}, bound=2**-19),
    case("nuslerp-base", "nuslerp", "ac", params={"weight": [1.0, 0.4]}, bound=2**-19),
    case("nuslerp-rows", "nuslerp", "ac", params={"weight": [0.3, 0.7], "nuslerp_flatten": False}, bound=2**-18),
    case(
        "nuslerp-columns",
        "nuslerp",
        "ac",
        params={"weight": [0.3, 0.7], "nuslerp_flatten": False, "nuslerp_row_wise": True},
        bound=2**-18,
    ),
    case("multislerp", "multislerp", base=False, params={"weight": [1.0, 0.5, 0.7]}, bound=2**-19),
    case("multislerp-base", "multislerp", "acb", params={"weight": [1.0, 0.5, 0.7]}, bound=2**-18),
    case("karcher", "karcher", base=False, params={"max_iter": 20, "tol": 1e-6}, bound=2**-18),
    case("model_stock", "model_stock", bound=2**-18),
    case("model_stock-rows", "model_stock", params={"filter_wise": True}, bound=2**-16),
]

# What mergekit does otherwise by decision (see docs/methods.md) and is left out of the comparison, by tensor.
LEFT_OUT = {
    "della": ["narrow", "single"],  # it refuses rows of length 1
    "della_linear": ["narrow", "single"],
}


def mergekit(folder: Path) -> Iterator[tuple[Case, dict[str, torch.Tensor]]]:
    """mergekit's merge methods on one tensor at a time."""
    from mergekit.merge_methods.api import merge_tensors

    family = inputs(folder)
    for entry in MERGEKIT:
        found: dict[str, torch.Tensor] = {}
        entry = dict(entry)
        ids = ([entry["base"]] if entry["base"] else []) + entry["models"]
        parameters = {
            k: dict(zip(entry["models"], v)) if isinstance(v, list) else v  # noqa: B905
            for k, v in entry["params"].items()
        }
        for key in ("weight", "density", "gamma", "epsilon"):
            if key in parameters and not isinstance(parameters[key], dict) and key in ("weight", "density"):
                parameters[key] = dict.fromkeys(entry["models"], parameters[key])
        skipped = LEFT_OUT.get(entry["method"], [])
        for name in SHAPES:
            if name in skipped:
                continue
            recorder = Recorder()
            torch.manual_seed(1)
            original, torch.bernoulli = torch.bernoulli, recorder
            try:
                found[name] = merge_tensors(
                    [family[m][name].to(getattr(torch, entry.get("dtype", "float32"))) for m in ids],
                    entry["method"],
                    parameters=parameters,
                    ids=ids,
                    base_index=0 if entry["base"] else None,
                    name=name,
                )
            finally:
                torch.bernoulli = original
            densities = entry["params"].get("density", 1.0)
            drawn = iter(recorder.masks)
            for t, model in enumerate(entry["models"]):
                density = densities[t] if isinstance(densities, list) else densities
                if recorder.masks and density < 1:
                    found[f"mask_{model}/{name}"] = next(drawn).reshape(SHAPES[name])
        if skipped:
            entry["without"] = skipped
        yield entry, found


PEFT = [
    case("ties", "ties", dialect="peft", params={"weight": [1.0, 0.5, 0.7], "density": 0.3}),
    case(
        "ties-frequency",
        "ties",
        dialect="peft",
        params={"weight": [1.0, 0.5, 0.7], "density": 0.6, "majority_sign_method": "frequency"},
    ),
    case("dare_linear", "dare_linear", dialect="peft", params={"weight": [1.0, 0.5, 0.7], "density": 0.3}),
    case("dare_ties", "dare_ties", dialect="peft", params={"weight": [1.0, 0.5, 0.7], "density": 0.6}),
]


def peft(folder: Path) -> Iterator[tuple[Case, dict[str, torch.Tensor]]]:
    """PEFT's functions on deltas; the base is added in float32."""
    from peft.utils import merge_utils

    family = inputs(folder)
    for entry in PEFT:
        found: dict[str, torch.Tensor] = {}
        params = dict(entry["params"])
        weights = torch.tensor(params.pop("weight"))
        for name in SHAPES:
            deltas = [family[m][name] - family["base"][name] for m in entry["models"]]
            recorder = Recorder()
            torch.manual_seed(2)
            original, torch.bernoulli = torch.bernoulli, recorder
            try:
                merged = getattr(merge_utils, entry["method"])(deltas, weights, **params)
            finally:
                torch.bernoulli = original
            found[name] = family["base"][name] + merged
            for model, mask in zip(entry["models"], recorder.masks):  # noqa: B905
                found[f"mask_{model}/{name}"] = mask
        yield entry, found


def main(tool: str, folder: Path) -> None:
    """Runs one tool."""
    if tool == "inputs":
        make_inputs(folder)
        return
    runs: dict[str, Callable[[Path], Iterator[tuple[Case, dict[str, torch.Tensor]]]]] = {
        "mergekit": mergekit,
    }
    from importlib.metadata import version

    if tool == "formula":
        from formulas import formula
        from formulas_matrices import formula_matrices

        write(folder, tool, "1", chain(formula(folder), formula_matrices(folder)))
        return
    if tool == "tensorly":
        from tensorly_adapters import tensorly_adapters

        write(folder, tool, version(tool), tensorly_adapters(folder))
        return
    if tool == "peft":
        from peft_matrices import peft_matrices

        write(folder, tool, version(tool), chain(peft(folder), peft_matrices(folder)))
        return
    if tool == "fusionbench":
        from fusionbench_cases import fusionbench
        from fusionbench_matrices import fusionbench_matrices

        write(folder, tool, version("fusion-bench"), chain(fusionbench(folder), fusionbench_matrices(folder)))
        return
    write(folder, tool, version(tool), runs[tool](folder))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).resolve().parent)
