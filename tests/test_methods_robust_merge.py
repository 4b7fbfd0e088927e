"""robust_merge: against its formulas in float64, dialects, and factors that pruning empties."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from matrix_cases import dense, merge_all, merge_one, product, relative
from mergekernels._methods.arguments import bind_matrix
from mergekernels._methods.matrix import folds_scale
from mergekernels._methods.matrix_table import get_matrix
from mergekernels.adapters.model import Factors
from mergekernels.errors import ArgumentError

pytestmark = pytest.mark.usefixtures("one_thread")


def three(rank: int = 5) -> list[Factors]:
    return [product(48, 40, rank, seed) for seed in range(3)]


def pruned(x: torch.Tensor, keep: float) -> torch.Tensor:
    """All entries at or above the int((1 - keep) n)-th smallest magnitude."""
    x = x.double()
    place = int((1.0 - keep) * x.numel())
    if place == 0:
        return x
    tau = x.abs().flatten().sort().values[place - 1]
    return torch.where(x.abs() >= tau, x, 0.0)


def brute(factors: Sequence[Factors], keep: float, clamp: float, scale: float) -> torch.Tensor:
    """scale (sum of B~ diag(c~)) (sum of A~)."""
    bs, as_ = [pruned(f.b, keep) for f in factors], [pruned(f.a, keep) for f in factors]
    ratios = []
    for f, a in zip(factors, as_, strict=True):
        left = a.abs().sum(1)
        c = torch.where(left > 0, f.a.double().abs().sum(1) / left.where(left > 0, torch.ones(())), 0.0)
        if clamp:
            c = c.clamp_min(c.sort().values[int(clamp * len(c))])
        ratios.append(torch.where(left > 0, c, 0.0))
    total = torch.stack(ratios).sum(0)
    safe = total.where(total > 0, torch.ones(()))
    b = sum(x * (c / safe) for x, c in zip(bs, ratios, strict=True))
    return scale * b @ sum(as_)


@pytest.mark.parametrize("keep", [0.05, 0.2, 0.5, 1.0])
@pytest.mark.parametrize(
    ("dialect", "clamp", "scale"), [("default", 0.8, 4.0), ("code", 0.8, 4.0), ("paper", 0.0, 2.0)]
)
def test_formulas(keep: float, dialect: str, clamp: float, scale: float) -> None:
    got = merge_one("robust_merge", three(), keep=keep, dialect=dialect)
    assert relative(got, brute(three(), keep, clamp, scale)) < 1e-6


def test_defaults_and_parameters() -> None:
    plain = merge_one("robust_merge", three())
    assert relative(plain, merge_one("robust_merge", three(), keep=0.2, clamp=0.8, factor_scale=2.0)) == 0.0
    assert relative(merge_one("robust_merge", three(), factor_scale=1.0), plain / 4) < 1e-6
    assert (
        relative(
            merge_one("robust_merge", three(), factor_scale=1.0, dialect="paper"),
            merge_one("robust_merge", three(), dialect="paper") / 2,
        )
        < 1e-6
    )
    third = merge_one("robust_merge", three(), clamp=0.0, keep=0.8, factor_scale=1.0)
    assert relative(third, brute(three(), 0.8, 0.0, 1.0)) < 1e-6
    assert relative(plain, merge_one("robust_merge", three(), clamp=0.0)) > 1e-3


def test_all_kept_without_clamp_is_the_mean_of_b_times_the_sum_of_a() -> None:
    factors = three()
    want = sum(f.b.double() for f in factors) / 3 @ sum(f.a.double() for f in factors)
    got = merge_one("robust_merge", factors, keep=1.0, clamp=0.0, factor_scale=2.0, dialect="paper")
    assert relative(got, 2.0 * want) < 1e-6


def test_permutation_and_scale() -> None:
    plain = merge_one("robust_merge", three())
    assert relative(merge_one("robust_merge", three()[::-1]), plain) < 1e-6
    assert relative(merge_one("robust_merge", [Factors(f.b * 3, f.a) for f in three()]), 3 * plain) < 1e-6
    assert relative(merge_one("robust_merge", [Factors(-f.b, f.a) for f in three()]), -plain) < 1e-6


def test_exact_thresholds_and_ties() -> None:
    """Equal magnitudes at the threshold all stay."""
    b = torch.tensor([[4.0, -2.0], [2.0, 1.0], [0.5, 2.0]])
    a = torch.tensor([[1.0, 0.25, -1.0], [8.0, 1.0, 0.5]])
    # keep 0.5 of 6: the 3rd smallest of B is 2 (0.5, 1, 2, ...), of A 1 (0.25, 0.5, 1, ...).
    got = merge_all("robust_merge", {"a": [Factors(b, a)]}, keep=0.5, clamp=0.0, factor_scale=1.0, dialect="paper")["a"]
    kept_b = torch.tensor([[4.0, -2.0], [2.0, 0.0], [0.0, 2.0]])
    kept_a = torch.tensor([[1.0, 0.0, -1.0], [8.0, 1.0, 0.0]])
    assert isinstance(got.delta, Factors)
    assert torch.equal(got.delta.b, kept_b) and torch.equal(got.delta.a, kept_a)


def test_a_row_that_is_pruned_away() -> None:
    """It counts nothing and is reported; the others share its part."""
    one, two, _ = three()
    weak = Factors(one.b, one.a * torch.tensor([1.0, 1.0, 1e-6, 1.0, 1.0])[:, None])
    result = merge_all("robust_merge", {"q_proj": [weak, two]})["q_proj"]
    assert result.report["rows_lost"] == 1 and "1 rows of A" in result.warnings[0] and "q_proj" in result.warnings[0]
    assert relative(dense(result.delta), brute([weak, two], 0.2, 0.8, 4.0)) < 1e-6
    both = merge_all("robust_merge", {"q_proj": [weak, Factors(two.b, weak.a)]})["q_proj"]
    assert bool(torch.isfinite(dense(both.delta)).all())
    assert isinstance(both.delta, Factors) and float(both.delta.b[:, 2].abs().max()) == 0.0
    assert not merge_all("robust_merge", {"q_proj": [two]})["q_proj"].warnings


def test_zero_and_absent_adapters() -> None:
    a, b, _ = three()
    zero = Factors(torch.zeros(48, 5), torch.zeros(5, 40))
    absent = Factors(torch.zeros(48, 0), torch.zeros(0, 40))
    assert relative(merge_one("robust_merge", [a, absent, b]), merge_one("robust_merge", [a, b])) < 1e-6
    assert relative(merge_one("robust_merge", [a, zero, b]), merge_one("robust_merge", [a, b])) < 1e-6
    assert float(merge_one("robust_merge", [zero, zero]).norm()) == 0.0
    nothing = merge_all("robust_merge", {"a": [absent]})["a"]
    assert float(dense(nothing.delta).norm()) == 0.0 and nothing.warnings


def test_refused() -> None:
    method = get_matrix("robust_merge", "adapters")
    with pytest.raises(ArgumentError, match="one rank") as caught:
        merge_all("robust_merge", {"layers.3.q_proj": [product(48, 40, 4, 0), product(48, 40, 5, 1)]})
    assert caught.value.tensor == "layers.3.q_proj" and caught.value.got == "4, 5"
    assert method.wants({}, "default").equal_ranks  # type: ignore[attr-defined]
    for asked in ({"clamp": 1.0}, {"keep": 1.5}, {"weights": [1.0, 2.0]}, {"keep": -0.1}):
        with pytest.raises(ArgumentError):
            bind_matrix(method, asked, 2, "default")


def test_whether_alpha_is_folded() -> None:
    method = get_matrix("robust_merge", "adapters")
    for dialect, asked, folded in (
        ("default", None, True),
        ("paper", None, True),
        ("code", None, False),
        ("code", True, True),
        ("default", False, False),
    ):
        given = {} if asked is None else {"fold_scale": asked}
        assert folds_scale(bind_matrix(method, given, 2, dialect), dialect) is folded


def test_float64() -> None:
    wide = [Factors(f.b.double(), f.a.double()) for f in three()]
    assert relative(merge_one("robust_merge", wide), brute(wide, 0.2, 0.8, 4.0)) < 1e-14
