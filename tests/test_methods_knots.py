"""knots: against dense float64 singular value decompositions of the stacks, thresholds over all modules."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

import brute_spectral as brute
import mergekernels
from matrix_cases import dense, merge_all, merge_one, product, relative, rotation
from mergekernels._methods.arguments import bind_matrix
from mergekernels._methods.matrix_table import get_matrix
from mergekernels._methods.spectral.tied import tie
from mergekernels.adapters.model import Delta, Factors
from mergekernels.errors import ArgumentError

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = {"layers.0.q": (48, 40), "layers.0.down": (30, 64), "layers.1.q": (48, 40)}


def family(ranks: Sequence[int] = (4, 6, 3), dtype: torch.dtype = torch.float32) -> dict[str, list[Delta]]:
    return {
        name: [product(m, n, r, 10 * i + t, dtype, decay=0.9) for t, r in enumerate(ranks)]
        for i, (name, (m, n)) in enumerate(SHAPES.items())
    }


def brute_parts(deltas: Sequence[Delta], cut: float = 1e-6) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(U, the Z_t) of the dense matrices side by side."""
    matrices = [dense(d) for d in deltas]
    u = brute.left_basis(torch.cat(matrices, 1), cut)
    return u, [u.T @ x for x in matrices]


def brute_knots(deltas: dict[str, list[Delta]], density: float, weights: Sequence[float]) -> dict[str, torch.Tensor]:
    parts = {name: brute_parts(given) for name, given in deltas.items()}
    merged = brute.ties({name: z for name, (_, z) in parts.items()}, density, weights)
    return {name: u @ merged[name] for name, (u, _) in parts.items()}


@pytest.mark.parametrize("density", [0.2, 0.55, 1.0])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 2.0, -1.0)])
def test_ties_over_all_modules(density: float, weights: tuple[float, ...]) -> None:
    given = family()
    want = brute_knots(given, density, weights)
    got = merge_all("knots", given, density=density, weights=list(weights))
    for name, expected in want.items():
        assert relative(dense(got[name].delta), expected) < 1e-5, name
        assert isinstance(got[name].delta, Factors)
        assert got[name].report["rank"] == 13
        assert got[name].report["inner"] == f"ties (paper), density {density:g}"


def test_one_threshold_is_not_one_per_module() -> None:
    given = family()
    given["layers.0.down"] = [Factors(f.b * 3, f.a) for f in given["layers.0.down"]]  # type: ignore[union-attr]
    together = merge_all("knots", given)
    alone = merge_all("knots", given, scope="tensor")
    assert relative(dense(together["layers.0.q"].delta), brute_knots(given, 0.2, [1.0] * 3)["layers.0.q"]) < 1e-5
    for name, deltas in given.items():
        assert relative(dense(alone[name].delta), brute_knots({name: deltas}, 0.2, [1.0] * 3)[name]) < 1e-5
    assert relative(dense(together["layers.0.q"].delta), dense(alone["layers.0.q"].delta)) > 0.1


