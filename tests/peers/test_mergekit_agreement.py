"""Bit agreement with mergekit 0.1.5 run in float32, through both real command lines.

Needs mergekit in an environment of its own: `bash benchmarks/make_peer_env.sh DIR`, MERGEKERNELS_PEER_ENV=DIR.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peer_arithmetic import linear, threshold, ties_outcomes
from peer_cases import CASES, MODELS, Case, make_checkpoint
from safetensors.torch import load_file

PEER = os.environ.get("MERGEKERNELS_PEER_ENV")

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(PEER is None, reason="MERGEKERNELS_PEER_ENV names no environment with mergekit"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints, recipes, and what mergekit makes of all of them: <case>.yml, theirs/<case>."""
    assert PEER is not None
    root = tmp_path_factory.mktemp("peers")
    for name in MODELS:
        make_checkpoint(root / name, name)
    arguments: list[str] = []
    for name, case in CASES.items():
        recipe = root / f"{name}.yml"
        recipe.write_text(case.text(root))
        arguments += [str(recipe), str(root / "theirs" / name)]
    driver = Path(__file__).parent / "peer_driver.py"
    command = [str(Path(PEER) / "bin" / "python"), str(driver), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr[-4000:]
    return root


def _load(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def _ours(folder: Path, name: str) -> Path:
    command = shutil.which("mergekernels", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    assert command is not None
    out = folder / "ours" / name
    out.parent.mkdir(exist_ok=True)
    run = subprocess.run(
        [command, "run", str(folder / f"{name}.yml"), str(out), "--quiet"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return out


def _tied(case: Case, folder: Path) -> dict[str, torch.Tensor]:
    """Per tensor: where a magnitude equals the threshold of its model and only some of the equals can be kept."""
    base = _load(folder / case.base)
    result = {name: torch.zeros(tensor.shape, dtype=torch.bool) for name, tensor in base.items()}
    for model, density in case.trimmed.items():
        for name, tensor in _load(folder / model).items():
            magnitude = (tensor.float() - base[name].float()).abs()
            value, cut = threshold(magnitude, density(name))
            if cut:
                result[name] |= magnitude == value
    return result


def _ordered(x: torch.Tensor) -> torch.Tensor:
    """Numbers whose difference counts units in the last place."""
    bits = x.view({2: torch.int16, 4: torch.int32}[x.element_size()]).long()
    sign = -(1 << (8 * x.element_size() - 1))
    return torch.where(bits < 0, sign - bits, bits)


@pytest.mark.parametrize("name", CASES)
def test_agreement(folder: Path, name: str) -> None:
    case = CASES[name]
    out = _ours(folder, name)
    ours, theirs = _load(out), _load(folder / "theirs" / name)
    assert ours.keys() == theirs.keys()
    tied = _tied(case, folder) if case.trimmed else {}
    elements = cut = rounded = 0
    for tensor, expected in theirs.items():
        got = ours[tensor]
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape), tensor
        distance = (_ordered(got) - _ordered(expected)).abs()
        differs = distance > 0
        at_tie = tied.get(tensor, torch.zeros((), dtype=torch.bool)) & differs
        cut += int(at_tie.sum())
        unexplained = differs & ~at_tie
        rounded += int(unexplained.sum())
        elements += got.numel()
        # More than one unit only where terms nearly cancel: the result's unit is then below float32's of the terms.
        far = unexplained & (distance > 1)
        error = (got.double() - expected.double()).abs()[far]
        assert not far.any() or float(error.max()) <= 2**-22 * float(expected.abs().max()), tensor
    print(f"{name}: {elements} elements, {cut} differ at ties, {rounded} in the last bit")
    if case.ties:
        base, inputs = _load(folder / case.base), {model: _load(folder / model) for model in case.ties}
        for tensor, expected in theirs.items():
            models = [(weight, case.trimmed[m](tensor), inputs[m][tensor]) for m, weight in case.ties.items()]
            where = ours[tensor] != expected
            outcomes = ties_outcomes(base[tensor], models, where, case.normalize, case.scale).to(expected.dtype)
            for result in (ours[tensor], expected):
                assert bool((outcomes == result[where]).any(0).all()), tensor
    if case.linear:
        inputs = {model: _load(folder / model) for model in case.linear}
        for tensor, expected in theirs.items():
            sources = [(weight, inputs[model][tensor]) for model, weight in case.linear.items()]
            separate, fused = (linear(sources, case.normalize, f).to(expected.dtype) for f in (False, True))
            assert torch.equal(ours[tensor], separate), tensor
            # A processor or build of torch without fused instructions rounds twice as well.
            assert torch.equal(expected, fused) or torch.equal(expected, separate), tensor
    else:
        assert rounded <= case.rounding * elements / 1e6


@pytest.mark.parametrize("name", ["linear-five", "stack-passthrough", "task-arithmetic-lambda"])
def test_config(folder: Path, name: str) -> None:
    ours = folder / "ours" / name
    if not ours.exists():
        _ours(folder, name)
    got = json.loads((ours / "config.json").read_text())
    expected = json.loads((folder / "theirs" / name / "config.json").read_text())
    for key in ("num_hidden_layers", "vocab_size", "hidden_size", "tie_word_embeddings", "model_type"):
        assert got[key] == expected[key], key
    dtype = expected.get("dtype", expected.get("torch_dtype"))
    assert dtype in {got.get("dtype"), got.get("torch_dtype")}
