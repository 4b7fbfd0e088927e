"""Every method out of core: the C++ backend in tiles against the reference in memory, for other tiles, threads, memory
and files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import engine_cases as cases
import mergekernels as mk
import rounds_cases as rounds
from mergekernels import _methods
from test_engine_rounds import read

SPARSE: dict[str, Any] = {"weight": 0.6, "density": 0.4}
METHODS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    # name of the case: models beside the base, parameters, keys of the recipe
    "linear": (3, {"weight": 0.3}, {}),
    "task_arithmetic": (3, {"weight": 0.3}, {}),
    "ties": (3, SPARSE | {"rescale": True}, {}),
    "ties model": (3, {"weight": 1.0, "density": 0.3}, {"dialect": "paper"}),
    "dare_linear": (3, SPARSE, {}),
    "dare_ties": (3, SPARSE, {}),
    "della": (3, SPARSE | {"epsilon": 0.1}, {}),
    "della paper": (3, SPARSE | {"epsilon": 0.1}, {"dialect": "paper"}),
    "della_linear": (3, SPARSE | {"epsilon": 0.1}, {}),
    "breadcrumbs": (3, SPARSE | {"gamma": 0.1}, {}),
    "breadcrumbs paper": (3, SPARSE | {"gamma": 0.1}, {"dialect": "paper"}),
    "breadcrumbs_ties": (3, SPARSE | {"gamma": 0.1, "rescale": True}, {}),
    "sce": (3, {"select_topk": 0.3}, {}),
    "ram": (3, {"epsilon": 1e-4}, {}),
    "ramplus_tl": (3, {"epsilon": 1e-4}, {}),
    "nearswap": (1, {"t": 0.001}, {}),
    "arcee_fusion": (1, {}, {}),
    "magmax": (3, {}, {}),
    "emr": (3, {}, {}),
    "consensus": (3, {}, {}),
    "consensus ties": (3, {"inner": "ties"}, {}),
    "tall_mask": (3, {}, {}),
    "expo": (1, {"extrapolation_factor": 0.3}, {}),
    "deme": (3, {"weight": 0.3}, {}),
    "pcb": (3, {"ratio": 0.1}, {}),
    "passthrough": (1, {"scale": 0.5}, {}),
    "slerp": (1, {"t": 0.3}, {}),
    "nuslerp": (2, {"weight": 0.3}, {}),
    "nuslerp rows": (2, {"weight": 0.3, "nuslerp_flatten": False}, {}),
    "nuslerp columns": (2, {"weight": 0.3, "nuslerp_flatten": False, "nuslerp_row_wise": True}, {}),
    "multislerp": (3, {"weight": 0.3}, {}),
    "karcher": (3, {}, {}),
    "model_stock": (3, {}, {}),
    "model_stock rows": (3, {"filter_wise": True}, {}),
    "pcgrad": (3, {}, {}),
    "from_norm": (3, {"k": 2.0}, {}),
    "fisher": (2, {"normalize_fisher": True}, {}),
}
VARIANTS: list[dict[str, Any]] = [
    {"tile": 4096, "threads": 3, "shard_size": 30_000},
    {"threads": 1, "memory": 30_000_000, "shard_size": 10**9},
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = rounds.family(tmp_path_factory.mktemp("family"))
    for i, state in enumerate(importances()):
        cases.save(path / f"importance{i}", state)
    return path


def importances() -> list[dict[str, torch.Tensor]]:
    return [{n: t.float().abs() for n, t in state.items()} for state in rounds.tensors()[1:3]]


def test_no_method_is_left_out() -> None:
    assert {case.split()[0] for case in METHODS} == set(_methods.names())


@pytest.mark.parametrize("case", METHODS)
def test_out_of_core_equals_in_memory(root: Path, tmp_path: Path, case: str) -> None:
    method = case.split()[0]
    count, parameters, top = METHODS[case]
    info = _methods.get(method).info
    path = rounds.recipe(root, method, case, models=count, base=info.base != "input", parameters=parameters, **top)
    if info.companions:
        data = json.loads(path.read_text())
        for i, entry in enumerate(data["models"]):
            entry["parameters"] = {info.companions: str(root / f"importance{i}")}
        path.write_text(json.dumps(data))
    digests = set()
    for i, variant in enumerate(VARIANTS):
        report = cases.run_of(path, tmp_path / str(i), backend="cpu", **variant)
        digests.add(report.checkpoint_sha256)
        assert report.peak_tensor_memory <= report.memory
    assert len(digests) == 1
    base, *models = rounds.tensors()
    keywords = {p.name: p.keyword for p in info.params}
    options: dict[str, Any] = {keywords[name]: value for name, value in parameters.items()}
    if info.companions:
        options[info.companions] = importances()
    if info.base != "input":
        options["base"] = base
    expected = mk.merge_state_dicts(
        models[:count], method, backend="reference", out_dtype=torch.bfloat16, **options, **top
    )
    changed = False
    for name, tensor in read(tmp_path / "0").items():
        assert torch.equal(tensor.view(torch.int16), expected[name].view(torch.int16)), name
        changed = changed or not torch.equal(tensor, base[name])
    assert changed
