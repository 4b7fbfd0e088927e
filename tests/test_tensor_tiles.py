"""Dense updates read in row tiles: against the same tensors in memory, from checkpoints, in bounded memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import engine_cases as cases
from mergekernels import MergeError, checkpoint_stacks
from mergekernels.ops import CP, TileStack, Tucker, cp_als, tucker
from stacks import dense, model, random_stack, relative

LOW = dense(random_stack((3, 2, 4), 40, 30))


def decaying(count: int, m: int, n: int, seed: int = 0) -> torch.Tensor:
    """Updates of full rank whose singular values fall like 1 / k^2 in common bases, with noise."""
    g = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64))[0] for d in (m, n))
    k = min(m, n)
    sizes = (1.0 + torch.rand(count, k, generator=g)) / torch.arange(1.0, k + 1.0) ** 2
    shared = torch.einsum("ik,tk,jk->tij", u[:, :k], sizes.double(), v[:, :k])
    return shared + 1e-3 * torch.randn(count, m, n, generator=g, dtype=torch.float64)


def tiles(x: torch.Tensor, **options: Any) -> TileStack:
    return TileStack(lambda first, last: x[:, first:last], tuple(x.shape), **options)  # type: ignore[arg-type]


def true_error(found: CP, x: torch.Tensor) -> float:
    return relative(model(found.factors), x.double())


@pytest.mark.parametrize("memory", [1, 20 * 3 * 30 * 7, 1 << 20])
def test_of_low_rank_it_is_the_same(memory: int) -> None:
    """The ranks sum to 9, which the bases hold: nothing is outside."""
    want = cp_als(LOW, 4, n_starts=2)
    found = cp_als(tiles(LOW, memory=memory), 4, n_starts=2)
    assert found.fit == pytest.approx(want.fit, abs=1e-4) and found.diagnostics["outside"] < 1e-6
    assert 1.0 - found.fit == pytest.approx(true_error(found, LOW), abs=1e-7)
    assert list(found.diagnostics["task_errors"]) == pytest.approx(
        [relative(x, y) for x, y in zip(model(found.factors), LOW, strict=True)], abs=1e-7
    )


def test_of_full_rank_the_error_is_true_and_near_that_in_memory() -> None:
    x = decaying(5, 60, 50)
    for options in ({}, {"weights": [1.0, 4.0, 0.5, 2.0, 1.0]}, {"normalize": "fro"}):
        want, found = cp_als(x, 6, **options), cp_als(tiles(x, memory=20000), 6, **options)  # type: ignore[arg-type]
        errors = [(y - z).square().sum((1, 2)) for y, z in ((model(c.factors), x) for c in (want, found))]
        norms = x.square().sum((1, 2))
        shares = torch.tensor(options.get("weights", [1.0] * 5)) / (norms if "normalize" in options else 1.0)
        total = float((shares * norms).sum())
        mine, theirs = (float((shares * e).sum() / total) ** 0.5 for e in reversed(errors))
        assert 1.0 - found.fit == pytest.approx(mine, abs=1e-7)
        assert mine <= 1.02 * theirs
        assert 0.0 < found.diagnostics["outside"] < mine


def test_tiles_do_not_show() -> None:
    x = decaying(3, 40, 50, seed=1).float()
    one, other = (cp_als(tiles(x, memory=size), 3, n_starts=2) for size in (1, 1 << 30))
    assert one.factors[1].dtype == torch.float32
    assert relative(model(one.factors), model(other.factors)) < 1e-5
    order = [2, 0, 1]
    turned = cp_als(tiles(x[order]), 3, n_starts=2)
    assert relative(model(turned.factors), model(other.factors)[order]) < 1e-5


@pytest.mark.parametrize("weights", [None, [1.0, 0.0, 3.0]])
def test_tucker(weights: list[float] | None) -> None:
    x = decaying(3, 40, 50, seed=2)
    want: Tucker = tucker(x, 5, 4, weights=weights)
    found: Tucker = tucker(tiles(x, memory=30000), 5, 4, weights=weights)
    assert found.error <= 1.001 * want.error and found.bounds[0] <= found.error <= found.bounds[1] + 1e-12
    back = torch.einsum("ip,tpq,jq->tij", found.u, found.cores, found.v)
    assert list(found.task_errors) == pytest.approx([relative(a, b) for a, b in zip(back, x, strict=True)], abs=1e-7)
    assert relative(found.cores, torch.einsum("ip,tij,jq->tpq", found.u, x, found.v)) < 1e-10
    both = tucker([tiles(x), tiles(LOW)], 3)
    assert [r.u.shape for r in both] == [(40, 3), (40, 3)]


def test_zero_and_unusable_stacks() -> None:
    zero = cp_als(tiles(torch.zeros(2, 6, 5)), 2)
    assert zero.fit == 1.0 and float(model(zero.factors).abs().max()) == 0.0
    half = cp_als(tiles(torch.cat([LOW[:1], 0.0 * LOW[:1]])), 3)
    assert half.fit == pytest.approx(1.0, abs=1e-6) and float(model(half.factors)[1].abs().max()) < 1e-9
    broken = LOW.clone()
    broken[1, 7, 3] = float("nan")
    wrong: list[tuple[Callable[[], Any], str]] = [
        (lambda: cp_als(tiles(broken), 3), "update 1 holds NaN or Inf"),
        (lambda: cp_als(TileStack(lambda i, j: LOW[:, :1], (3, 40, 30)), 3), "gives something else"),
        (lambda: cp_als([tiles(LOW), LOW], 3), "some modules are tiles"),
        (lambda: cp_als(tiles(LOW), 0), "rank"),
        (lambda: cp_als(tiles(LOW), 3, init=(None, [])), "explicit factors are not taken"),
        (lambda: cp_als(tiles(LOW), 3, weights=[1.0]), "weights are not usable"),
        (lambda: tucker(tiles(LOW), 0.5), "a share of the energy is not taken"),
        (lambda: TileStack(lambda i, j: LOW, (3, 40)), "shape is not usable"),  # type: ignore[arg-type]
        (lambda: tiles(LOW, passes=0), "passes"),
    ]
    for run, words in wrong:
        with pytest.raises(MergeError, match=words):
            run()


def test_bad_options_are_refused_before_anything_is_read() -> None:
    def unread(first: int, last: int) -> torch.Tensor:
        raise AssertionError("read")

    stack = TileStack(unread, (3, 40, 30))
    for options in ({"rank": 0}, {"n_starts": 0}, {"init": "best"}, {"weights": [0.0, 1.0, 1.0]}, {"normalize": "x"}):
        with pytest.raises(MergeError, match=r"not usable|rank|n_starts"):
            cp_als(stack, **{"rank": 2, **options})  # type: ignore[arg-type]


def test_checkpoints(tmp_path: Path) -> None:
    """Sharded bases, 16-bit values, embeddings as they lie."""
    base, *tunes = cases.state_dicts(dtype=torch.bfloat16)[:3]
    paths = [cases.save(tmp_path / f"m{i}", x, files=1 + i % 2) for i, x in enumerate((base, *tunes))]
    found = checkpoint_stacks(paths[0], paths[1:], memory=4096)
    assert len(found) > 1
    for module, stack in found.items():
        name = f"{module}.weight"
        x = torch.stack([t[name].float() - base[name].float() for t in tunes]).flatten(2)
        assert stack.shape == tuple(x.shape)
        assert torch.equal(torch.cat([rows for _, rows in stack.tiles()], 1), x)
        found_terms = cp_als(stack, 3, n_starts=1, max_iter=20)
        assert 1.0 - found_terms.fit == pytest.approx(true_error(found_terms, x), abs=1e-6)
    chosen = checkpoint_stacks(paths[0], paths[1:], include=["*.mlp"])
    assert set(chosen) < set(found)
    with pytest.raises(MergeError, match="not a list"):
        checkpoint_stacks(paths[0], [])
    with pytest.raises(MergeError, match="names no module"):
        checkpoint_stacks(paths[0], paths[1:], include=["x"])
    tunes[0][name] = tunes[0][name].clone()
    tunes[0][name].view(-1)[0] = float("inf")
    worse = cases.save(tmp_path / "worse", tunes[0])
    with pytest.raises(MergeError, match="holds NaN or Inf in rows 0"):
        cp_als(checkpoint_stacks(paths[0], [worse])[module], 2)


PROGRAM = """
import resource, torch
from mergekernels.ops import TileStack, cp_als
T, m, n = 4, 4096, 1024
g = torch.Generator().manual_seed(0)
b, a = torch.randn(T, m, 2, generator=g), torch.randn(T, 2, n, generator=g)
cp_als(TileStack(lambda i, j: b[:, i:j] @ a, (T, m, n), memory=1 << 20, passes=1), 2, n_starts=1, max_iter=3)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
small = TileStack(lambda i, j: b[:, i:j] @ a, (T, m, n), memory=8 << 20)
assert cp_als(small, 8, n_starts=2).fit > 0.999
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


def test_memory_is_bounded() -> None:
    """134 MB of updates in float64, factorised with some tens of MB: rows of 8 MiB, products and bases of 4 MB."""
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    assert int(run.stdout) < 40