def test_large_modules_take_the_sampled_route(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above 131,072 coordinates a sample brackets the threshold; slabs of a few rows must not change anything."""
    given: dict[str, list[Delta]] = {
        f"layers.{i}": [product(64, 1500, 16, 7 * i + t, decay=0.95) for t in range(3)] for i in range(3)
    }
    got = merge_all("knots", given, density=0.3)
    drawn = merge_all("knots", given, inner="dare_ties", density=0.3, trim=0.2)
    monkeypatch.setattr("mergekernels._methods.inner_scope._SLAB_BYTES", 3 * 1500 * 4 * 5)
    slabs = merge_all("knots", given, density=0.3)
    drawn_slabs = merge_all("knots", given, inner="dare_ties", density=0.3, trim=0.2)
    for name, expected in brute_knots(given, 0.3, [1.0] * 3).items():
        assert relative(dense(got[name].delta), expected) < 1e-5
        assert relative(dense(slabs[name].delta), dense(got[name].delta)) < 1e-6
        assert relative(dense(drawn_slabs[name].delta), dense(drawn[name].delta)) < 1e-6


@pytest.mark.parametrize("stack", ["columns", "rows"])
def test_sum_and_one_adapter(stack: str) -> None:
    given = family()
    weights = [1.0, -0.5, 2.0]
    got = merge_all("knots", given, inner="task_arithmetic", weights=weights, stack=stack)
    for name, deltas in given.items():
        want = sum(w * dense(d) for w, d in zip(weights, deltas, strict=True))
        assert relative(dense(got[name].delta), want) < 1e-6
    one = {name: deltas[:1] for name, deltas in given.items()}
    for inner in ("ties", "task_arithmetic", "tsv_m"):
        density = {"density": 1.0} if inner == "ties" else {}
        for name, merged in merge_all("knots", one, inner=inner, stack=stack, **density).items():
            assert relative(dense(merged.delta), dense(one[name][0])) < 1e-6


def test_rows_are_columns_of_the_transposes() -> None:
    given = family()
    flipped: dict[str, list[Delta]] = {
        name: [Factors(d.a.T, d.b.T) for d in deltas if isinstance(d, Factors)] for name, deltas in given.items()
    }
    rows, columns = merge_all("knots", given, stack="rows"), merge_all("knots", flipped)
    straight = merge_all("knots", given)
    for name in given:
        assert relative(dense(rows[name].delta), dense(columns[name].delta).T) < 1e-6
        assert relative(dense(rows[name].delta), dense(straight[name].delta)) > 0.1


@pytest.mark.parametrize("inner", ["tsv_m", "iso_c"])
def test_rotation_free_methods(inner: str) -> None:
    given = [product(48, 40, 4, t, decay=0.9) for t in range(3)]
    weights = [1.0, 0.5, 2.0]
    u, parts = brute_parts(given)
    scaled = [w * z for w, z in zip(weights, parts, strict=True)]
    want = brute.tsv(scaled, 12) if inner == "tsv_m" else brute.flatten(sum(scaled), 12)  # type: ignore[arg-type]
    got = merge_one("knots", given, inner=inner, weights=weights)
    assert relative(got, u @ want) < 1e-5
    direct = merge_one(inner, given, takes="models", weights=weights)
    if inner == "tsv_m":  # k = floor(13 / 3) = 4 keeps everything, in either space
        assert relative(got, direct) < 1e-5


def test_dare_ties_is_the_library_call_on_the_coordinates() -> None:
    given = [product(48, 40, r, t, torch.float64) for t, r in enumerate((4, 6, 3))]
    u, parts = brute_parts(given)
    merged = mergekernels.merge(
        [p.contiguous() for p in parts],
        "dare_ties",
        base=torch.zeros_like(parts[0]),
        density=0.4,
        dialect="paper",
        trim=1.0,
        weights=1.0,
        name="layers.0.q_proj",
        seed=5,
    )
    got = merge_one("knots", given, inner="dare_ties", density=0.4, seed=5)
    assert relative(got, u @ merged) < 1e-9
    assert relative(merge_one("knots", given, inner="dare_ties", density=0.4, seed=6), got) > 0.1
    assert (
        relative(merge_one("knots", given, inner="dare_ties", density=1.0), merge_one("knots", given, density=1.0))
        < 1e-9
    )


def test_dare_ties_trims_over_all_modules() -> None:
    """With a trim, thresholds are searched among what the masks left of the whole model."""
    given = family()
    whole = merge_all("knots", given, inner="dare_ties", density=0.5, seed=3)
    trimmed = merge_all("knots", given, inner="dare_ties", density=0.5, trim=0.1, seed=3)
    everything = merge_all("knots", given, inner="dare_ties", density=0.5, trim=0.9, seed=3)
    count = sum(r.report["rank"] * given[n][0].shape[1] for n, r in trimmed.items())
    for name in given:
        assert relative(dense(everything[name].delta), dense(whole[name].delta)) < 1e-9
    left = sum(int((x.delta.a.abs() > 1e-7).sum()) for x in trimmed.values() if isinstance(x.delta, Factors))
    assert 0.1 * count <= left <= 0.3 * count + 3  # three adapters, a tenth each


def test_masks_drop_the_share_that_is_asked() -> None:
    given = [product(64, 400, 16, 1)]
    tied = tie(given, None, False)
    z = tied.basis().T @ merge_one("knots", given, inner="dare_ties", density=0.9)
    share = float((z.abs() > 1e-5).double().mean())
    assert abs(share - 0.9) < 0.02
    whole = tied.rows(0, tied.rank, torch.float32)[0].double()
    assert relative(z[z.abs() > 1e-5], whole[z.abs() > 1e-5] / 0.9) < 1e-5


def test_dense_deltas() -> None:
    """Full models give what factors give, dense; more columns than rows and the other way round, and mixed."""
    given = family()
    matrices: dict[str, list[Delta]] = {name: [dense(d).float() for d in deltas] for name, deltas in given.items()}
    want = merge_all("knots", given, density=0.4)
    got = merge_all("knots", matrices, takes="models", density=0.4)
    for name in given:
        assert not isinstance(got[name].delta, Factors)
        assert relative(dense(got[name].delta), dense(want[name].delta)) < 1e-5
    tall = [torch.randn(90, 20, generator=torch.Generator().manual_seed(t)) for t in range(3)]
    for deltas in (tall, [t.T.contiguous() for t in tall]):
        u, parts = brute_parts(deltas)
        expected = u @ brute.ties({"": parts}, 0.3, [1.0] * 3)[""]
        assert relative(merge_one("knots", deltas, takes="models", density=0.3), expected) < 1e-5
    mixed: list[Delta] = [
        given["layers.0.q"][0],
        matrices["layers.0.q"][1],
        Factors(torch.zeros(48, 0), torch.zeros(0, 40)),
    ]
    u, parts = brute_parts(mixed)
    expected = u @ brute.ties({"": parts}, 0.3, [1.0] * 3)[""]
    assert relative(merge_one("knots", mixed, takes="models", density=0.3), expected) < 1e-5


def test_stacks_without_full_rank() -> None:
    a, b, c = family()["layers.0.q"]
    zero, absent = Factors(torch.zeros(48, 2), torch.randn(2, 40)), Factors(torch.zeros(48, 0), torch.zeros(0, 40))
    wide: list[Delta] = [product(48, 40, 20, 10 + i) for i in range(4)]
    flat = product(48, 40, 60, 30)
    cases: list[list[Delta]] = [[a, a, b], [a, zero, b], [a, absent, c], wide, [flat, a]]
    for deltas in cases:
        u, parts = brute_parts(deltas)
        want = u @ brute.ties({"": parts}, 0.3, [1.0] * len(deltas))[""]
        assert relative(merge_one("knots", deltas, density=0.3), want) < 1e-5
        total = sum(dense(d) for d in deltas)
        assert relative(merge_one("knots", deltas, inner="task_arithmetic"), total) < 1e-6
    for inner in ("ties", "task_arithmetic", "tsv_m", "iso_c", "dare_ties"):
        for deltas in ([zero, absent], [absent, absent]):
            merged = merge_all("knots", {"a": deltas, "b": deltas}, inner=inner)
            assert all(float(dense(x.delta).norm()) == 0.0 and x.delta.shape == (48, 40) for x in merged.values())


def test_rotation_permutation_scale_and_sign() -> None:
    given = family(dtype=torch.float64)

    def f(deltas: dict[str, list[Delta]], **more: object) -> dict[str, torch.Tensor]:
        return {n: dense(x.delta) for n, x in merge_all("knots", deltas, density=0.4, **more).items()}

    def each(change: object) -> dict[str, list[Delta]]:
        return {n: [change(d) for d in deltas] for n, deltas in given.items()}  # type: ignore[operator]

    plain = f(given)
    left = {m: rotation(m, m) for m in (48, 30)}
    rotated = f(each(lambda d: Factors(left[d.shape[0]] @ d.b, d.a)))
    scaled, negated = f(each(lambda d: Factors(d.b * 3, d.a))), f(each(lambda d: Factors(-d.b, d.a)))
    permuted = f({n: deltas[::-1] for n, deltas in given.items()})
    mixed = f(each(lambda d: Factors(d.b @ rotation(d.rank, 9), rotation(d.rank, 9).T @ d.a)))
    for n, want in plain.items():
        assert relative(rotated[n], left[want.shape[0]] @ want) < 1e-9
        assert relative(scaled[n], 3 * want) < 1e-9
        assert relative(negated[n], -want) < 1e-9
        assert relative(permuted[n], want) < 1e-9
        assert relative(mixed[n], want) < 1e-9  # how a product is factored does not matter


def test_equal_singular_values_are_reported() -> None:
    q = rotation(20, 3)
    one, two = (Factors(q[:, i : i + 2].contiguous(), rotation(20, 4)[i : i + 2].contiguous()) for i in (0, 2))
    result = merge_all("knots", {"a": [one, two]})["a"]
    assert "differ by" in result.warnings[0]
    assert not merge_all("knots", {"a": [one, two]}, inner="task_arithmetic")["a"].warnings


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"inner": "sce"}, "one of ties, dare_ties"),
        ({"inner": "tsv_m", "density": 0.2}, "inner method tsv_m has no parameter 'density'"),
        ({"inner": "dare_ties", "merge_function": "sum"}, "inner method dare_ties has no parameter 'merge_function'"),
        ({"density": [0.1, 0.2, 0.3]}, "one value, or 2"),
        ({"stack": "blocks"}, "one of columns, rows"),
    ],
)
def test_refused(asked: dict[str, object], said: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        bind_matrix(get_matrix("knots", "adapters"), asked, 2, "default")
    assert said in f"{caught.value} {caught.value.expected}"


def test_in_merge_state_dicts() -> None:
    draw = torch.Generator().manual_seed(1)
    base = {"a": torch.randn(24, 30, generator=draw), "b": torch.randn(5, generator=draw)}
    deltas = [{n: 0.1 * torch.randn(x.shape, generator=draw) for n, x in base.items()} for _ in range(3)]
    models = [{n: x + d[n] for n, x in base.items()} for d in deltas]
    got = mergekernels.merge_state_dicts(models, "knots", base=base, density=0.5, scale=0.6)
    exact = [m["a"] - base["a"] for m in models]
    u, parts = brute_parts(exact)
    want = base["a"] + 0.6 * (u @ brute.ties({"": parts}, 0.5, [1.0] * 3)[""])
    assert relative(got["a"], want) < 1e-6
    assert relative(got["b"] - base["b"], 0.6 * sum(m["b"] - base["b"] for m in models) / 3) < 1e-5
