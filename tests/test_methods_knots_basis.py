"""The shared basis of KnOTS: singular values, cuts, and thresholds on the coordinates as they are generated."""

from __future__ import annotations

import pytest
import torch

import brute_spectral as brute
from matrix_cases import dense, merge_all, merge_one, product, relative
from mergekernels._methods.spectral.tied import tie
from mergekernels.adapters.model import Factors
from mergekernels.errors import ArgumentError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kind", ["gap", "flat", "head", "ill", "deficient"])
def test_singular_values(kind: str) -> None:
    """To 1e-10 of the largest, whatever the spectrum; the rank of a deficient stack is found."""
    decay = {"gap": 0.5, "flat": 1.0, "head": 1.0, "ill": 0.35, "deficient": 0.9}[kind]
    given = [product(60, 50, 8, t, torch.float64, decay) for t in range(3)]
    if kind == "head":
        given = [Factors(f.b * torch.tensor([100.0] + [1.0] * 7, dtype=torch.float64), f.a) for f in given]
    if kind == "deficient":
        given.append(given[0])
    want = torch.linalg.svdvals(torch.cat([dense(f) for f in given], 1))
    tied = tie(given, 1e-9, False)
    k = tied.rank
    assert k == 24
    assert float((tied.s - want[:k]).abs().max()) < 1e-10 * float(want[0])
    u = tied.basis()
    assert float((u.T @ u - torch.eye(k, dtype=torch.float64)).abs().max()) < (1e-12 if kind == "deficient" else 1e-9)
    assert bool((u.gather(0, u.abs().argmax(0)[None]) > 0).all())
    for f, coefficients in zip(given, tied.coefficients, strict=True):
        assert relative(u.T @ f.b, coefficients) < 1e-9
    if kind != "deficient":  # what is kept between passes gives the same
        assert tied.small is not None
        again = tie(given, 1e-9, False, tied.small)
        assert relative(again.basis(), u) < 1e-12 and torch.equal(again.s, tied.s)
    else:
        assert tied.small is None


def test_cuts() -> None:
    """Relative by default, absolute in the dialects of the tools."""
    given = [
        Factors(product(40, 30, 6, t).b * torch.tensor([1.0, 1.0, 1.0, 1e-3, 1e-5, 1e-8]), product(40, 30, 6, t).a)
        for t in range(2)
    ]
    s = torch.linalg.svdvals(torch.cat([dense(f) for f in given], 1))
    cases = {
        "default": s > s[0] * 12 * torch.finfo(torch.float32).eps,
        "code": s > 1e-5,
        "fusionbench": s > 1e-4,
    }
    for dialect, kept in cases.items():
        got = merge_all("knots", {"a": given}, inner="task_arithmetic", dialect=dialect)["a"]
        assert got.report["rank"] == int(kept.sum()), dialect
    assert merge_all("knots", {"a": given}, inner="task_arithmetic", cut=0.01)["a"].report["rank"] == int(
        (s > 0.01 * s[0]).sum()
    )
    with pytest.raises(ArgumentError, match="cut is a share"):
        merge_one("knots", given, cut=1.0)


def test_thresholds_are_exact() -> None:
    """Count and the strictly larger set, on the coordinates as they are generated."""
    given = [product(48, 40, r, t, decay=0.9) for t, r in enumerate((4, 6))]
    tied = tie(given, None, False)
    parts = tied.rows(0, tied.rank, torch.float32)
    n = parts[0].numel()
    result = merge_one("knots", given, density=0.25, weights=[1.0, 0.0])
    z = tied.basis().T @ result
    count = int(0.25 * n) + 1
    tau = parts[0].abs().flatten().sort(descending=True).values[count - 1]
    # Of the first adapter, everything above the threshold that wins its vote is there, and nothing below.
    above = parts[0].abs() >= tau
    assert int(above.sum()) == count
    assert float(z[~above].abs().max()) < 1e-6
    second = brute.kept(parts[1].double(), count)
    wins = above & (parts[0].sign() == (torch.where(above, parts[0], 0.0).double() + second).sign())
    assert bool((z[wins].abs() > 0.4 * tau).all())
