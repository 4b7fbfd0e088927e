"""Every method out of core: the golden digest, whatever tile size, thread count, memory budget and cut into files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import mergekernels as mk
from digest_runs import GOLDEN
from engine_cases import run_of
from golden_family import DTYPES, digest, family
from method_cases import CASES

# (threads, forced elements of a tile, memory, shard size of the output)
WAYS = [(1, 4096, None, 5 << 30), (2, None, None, 100_000), (3, 8192, "80MB", 300_000), (8, 12288, None, 5 << 30)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DTYPE/MODEL for every model of the family, in two files."""
    root = tmp_path_factory.mktemp("golden")
    for dtype in DTYPES:
        for model, tensors in family(dtype).items():
            folder = root / dtype / model
            folder.mkdir(parents=True)
            names = list(tensors)
            weight_map = {}
            for i in (0, 1):
                file = f"model-{i + 1:05d}-of-00002.safetensors"
                save_file({n: tensors[n].clone() for n in names[i::2]}, folder / file)
                weight_map |= dict.fromkeys(names[i::2], file)
            (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
            (folder / "config.json").write_text("{}")
    return root


def recipe(case_id: str, folder: Path) -> dict[str, Any]:
    """The recipe of a case."""
    case = CASES[case_id]
    names = {p.keyword: p for p in mk.methods()[case.method].params}
    shared: dict[str, Any] = {}
    models: list[dict[str, Any]] = [{"model": str(folder / m), "parameters": {}} for m in case.models]
    for keyword, value in case.params.items():
        if isinstance(value, list):
            for model, one in zip(models, value, strict=True):
                model["parameters"][names[keyword].name] = one
        else:
            shared[names[keyword].name] = value
    if case.companions:
        for model, letter in zip(models, case.models, strict=True):
            model["parameters"][case.companions] = str(folder / f"{case.companions}_{letter}")
    found = {"merge_method": case.method, "models": models, "parameters": shared, "dialect": case.dialect, "seed": 7}
    if case.then:
        found["then"] = [{name: params} for name, params in case.then]
    return found | ({"base_model": str(folder / "base")} if case.base else {})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", GOLDEN)
def test_out_of_core(case: str, dtype: str, checkpoints: Path, tmp_path: Path) -> None:
    # Every dtype in every way would take minutes: each case takes all ways, spread over the dtypes.
    first = (list(CASES).index(case) + list(DTYPES).index(dtype)) % len(WAYS)
    threads, tile, memory, shard = WAYS[first]
    path = tmp_path / "recipe.json"
    path.write_text(
        json.dumps(recipe(case, checkpoints / dtype) | {"dtype": str(DTYPES[dtype]).removeprefix("torch.")})
    )
    out = tmp_path / "out"
    run_of(path, out, threads=threads, tile=tile, memory=memory, shard_size=shard)
    tensors = {}
    for file in out.glob("*.safetensors"):
        tensors |= load_file(file)
    assert digest(tensors) == GOLDEN[case][dtype], WAYS[first]
    shutil.rmtree(out)
