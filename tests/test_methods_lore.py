"""lore: against the loop with dense float64 decompositions, its objective, and both kinds of input."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch

import brute_spectral as brute
import mergekernels
from matrix_cases import dense, merge_all, merge_one, product, relative, rotation
from mergekernels._methods.arguments import bind_matrix
from mergekernels._methods.matrix_table import get_matrix
from mergekernels.adapters.model import Delta, Factors
from mergekernels.errors import ArgumentError

pytestmark = pytest.mark.usefixtures("one_thread")


def three() -> list[Factors]:
    return [product(48, 40, r, t, decay=0.8) for t, r in enumerate((4, 6, 3))]


def shrink(x: torch.Tensor, mu: float, prox: str) -> torch.Tensor:
    """The proximal map by a dense decomposition; the squared one by bisection of tau = mu sum (s - tau)_+."""
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    tau = mu
    if prox == "squared":
        low, high = 0.0, float(s[0])
        for _ in range(200):
            tau = (low + high) / 2
            low, high = (tau, high) if mu * float((s - tau).clamp_min(0).sum()) > tau else (low, tau)
    return u @ torch.diag((s - tau).clamp_min(0)) @ vh


def brute_lore(
    matrices: Sequence[torch.Tensor], mu: float, prox: str, sweeps: int = 20
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(virtual base, deviations) after some sweeps, by the loop as it is written down."""
    deviations = [torch.zeros_like(x) for x in matrices]
    for _ in range(sweeps):
        base = sum(x - d for x, d in zip(matrices, deviations, strict=True)) / len(matrices)
        deviations = [shrink(x - base, mu, prox) for x in matrices]
    return sum(x - d for x, d in zip(matrices, deviations, strict=True)) / len(matrices), deviations


@pytest.mark.parametrize("prox", ["plain", "squared"])
@pytest.mark.parametrize("mu", [0.01, 0.3, 5.0])
@pytest.mark.parametrize("kind", ["factors", "dense", "tall", "float64"])
def test_the_loop(prox: str, mu: float, kind: str) -> None:
    deltas: list[Delta] = list(three())
    if kind in ("dense", "float64"):
        deltas = [dense(d).to(torch.float32 if kind == "dense" else torch.float64) for d in deltas]
    if kind == "tall":
        deltas = [torch.randn(70, 12, generator=torch.Generator().manual_seed(t)) for t in range(3)]
    base, deviations = brute_lore([dense(d) for d in deltas], mu, prox)
    want = base + 1.7 * sum(deviations) / 3
    takes = "adapters" if kind == "factors" else "models"
    result = merge_all("lore", {"a": deltas}, takes=takes, mu=mu, prox=prox, tau_scale=1.7)["a"]
    assert relative(dense(result.delta), want) < 1e-5
    assert isinstance(result.delta, Factors) == (kind == "factors")
    ranks = [int((torch.linalg.svdvals(d) > 1e-9).sum()) for d in deviations]
    assert result.report["iterations"] <= 20
    assert all(abs(a - b) <= 1 for a, b in zip(result.report["ranks"], ranks, strict=True))


def objective(base: torch.Tensor, matrices: Sequence[torch.Tensor], mu: float, prox: str) -> float:
    """Of a virtual base, with the best deviations from it."""
    total = 0.0
    for x in matrices:
        d = shrink(x - base, mu, prox)
        nuclear = float(torch.linalg.svdvals(d).sum())
        total += float((base + d - x).square().sum()) + (2 * mu * nuclear if prox == "plain" else mu * nuclear**2)
    return total


@pytest.mark.parametrize("prox", ["plain", "squared"])
def test_the_objective_never_rises(prox: str) -> None:
    deltas = three()
    matrices = [dense(d) for d in deltas]
    values = []
    for sweeps in range(1, 12):
        base = merge_one("lore", deltas, mu=0.5, prox=prox, iterations=sweeps, tau_scale=0.0)
        values.append(objective(base, matrices, 0.5, prox))
    assert all(after <= before * (1 + 1e-7) for before, after in pairwise(values))
    assert values[-1] < values[0] * 0.999


def test_what_gives_the_average() -> None:
    """mu = 0, or mu beyond every singular value, or tau the mean at scale 1 once converged."""
    deltas = three()
    mean = sum(dense(d) for d in deltas) / 3
    assert relative(merge_one("lore", deltas, mu=0.0), mean) < 1e-6
    assert relative(merge_one("lore", deltas, mu=1e4, tau_scale=3.0), mean) < 1e-6
    result = merge_all("lore", {"a": deltas}, iterations=400)["a"]
    assert relative(dense(result.delta), mean) < 1e-5
    assert "plain average" in result.warnings[0]
    for other in ({"tau_scale": 2.0}, {"tau": "ties"}):
        assert not merge_all("lore", {"a": deltas}, **other)["a"].warnings


