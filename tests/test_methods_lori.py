"""lori: masks by exact thresholds over groups of modules, then the sum; and from_norm of adapters."""

from __future__ import annotations

import math

import pytest
import torch

from matrix_cases import dense, merge_all, merge_one, product, relative, rotation
from mergekernels._methods.adapters.lori import group_of
from mergekernels._methods.arguments import bind_matrix
from mergekernels._methods.matrix import MatrixSpec
from mergekernels._methods.matrix_table import get_matrix
from mergekernels.adapters.model import Delta, Factors
from mergekernels.errors import ArgumentError

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = {
    "model.layers.0.self_attn.q_proj.weight": (48, 40),
    "model.layers.0.self_attn.v_proj.weight": (24, 40),
    "model.layers.0.mlp.up_proj.weight": (64, 40),
    "model.layers.1.self_attn.q_proj.weight": (48, 40),
    "lm_head.weight": (30, 40),
}


def family(ranks: tuple[int, ...] = (4, 6)) -> dict[str, list[Delta]]:
    return {
        name: [product(m, n, r, 10 * i + t) for t, r in enumerate(ranks)]
        for i, (name, (m, n)) in enumerate(SHAPES.items())
    }


GROUPS = {
    "model": [0, 0, 0, 0, 0],
    "module": ["self_attn", "self_attn", "mlp", "self_attn", ""],
    "projection": ["q_proj", "v_proj", "up_proj", "q_proj", "lm_head"],
    "layer": [0, 0, 0, 1, "head"],
    "matrix": [0, 1, 2, 3, 4],
}


def masked(given: dict[str, list[Delta]], sparsity: float, granularity: str) -> dict[str, list[Factors]]:
    """B with everything below the k-th largest of its group zero, k = int((1 - sparsity) N)."""
    groups = dict(zip(SHAPES, GROUPS[granularity], strict=True))
    found: dict[str, list[Factors]] = {name: [] for name in given}
    for t in range(len(next(iter(given.values())))):
        blocks = {name: deltas[t].b for name, deltas in given.items() if isinstance(deltas[t], Factors)}
        for name in given:
            together = torch.cat([b.flatten() for other, b in blocks.items() if groups[other] == groups[name]])
            k = int((1.0 - sparsity) * len(together))
            b = blocks[name]
            if k == 0:
                b = torch.zeros_like(b)
            elif k < len(together):
                b = torch.where(b.abs() >= together.abs().sort(descending=True).values[k - 1], b, 0.0)
            found[name].append(Factors(b, given[name][t].a))  # type: ignore[union-attr]
    return found


@pytest.mark.parametrize("granularity", list(GROUPS))
@pytest.mark.parametrize("sparsity", [0.9, 0.35])
def test_masks(granularity: str, sparsity: float) -> None:
    given = family()
    got = merge_all("lori", given, sparsity=sparsity, granularity=granularity, weights=[0.5, 0.7])
    for name, factors in masked(given, sparsity, granularity).items():
        want = torch.cat([0.5 * factors[0].b, 0.7 * factors[1].b], 1)
        delta = got[name].delta
        assert isinstance(delta, Factors)
        assert torch.equal(delta.b, want.float()), name  # what is masked is exactly zero
        assert relative(dense(delta), 0.5 * dense(factors[0]) + 0.7 * dense(factors[1])) < 1e-6
        assert got[name].report["kept"] == [float(f.b.count_nonzero()) / f.b.numel() for f in factors]


def test_the_count_is_exact_over_a_large_model() -> None:
    """Above 131,072 entries a sample brackets the threshold."""
    given: dict[str, list[Delta]] = {f"layers.{i}.w": [product(3000, 20, 16, i)] for i in range(4)}
    got = merge_all("lori", given)
    kept = sum(int(x.delta.b.count_nonzero()) for x in got.values() if isinstance(x.delta, Factors))
    assert kept == int((1.0 - 0.9) * 4 * 3000 * 16)


