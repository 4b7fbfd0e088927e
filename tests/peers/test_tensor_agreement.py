"""cp_als and tucker beside TensorLy in float64: sweep by sweep from one start, fits, planted terms.

Needs TensorLy in an environment of its own, as `test_mergekit_agreement`. Reconstructions and errors are compared,
never factors. TensorLy has no proximal term, so prox is 0 here, and it solves its Gram by LU where we use Cholesky.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergekernels.ops import cp_als, tucker
from stacks import Stack, dense, model, planted_stack, random_stack, relative

PEER = os.environ.get("MERGEKERNELS_PEER_ENV")

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(PEER is None, reason="MERGEKERNELS_PEER_ENV names no environment with TensorLy"),
]

SWEEPS = (1, 2, 5, 30)
P, P2 = 4, 3


def noisy(ranks: tuple[int, ...], m: int, n: int, terms: int) -> Stack:
    """Shared terms and 5 % of something else of full rank."""
    planted, _ = planted_stack(len(ranks), m, n, terms, seed=2)
    rest = random_stack(ranks, m, n, seed=3)
    size = 0.05 * float(dense(planted).norm() / dense(rest).norm())
    return [(torch.cat([b, size * d], 1), torch.cat([a, c], 0)) for (b, a), (d, c) in zip(planted, rest, strict=True)]


# Name: (stack, CP rank). The rank is above the number of adapters, of one adapter, and of what is planted in turn.
CASES: dict[str, tuple[Stack, int]] = {
    "random": (random_stack((4, 4, 4, 4), 40, 30), 5),
    "mixed ranks": (random_stack((1, 6, 2), 30, 40, seed=1), 4),
    "no smaller core": (random_stack((8, 8, 8), 15, 12, seed=4), 6),
    "planted": (planted_stack(6, 30, 25, 4)[0], 4),
    "planted and noise": (noisy((3, 3, 3, 3, 3), 30, 25, 4), 4),
}


@dataclass(frozen=True)
class Case:
    stack: Stack
    start: list[torch.Tensor]
    theirs: dict[str, torch.Tensor]

    @property
    def rank(self) -> int:
        return int(self.start[0].shape[1])


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A stack, a start in the span of its columns and rows, and what TensorLy makes of them."""
    assert PEER is not None
    stack, rank = CASES[request.param]
    g = torch.Generator().manual_seed(5)
    columns = sum(b.shape[1] for b, _ in stack)
    mixtures = [torch.randn(columns, rank, generator=g, dtype=torch.float64) for _ in range(2)]
    start = [
        torch.randn(len(stack), rank, generator=g, dtype=torch.float64),
        torch.cat([b for b, _ in stack], 1) @ mixtures[0],
        torch.cat([a.mT for _, a in stack], 1) @ mixtures[1],
    ]
    folder = tmp_path_factory.mktemp("tensor")
    fields = dict(zip(("c0", "u0", "v0"), start, strict=True))
    options = {"sweeps": ",".join(map(str, SWEEPS)), "iterations": "400", "p": str(P), "p2": str(P2)}
    save_file({"x": dense(stack), **fields}, folder / "in.safetensors", options)
    command = [str(Path(PEER) / "bin" / "python"), str(Path(__file__).parent / "peer_tensor.py")]
    command += [str(folder / "in.safetensors"), str(folder / "out.safetensors")]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr[-4000:]
    return Case(stack, start, load_file(folder / "out.safetensors"))


def error_of(result: torch.Tensor, stack: Stack) -> float:
    return relative(result, dense(stack))


@pytest.mark.parametrize("sweeps", SWEEPS)
def test_sweeps_agree(case: Case, sweeps: int) -> None:
    options: dict[str, Any] = {"init": (None, case.start), "prox": 0.0, "tol": 0.0, "max_iter": sweeps}
    found = cp_als(case.stack, case.rank, **options)
    want = case.theirs[f"errors {sweeps}"].tolist()
    # Both errors are roots of differences of squares: near zero only 1e-7 of them is left.
    assert list(found.history) == pytest.approx(want, abs=1e-7)
    assert relative(model(found.factors), case.theirs[f"model {sweeps}"]) < 1e-6


def test_fit_is_no_worse_than_theirs(case: Case) -> None:
    """From TensorLy's own start by SVD, and from ours; 1e-3 of the error is what two ends of one valley may differ."""
    theirs = error_of(case.theirs["own"], case.stack)
    start = [case.theirs[f"own start {i}"] for i in range(3)]
    same = cp_als(case.stack, case.rank, init=(None, start), max_iter=400, tol=1e-10)
    ours = cp_als(case.stack, case.rank, max_iter=400, tol=1e-10)
    assert error_of(model(ours.factors), case.stack) <= 1.001 * theirs + 1e-6
    assert error_of(model(same.factors), case.stack) <= 1.02 * theirs + 1e-6


def test_tucker_agrees(case: Case) -> None:
    found = tucker(case.stack, P, P2, max_iter=500, tol=1e-12)
    ours = torch.einsum("ip,tpq,jq->tij", found.u, found.cores, found.v)
    assert error_of(ours, case.stack) == pytest.approx(found.error, abs=1e-9)
    assert found.error <= error_of(case.theirs["tucker"], case.stack) + 1e-7
    assert relative(ours, case.theirs["tucker"]) < 1e-3
