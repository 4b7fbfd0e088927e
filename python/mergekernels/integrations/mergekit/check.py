"""Whether mergekit's methods still compute what they did in the version that these kernels follow.

Names and parameters can stay when the arithmetic changes. So each method is asked once, on a few numbers, before it is
replaced: a version with other rules is not recognised.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .compute import linear_batch, merged, slerp_batch
from .options import Options
from .translate import FUNCTIONS, arithmetic, function

__all__ = ["SHAPE", "TASK_ARITHMETIC", "arithmetic_disagreement", "disagreement"]

SHAPE = (3, 7)
"""Of the tensors that are merged for the comparison."""

TASK_ARITHMETIC = (
    "task_arithmetic",
    "ties",
    "dare_linear",
    "dare_ties",
    "breadcrumbs",
    "breadcrumbs_ties",
    "della_linear",
    "della",
)
"""The methods of one class."""

_TOLERANCE = 1e-4  # karcher stops at its own tolerance of 1e-5
_OPTIONS = Options(None, "propagate", None, 1)
_PARAMETERS: Mapping[str, Mapping[str, Any]] = {
    "nuslerp": {"nuslerp_row_wise": False, "nuslerp_flatten": False},
    "multislerp": {"normalize_weights": True, "eps": 1e-8},
    "karcher": {"max_iter": 10, "tol": 1e-5},
    "sce": {"int8_mask": False, "select_topk": 0.5},
    "ram": {"epsilon": 0.2},
    "ramplus_tl": {"r": 0.1, "alpha": 0.2, "epsilon": 0.2},
    "model_stock": {"filter_wise": False},
    "nearswap": {"t": 0.2},
}


def disagreement(package: Any, functions: Mapping[str, Any]) -> str | None:
    """The first method whose own code gives something else than ours, with what differs; None if all agree.

    package : mergekit.merge_methods. functions : the methods among `FUNCTIONS` that are to be replaced.
    """
    tensors = _tensors()
    for name, method in functions.items():
        if name in ("linear", "slerp"):
            problem = _batch(package, name, method, tensors)
        else:
            group = _group(package, name, tensors)
            parameters = dict(_PARAMETERS.get(name, {}))
            if "weight" in FUNCTIONS[name]:
                parameters["weight"] = package.PerInputValues([(e.id, 0.5 + e.id) for e in group.non_base])
            if name == "passthrough":
                parameters["scale"] = package.PerInputValues([(e.id, 0.75) for e in group.entries])
            ours = merged(function(name, group, parameters), _OPTIONS)
            problem = _compared(ours, lambda m=method, g=group, p=parameters: m.implementation(g, **p))
        if problem is not None:
            return f"{name} {problem}"
    return None


def arithmetic_disagreement(package: Any, methods: Mapping[str, Any]) -> str | None:
    """As `disagreement`, for the methods of task arithmetic. Nothing random is drawn: densities are 1 there."""
    group = _group(package, "ties", _tensors())
    for name, method in methods.items():
        random = name.startswith(("dare", "della"))
        parameters: dict[str, Any] = {"int8_mask": False, "normalize": True, "rescale": random, "lambda": 0.75}
        values = {"weight": None, "density": 1.0 if random else 0.5}
        if name.startswith("breadcrumbs"):
            values["gamma"] = 0.1
        if name.startswith("della"):
            values["epsilon"] = 0.1
        for key, value in values.items():
            pairs = [(e.id, 0.5 + e.id if value is None else value) for e in group.non_base]
            parameters[key] = package.PerInputValues(pairs)
        ours = merged(arithmetic(method, group, parameters), _OPTIONS)
        problem = _compared(ours, lambda m=method, p=parameters: m.merge_group(group, **p))
        if problem is not None:
            return f"{name} {problem}"
    return None


def _tensors() -> list[Any]:
    """A base and three models in float64, no two of whose deltas have equal entries."""
    import torch

    n = math.prod(SHAPE)
    base = [math.sin(1.0 + 2.0 * i) for i in range(n)]
    moved = [[b + 0.5 * math.cos(3.0 + (1.7 + t) * i) for i, b in enumerate(base)] for t in range(3)]
    return [torch.tensor(values, dtype=torch.float64, device="cpu").reshape(SHAPE) for values in [base, *moved]]


def _group(package: Any, name: str, tensors: list[Any]) -> Any:
    """As many inputs as the method takes, the base first if it has one."""
    models = {"nuslerp": 2, "nearswap": 1, "arcee_fusion": 1, "passthrough": 1}.get(name, 3)
    entries = [package.TensorEntry(id=t, tensor=tensors[1 + t], is_base=False) for t in range(models)]
    if name not in ("karcher", "passthrough"):
        entries.insert(0, package.TensorEntry(id="base", tensor=tensors[0], is_base=True))
    # With a name no seed is drawn from torch.
    return package.TensorGroup(entries=tuple(entries), metadata=package.TensorMetadata(name="mergekernels.check"))


def _batch(package: Any, name: str, method: Any, tensors: list[Any]) -> str | None:
    import torch

    if name == "linear":
        batch = package.TensorBatch(tuple(t[None] for t in tensors[1:]))
        weight = torch.tensor([[0.5, 1.5, -0.25]], dtype=torch.float64, device="cpu")
        ours = linear_batch(batch, weight, True, _OPTIONS)
        return _compared(ours, lambda: method.implementation(batch, weight=weight, normalize=True))
    batch = package.TensorBatch(tuple(t[None] for t in tensors[:2]), base_index=0)
    t = torch.tensor([0.25], dtype=torch.float64, device="cpu")
    return _compared(slerp_batch(batch, t, _OPTIONS), lambda: method.implementation(batch, t=t))


def _compared(ours: Any, their: Any) -> str | None:
    import torch

    try:
        # Whatever default device the user has set is not that of the numbers.
        with torch.no_grad(), torch.device("cpu"):
            theirs = their()
    except Exception as error:
        return f"raises {type(error).__name__} on a plain call"
    if not isinstance(theirs, torch.Tensor) or theirs.shape != ours.shape:
        return "returns something else than a tensor of the inputs' shape"
    if not float((theirs.double() - ours.double()).abs().max()) <= _TOLERANCE:
        return "computes something else than it did in version 0.1.5"
    return None