def test_it_stops() -> None:
    deltas = three()
    result = merge_all("lore", {"a": deltas}, iterations=100000, mu=0.5, tau_scale=2.0)["a"]
    assert 2 < result.report["iterations"] < 100000 and result.report["change"] <= 1e-6
    assert merge_all("lore", {"a": deltas}, iterations=3, mu=0.5)["a"].report["iterations"] == 3
    one = merge_all("lore", {"a": deltas[:1]}, tau_scale=5.0)["a"]
    assert relative(dense(one.delta), dense(deltas[0])) < 1e-6  # the virtual base is the model itself
    assert one.report["iterations"] == 1


@pytest.mark.parametrize("takes", ["adapters", "models"])
def test_ties_of_the_deviations(takes: str) -> None:
    factors = three()
    deltas: list[Delta] = list(factors) if takes == "adapters" else [dense(f).float() for f in factors]
    base, deviations = brute_lore([dense(d) for d in factors], 0.5, "plain")
    tau = brute.ties({"": deviations}, 0.4, [1.0] * 3)[""]
    result = merge_all("lore", {"a": deltas}, takes=takes, mu=0.5, tau="ties", density=0.4, tau_scale=0.8)["a"]
    # Element-wise rules on rounded deviations: an entry at the threshold may fall on either side.
    assert relative(dense(result.delta), base + 0.8 * tau) < 1e-3
    assert not isinstance(result.delta, Factors)
    off = (dense(result.delta) - base - 0.8 * tau).abs() > 1e-5 * float(tau.abs().max())
    assert int(off.sum()) <= 6


@pytest.mark.parametrize("prox", ["plain", "squared"])
def test_rotation_permutation_and_shift(prox: str) -> None:
    deltas = [Factors(d.b.double(), d.a.double()) for d in three()]

    def f(given: Sequence[Delta], takes: str = "adapters") -> torch.Tensor:
        return merge_one("lore", given, mu=0.5, prox=prox, tau_scale=2.0, takes=takes)

    plain = f(deltas)
    q, p = rotation(48, 1), rotation(40, 2)
    assert relative(f([Factors(q @ d.b, d.a @ p) for d in deltas]), q @ plain @ p) < 1e-9
    assert relative(f(deltas[::-1]), plain) < 1e-9
    assert relative(f([dense(d) for d in deltas], "models"), plain) < 1e-7
    # Base-free: what all models have in common goes into the virtual base.
    shift = torch.randn(48, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    assert relative(f([dense(d) + shift for d in deltas], "models"), plain + shift) < 1e-7


def test_stacks_without_full_rank() -> None:
    a, b, c = three()
    zero, absent = Factors(torch.zeros(48, 2), torch.randn(2, 40)), Factors(torch.zeros(48, 0), torch.zeros(0, 40))
    wide = [product(48, 40, 20, 10 + i) for i in range(3)]
    for given in ([a, a, b], [a, zero, b], [a, absent, c], wide):
        base, deviations = brute_lore([dense(d) for d in given], 0.5, "plain")
        want = base + 2 * sum(deviations) / len(given)
        assert relative(merge_one("lore", given, mu=0.5, tau_scale=2.0), want) < 1e-5
    for tau in ("mean", "ties"):
        assert float(merge_one("lore", [zero, absent], tau=tau).norm()) == 0.0
        assert float(merge_one("lore", [absent, absent], tau=tau).norm()) == 0.0


def test_without_a_base() -> None:
    draw = torch.Generator().manual_seed(1)
    models = [{"a": torch.randn(24, 30, generator=draw), "b": torch.randn(5, generator=draw)} for _ in range(3)]
    got = mergekernels.merge_state_dicts(models, "lore", mu=0.5, tau_scale=2.0)
    base, deviations = brute_lore([m["a"].double() for m in models], 0.5, "plain")
    assert relative(got["a"], base + 2 * sum(deviations) / 3) < 1e-5
    assert relative(got["b"], sum(m["b"] for m in models) / 3) < 1e-6
    zero = {n: torch.full_like(x, 0.25) for n, x in models[0].items()}
    assert (
        relative(mergekernels.merge_state_dicts(models, "lore", base=zero, mu=0.5, tau_scale=2.0)["a"], got["a"]) < 1e-5
    )


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"mu": -1.0}, "at least 0"),
        ({"iterations": 0}, "[1, 100000]"),
        ({"density": 0.5}, "'density' is a parameter of tau ties"),
        ({"tau": "ties", "density": 2.0}, "[0, 1]"),
        ({"tau": "ties", "inner_dialect": "code"}, "one of default, paper, peft"),
        ({"prox": "cubed"}, "one of plain, squared"),
    ],
)
def test_refused(asked: dict[str, object], said: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        bind_matrix(get_matrix("lore", "adapters"), asked, 3, "default")
    assert said in f"{caught.value} {caught.value.expected}"