def test_masking_again_changes_nothing() -> None:
    given = family((4,))
    once = {name: [x.delta] for name, x in merge_all("lori", given).items()}
    for name, x in merge_all("lori", once).items():
        assert torch.equal(dense(x.delta), dense(once[name][0]))


def test_ties_keep_more_and_nothing_kept_warns() -> None:
    same: dict[str, list[Delta]] = {"a": [Factors(torch.ones(10, 2), torch.randn(2, 6))]}
    assert merge_all("lori", same)["a"].report["kept"] == [1.0]
    result = merge_all("lori", same, sparsity=0.99)["a"]
    assert float(dense(result.delta).norm()) == 0.0
    assert "leaves adapter 0 no entry" in result.warnings[0] and result.warnings[0].startswith("a:")
    assert float(merge_one("lori", same["a"], sparsity=1.0).norm()) == 0.0


def test_sparsity_zero_is_the_sum() -> None:
    given = family()
    got = merge_all("lori", given, sparsity=0.0, weights=[2.0, -1.0])
    for name, deltas in given.items():
        assert relative(dense(got[name].delta), 2 * dense(deltas[0]) - dense(deltas[1])) < 1e-6


def test_missing_zero_and_float64() -> None:
    given = family()
    absent = Factors(torch.zeros(48, 0), torch.zeros(0, 40))
    name = "model.layers.1.self_attn.q_proj.weight"
    given[name][1] = absent
    given["lm_head.weight"][0] = Factors(torch.zeros(30, 4), torch.zeros(4, 40))
    want = masked(given, 0.8, "model")
    for x, factors in zip(merge_all("lori", given, sparsity=0.8).values(), want.values(), strict=True):
        assert relative(dense(x.delta), sum(dense(f) for f in factors)) < 1e-6
    for deltas in given.values():
        first = deltas[0]
        assert isinstance(first, Factors)
        deltas[0] = Factors(first.b.double(), first.a.double())
    for x, factors in zip(merge_all("lori", given, sparsity=0.8).values(), want.values(), strict=True):
        assert relative(dense(x.delta), sum(dense(f) for f in factors)) < 1e-12
    assert float(merge_one("lori", [absent, absent]).norm()) == 0.0


def test_one_a() -> None:
    """Adapters with the same A add up at its rank."""
    a = torch.randn(4, 40, generator=torch.Generator().manual_seed(3))
    given = [Factors(product(48, 40, 4, t).b, a) for t in range(3)]
    result = merge_all("lori", {"q": given}, sparsity=0.0, weights=[1.0, 2.0, -1.0])["q"]
    assert isinstance(result.delta, Factors) and result.delta.rank == 4 and "same A" in result.warnings[0]
    assert relative(dense(result.delta), dense(given[0]) + 2 * dense(given[1]) - dense(given[2])) < 1e-6
    assert merge_all("lori", {"q": given[:1]}, sparsity=0.0)["q"].warnings == ()


def test_linear_has_cross_terms_and_divides_the_scale() -> None:
    """A = sum of sgn(ws) sqrt|ws| A_t, B = sum of sqrt|ws| B_t with the factors of the files."""
    method = get_matrix("lori", "adapters")
    raw = [product(48, 40, 4, t) for t in range(2)]
    scales, weights = (2.0, 0.5), [1.0, -0.7]
    roots = [math.copysign(math.sqrt(abs(w * s)), w * s) for w, s in zip(weights, scales, strict=True)]
    b = sum(abs(root) * f.b.double() for f, root in zip(raw, roots, strict=True))
    a = sum(
        math.copysign(math.sqrt(abs(w * s)), w * s) * f.a.double() for f, w, s in zip(raw, weights, scales, strict=True)
    )
    params = bind_matrix(method, {"combination": "linear", "sparsity": 0.0, "weights": weights}, 2, "default")
    spec = MatrixSpec("q", (48, 40), 2, params, scales=scales)
    folded = [Factors(f.b * s, f.a) for f, s in zip(raw, scales, strict=True)]
    assert relative(dense(method.merge(spec, folded).delta), b @ a) < 1e-6
    code = bind_matrix(method, {"combination": "linear", "sparsity": 0.0, "weights": weights}, 2, "code")
    plain_b = sum(math.sqrt(abs(w)) * f.b.double() for f, w in zip(raw, weights, strict=True))
    plain_a = sum(math.copysign(math.sqrt(abs(w)), w) * f.a.double() for f, w in zip(raw, weights, strict=True))
    ignored = MatrixSpec("q", (48, 40), 2, code, dialect="code", scales=scales)
    assert relative(dense(method.merge(ignored, raw).delta), plain_b @ plain_a) < 1e-6
    with pytest.raises(ArgumentError, match="ranks must be equal"):
        merge_one("lori", [product(48, 40, 4, 0), product(48, 40, 5, 1)], combination="linear")


