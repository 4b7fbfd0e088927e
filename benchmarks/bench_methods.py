"""Every method on one tensor in memory: all its rounds and the writing pass, as `merge` runs them.

Bytes: every stream once and the output once, the least that any implementation must move; a method that measures first
reads its streams again. The result is compared with the reference on the first rows before anything is timed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from yardsticks import Family

import mergekernels as mk

ROWS = 64
WEIGHTS = {"weights": [0.5, 0.3, 0.2]}
# Method: (number of models, whether there is a base, parameters).
METHODS: dict[str, tuple[int, bool, dict[str, Any]]] = {
    "linear": (3, False, WEIGHTS),
    "task_arithmetic": (3, True, WEIGHTS),
    "ties": (3, True, {**WEIGHTS, "density": 0.2}),
    "dare_linear": (3, True, {**WEIGHTS, "density": 0.2}),
    "dare_ties": (3, True, {**WEIGHTS, "density": 0.2}),
    "della": (3, True, {**WEIGHTS, "density": 0.5, "epsilon": 0.1}),
    "della_linear": (3, True, {**WEIGHTS, "density": 0.5, "epsilon": 0.1}),
    "breadcrumbs": (3, True, {**WEIGHTS, "density": 0.9, "gamma": 0.01}),
    "breadcrumbs_ties": (3, True, {**WEIGHTS, "density": 0.9, "gamma": 0.01}),
    "sce": (3, True, {"select_topk": 0.5}),
    "ram": (3, True, {"epsilon": 1e-3}),
    "ramplus_tl": (3, True, {"epsilon": 1e-3}),
    "nearswap": (1, True, {"t": 1e-3}),
    "arcee_fusion": (1, True, {}),
    "magmax": (3, True, {}),
    "emr": (3, True, {}),
    "consensus": (3, True, {}),
    "tall_mask": (3, True, {}),
    "expo": (1, True, {"extrapolation_factor": 0.3}),
    "deme": (3, True, WEIGHTS),
    "pcb": (3, True, {}),
    "fisher": (3, False, WEIGHTS),
    "slerp": (1, True, {"t": 0.4}),
    "nuslerp": (2, True, {"weights": [0.6, 0.4]}),
    "multislerp": (3, True, WEIGHTS),
    "karcher": (3, False, {}),
    "model_stock": (3, True, {}),
    "pcgrad": (3, True, {}),
    "from_norm": (3, True, {"k": 2.0}),
    "passthrough": (1, False, {"scale": 0.5}),
}


def test_no_method_is_missing() -> None:
    assert set(METHODS) == {name for name, info in mk.methods().items() if info.tier != "T2"}


@pytest.mark.parametrize("method", METHODS)
def test_method(method: str, family: Family, numel: int, record: Any, threads: int) -> None:
    if numel > 16 << 20 or family.base.dtype is not torch.bfloat16:
        pytest.skip("methods are measured in bfloat16 at up to 16 Mi elements, to keep the table short")
    count, has_base, params = METHODS[method]
    shape = (-1, 4096)
    base = family.base.view(shape) if has_base else None
    models = [m.view(shape) for m in family.models[:count]]
    streams = [*models, *([] if base is None else [base])]
    options: dict[str, Any] = dict(params)
    if method == "fisher":
        importance = [m.abs() for m in models]
        streams += importance
        options["importance"] = importance
    small = {k: [t[:ROWS] for t in v] if k == "importance" else v for k, v in options.items()}
    first = {"base": None if base is None else base[:ROWS], **small}
    heads = [m[:ROWS] for m in models]
    assert torch.equal(mk.merge(heads, method, **first), mk.merge(heads, method, backend="reference", **first))
    out = torch.empty_like(models[0])
    run = lambda: mk.merge(models, method, base=base, out=out, threads=threads, **options)  # noqa: E731
    record(method, [s.view(-1) for s in streams], out, run, None)
