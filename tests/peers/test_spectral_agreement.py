"""tsv_m, iso_c and iso_cts beside FusionBench's own functions, run by the Python of its environment.

Make it by `bash benchmarks/make_peer_env.sh DIR fusionbench`, and say MERGEKERNELS_FUSIONBENCH_ENV=DIR. Task vectors
are of full rank, since theirs gives weight to what LAPACK returns for singular values of zero. Spectra fall by 3 % a
value, so that every cut has a gap; merged task vectors are compared, never singular vectors.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mergekernels as mk
import spectral_brute as brute

PEER = os.environ.get("MERGEKERNELS_FUSIONBENCH_ENV")

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(PEER is None, reason="MERGEKERNELS_FUSIONBENCH_ENV names no environment with FusionBench"),
]

TASKS = 5
SHAPES = {"square": (60, 60), "tall": (96, 48), "wide": (48, 96), "odd": (53, 47), "flat": (64, 40)}
PLAIN = {"vector": (17,), "conv": (6, 4, 3)}
FRACTIONS = ("0.8", "0.5", "1.0")

BOUND = 2e-5
"""Relative, Frobenius norm: both sides work in float32 on matrices of condition up to 6, stacked ones up to 60."""


def task(name: str, t: int) -> torch.Tensor:
    """The task vector of one tensor."""
    if name in PLAIN:
        return torch.randn(PLAIN[name], generator=torch.Generator().manual_seed(100 + t))
    m, n = SHAPES[name]
    fall = 1.0 if name == "flat" else 0.97
    values = [fall**i * (1.0 + 0.05 * t) for i in range(min(m, n))]
    if name == "flat":  # Gaussian noise: no gap anywhere
        return torch.randn(m, n, generator=torch.Generator().manual_seed(t))
    return brute.with_spectrum(m, n, values, 10 * t + len(name), torch.float32)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What FusionBench makes of all cases."""
    assert PEER is not None
    folder = tmp_path_factory.mktemp("spectral")
    names = [*SHAPES, *PLAIN]
    given = {f"{t}/{name}": task(name, t) for t in range(TASKS) for name in names}
    save_file(given, folder / "in.safetensors", {"fractions": ",".join(FRACTIONS)})
    command = [str(Path(PEER) / "bin" / "python"), str(Path(__file__).parent / "peer_spectral.py")]
    command += [str(folder / "in.safetensors"), str(folder / "out.safetensors")]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr[-4000:]
    return load_file(folder / "out.safetensors")


METHODS = ["tsv_m", "iso_c", *(f"iso_cts {f}" for f in FRACTIONS)]


@pytest.mark.parametrize("name", [*SHAPES, *PLAIN])
@pytest.mark.parametrize("method", METHODS)
def test_ours_equals_theirs(theirs: dict[str, torch.Tensor], method: str, name: str) -> None:
    plain, _, fraction = method.partition(" ")
    options = {"common_space_fraction": float(fraction)} if fraction else {}
    given = [task(name, t) for t in range(TASKS)]
    # Theirs averages what has more than two dimensions.
    found = mk.merge(given, plain, base=torch.zeros_like(given[0]), conv="mean", **options)
    want = theirs[f"{method}/{name}"]
    assert found.shape == want.shape
    assert brute.error(found, want) <= BOUND
    # The bound tells methods apart: no other one's result comes near.
    if name in SHAPES and not (plain != "tsv_m" and fraction in ("", "1.0")):
        others = [m for m in METHODS if m != method]
        assert min(brute.error(found, theirs[f"{m}/{name}"]) for m in others) > 100 * BOUND