def test_groups() -> None:
    names = [n.removesuffix(".weight") for n in SHAPES]
    assert [group_of(n, "layer") for n in names] == ["model.layers.0"] * 3 + ["model.layers.1", ""]
    assert [group_of(n, "module") for n in names] == ["self_attn", "self_attn", "mlp", "self_attn", ""]
    assert [group_of(n, "projection") for n in names] == ["q_proj", "v_proj", "up_proj", "q_proj", "lm_head"]
    assert all(group_of(n, g) == group_of(f"{n}.weight", g) for n in names for g in GROUPS)


@pytest.mark.parametrize("k", [0.0, 1.0, 2.0, 60.0])
def test_from_norm(k: float) -> None:
    given = [product(48, 40, r, t) for t, r in enumerate((4, 6, 3))]
    norms = torch.stack([dense(f).norm() for f in given])
    share = (norms / norms.max()) ** k
    share = share / share.sum()
    result = merge_all("from_norm", {"q": given}, k=k)["q"]
    assert relative(dense(result.delta), sum(c * dense(f) for c, f in zip(share, given, strict=True))) < 1e-6
    assert abs(sum(result.report["shares"]) - 1) < 1e-12
    mixed = [Factors(f.b @ (g := rotation(f.rank, 5) * 3).float(), (g.T / 9).float() @ f.a) for f in given]
    assert relative(merge_one("from_norm", mixed, k=k), dense(result.delta)) < 1e-5
    assert relative(merge_one("from_norm", given[:1], k=k), dense(given[0])) < 1e-6


def test_from_norm_of_zeros() -> None:
    a = product(48, 40, 4, 0)
    zero, absent = Factors(torch.zeros(48, 2), torch.randn(2, 40)), Factors(torch.zeros(48, 0), torch.zeros(0, 40))
    assert relative(merge_one("from_norm", [a, zero, absent], k=1.0), dense(a)) < 1e-6
    assert relative(merge_one("from_norm", [a, zero, absent], k=0.0), dense(a) / 3) < 1e-6
    nothing = merge_all("from_norm", {"q": [zero, absent]}, k=1.0)["q"]
    assert float(dense(nothing.delta).norm()) == 0.0 and "zero" in nothing.warnings[0]
    for asked in ({}, {"k": -1.0}):
        with pytest.raises(ArgumentError):
            bind_matrix(get_matrix("from_norm", "adapters"), asked, 2, "default")


@pytest.mark.parametrize(("name", "params"), [("lori", {"sparsity": 0.0}), ("from_norm", {"k": 1.0})])
def test_more_ranks_than_the_matrix_has(name: str, params: dict[str, float]) -> None:
    """The sum is then one dense matrix, and the report says so."""
    given = [product(30, 20, 6, t) for t in range(5)]
    result = merge_all(name, {"q": given}, **params)["q"]
    assert not isinstance(result.delta, Factors) and "ranks add up to 30" in result.report["route"]
    shares = result.report.get("shares", [1.0] * 5)
    assert relative(result.delta, sum(c * dense(f) for c, f in zip(shares, given, strict=True))) < 1e-6
