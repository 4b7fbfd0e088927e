"""All combination types beside PEFT 0.21.2's add_weighted_adapter: deltas, never factors.

Needs PEFT in an environment of its own, as `test_mergekit_agreement`. Linear, Conv1D, Embedding and Conv2d layers,
ranks 2 to 20, rank and alpha patterns, rsLoRA, negative weights, missing modules.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from combination_cases import CASES, SETS, SHAPES
from safetensors.torch import load_file

import mergekernels as mk
import peft_reference as reference
from adapter_cases import error
from mergekernels.adapters.model import Adapter
from mergekernels.formats.adapters import read_adapter

PEER = os.environ.get("MERGEKERNELS_PEER_ENV")

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(PEER is None, reason="MERGEKERNELS_PEER_ENV names no environment with PEFT"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapters, and what PEFT makes of them."""
    assert PEER is not None
    root = tmp_path_factory.mktemp("combinations")
    (root / "cases.json").write_text(json.dumps({"sets": SETS, "cases": CASES}))
    driver = Path(__file__).parent / "peer_combine.py"
    command = [str(Path(PEER) / "bin" / "python"), str(driver), str(root / "cases.json"), str(root)]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr[-4000:]
    return root


def opened(folder: Path, name: str) -> list[Adapter]:
    return [read_adapter(folder / name / f"a{i}", base=SHAPES) for i in range(len(SETS[name]))]


def merged(group: list[Adapter], case: dict[str, Any], dialect: str) -> mk.MergedAdapter:
    options = dict(case["options"])
    rank = options.pop("svd_rank", None)
    return mk.merge_adapters(
        group, case["type"], weights=case["weights"], rank=rank, dialect=dialect, base=SHAPES, **options
    )


def theirs(folder: Path, case: dict[str, Any]) -> dict[str, torch.Tensor]:
    return load_file(folder / f"{case['name']}.deltas")


NAMED = {c["name"]: c for c in CASES}
QUIRKS = ("leaky", "one")


@pytest.mark.parametrize("name", [n for n, c in NAMED.items() if "dare" not in c["type"] or c["set"] == "one"])
def test_deltas_agree(folder: Path, name: str) -> None:
    case = NAMED[name]
    group = opened(folder, case["set"])
    want = theirs(folder, case)
    dialects = ("peft",) if case["set"] in QUIRKS else ("peft", "default")
    for dialect in dialects:
        ours = merged(group, case, dialect)
        assert set(ours.modules) == set(want)
        for module, delta in want.items():
            # 1e-5: PEFT's SVD runs in float32
            assert error(ours.delta(module), delta) < 1e-5, (module, dialect)


@pytest.mark.parametrize(
    "name", [n for n, c in NAMED.items() if "dare" in c["type"] and c["set"] in ("equal", "mixed")]
)
def test_random_types_agree_given_the_masks(folder: Path, name: str) -> None:
    """PEFT's result follows from the masks that it drew by the same definition as ours does from Philox's."""
    case = NAMED[name]
    group = opened(folder, case["set"])
    dense = case["type"].endswith("_svd")
    masks = load_file(folder / f"{name}.masks") if (folder / f"{name}.masks").exists() else {}
    order = iter(masks.values())
    drawn: dict[tuple[int, str], torch.Tensor] = {}
    for module in ("embed", "q_proj", "c_attn", "conv", "head"):
        site = group[0].modules[module].site
        names = [f"{module}.weight"] if dense else [f"{module}.lora_A.weight", f"{module}.lora_B.weight"]
        for tensor in names:
            for t in range(len(group)):
                mask = next(order, torch.ones(()))
                drawn[t, tensor] = site.to_matrix(mask) if dense and masks else mask
    density = [case["options"]["density"]] * len(group)
    prune = reference.masked(lambda t, tensor, n: drawn[t, tensor].double().reshape(-1), density)
    vote = reference.vote_of(case["type"], case["options"].get("majority_sign_method", "total"))
    rank = case["options"].get("svd_rank") or max(m.rank for a in group for m in a.modules.values())
    for module, delta in theirs(folder, case).items():
        site = group[0].modules[module].site
        if dense:
            want = reference.on_deltas(group, module, case["weights"], prune, vote, rank)
        else:
            want = reference.on_factors(group, module, case["weights"], prune, vote)
        assert error(site.to_matrix(delta), want) < 1e-5, module


def test_default_is_right_where_peft_is_not(folder: Path) -> None:
    """rsLoRA of the first adapter does not leak, and one adapter is truncated."""
    group = opened(folder, "leaky")
    case = NAMED["leaky-cat"]
    right = merged(group, case, "default")
    for module, delta in theirs(folder, case).items():
        assert error(right.delta(module) * 8**0.5, delta) < 1e-5
    one = mk.merge_adapters(opened(folder, "one"), "svd", rank=2)
    assert {m.rank for m in one.report.modules.values()} == {2}
