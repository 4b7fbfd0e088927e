"""core_space: against dense singular bases in float64, its identities, and stacks that have no full rank."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

import brute_spectral as brute
import mergekernels
from matrix_cases import dense, merge_all, merge_one, product, relative, rotation
from mergekernels._methods.arguments import bind_matrix
from mergekernels._methods.matrix_table import get_matrix
from mergekernels.adapters.model import Factors
from mergekernels.errors import ArgumentError

pytestmark = pytest.mark.usefixtures("one_thread")

NAME = "layers.0.q_proj"


def three() -> list[Factors]:
    return [product(48, 40, rank, seed, decay=0.9) for seed, rank in enumerate((4, 6, 3))]


def cores(factors: Sequence[Factors]) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """(U, the M_t, V) from dense singular value decompositions of the stacks."""
    used = [f for f in factors if f.rank]
    u = brute.left_basis(torch.cat([f.b for f in used], 1))
    v = brute.left_basis(torch.cat([f.a for f in used], 0).T).T
    return u, [u.T @ dense(f) @ v.T for f in factors], v


def test_cores_lose_nothing() -> None:
    factors = three()
    u, parts, v = cores(factors)
    for f, core in zip(factors, parts, strict=True):
        assert relative(u @ core @ v, dense(f)) < 1e-12
    for t in range(3):
        weights = [float(i == t) for i in range(3)]
        assert (
            relative(merge_one("core_space", factors, inner="task_arithmetic", weights=weights), dense(factors[t]))
            < 1e-6
        )


def test_sums_and_means() -> None:
    factors = three()
    weights = [1.0, -0.5, 0.7]
    want = sum(w * dense(f) for w, f in zip(weights, factors, strict=True))
    assert relative(merge_one("core_space", factors, inner="task_arithmetic", weights=weights), want) < 1e-6
    mean = merge_one("core_space", factors, inner="task_arithmetic", weights=weights, normalize=True)
    assert relative(mean, want / sum(weights)) < 1e-6


@pytest.mark.parametrize("density", [0.1, 0.35, 1.0])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 2.0, 1.0)])
def test_ties_in_the_singular_basis(density: float, weights: tuple[float, ...]) -> None:
    factors = three()
    u, parts, v = cores(factors)
    want = u @ brute.ties({"": parts}, density, weights)[""] @ v
    got = merge_one("core_space", factors, inner="ties", density=density, weights=list(weights))
    assert relative(got, want) < 1e-5
    assert density == 1.0 or relative(got, sum(dense(f) for f in factors)) > 0.1


def test_ties_keeps_a_tenth_by_default() -> None:
    factors = three()
    u, parts, v = cores(factors)
    assert (
        relative(merge_one("core_space", factors, inner="ties"), u @ brute.ties({"": parts}, 0.1, [1.0] * 3)[""] @ v)
        < 1e-5
    )


@pytest.mark.parametrize(
    ("inner", "params"),
    [
        ("dare_ties", {"density": 0.5, "trim": 1.0}),
        ("dare_ties", {"density": 0.5, "trim": 0.3}),
        ("dare_linear", {"density": 0.5}),
        ("della", {"density": 0.6, "epsilon": 0.1}),
        ("breadcrumbs", {"density": 0.7, "gamma": 0.05}),
        ("sce", {"select_topk": 0.5}),
        ("magmax", {}),
        ("emr", {}),
        ("pcb", {"ratio": 0.4}),
        ("from_norm", {"k": 2.0}),
        ("consensus", {"threshold": 0.2}),
        ("ramplus_tl", {}),
    ],
)
def test_any_element_wise_method(inner: str, params: dict[str, float]) -> None:
    """Each gives what the library call gives on the cores of dense singular bases."""
    factors = [Factors(f.b.double(), f.a.double()) for f in three()]
    u, parts, v = cores(factors)
    asked: dict[str, object] = dict(params)
    own = {p.keyword for p in mergekernels.methods()[inner].params}
    asked |= {k: v for k, v in (("weights", 1.0), ("scope", "tensor"), ("scale", 1.0)) if k in own}
    if inner == "consensus":
        del asked["scope"]  # of its inner ties alone
    dialect = "paper" if inner == "dare_ties" else "default"
    zero = torch.zeros_like(parts[0])
    core = mergekernels.merge(parts, inner, base=zero, name=NAME, seed=7, dialect=dialect, **asked)
    got = merge_one("core_space", factors, inner=inner, seed=7, **params)
    assert relative(got, u @ core @ v) < 1e-9


@pytest.mark.parametrize("mean_over", ["core", "rank", "q"])
def test_flattened_sum(mean_over: str) -> None:
    factors = three()
    weights = [1.0, 0.5, -1.0]
    total = sum(w * dense(f) for w, f in zip(weights, factors, strict=True))
    count = {"core": 13, "rank": 13, "q": 40}[mean_over]
    want = brute.flatten(total, count)
    for asked in (
        {"inner": "iso_c"},
        {"inner": "task_arithmetic", "flatten": True},
        {"inner": "iso_c", "flatten": True},
    ):
        assert relative(merge_one("core_space", factors, weights=weights, mean_over=mean_over, **asked), want) < 1e-5


def test_flatten_is_a_multiple_of_an_isometry_on_a_deficient_core() -> None:
    twice = [*three(), three()[0]]
    total = sum(dense(f) for f in twice)
    got = merge_one("core_space", twice, inner="iso_c", mean_over="rank")
    assert relative(got, brute.flatten(total, 13)) < 1e-5
    strength = torch.linalg.svdvals(got)
    assert int((strength > 1e-3 * strength[0]).sum()) == 13
    assert relative(got @ got.T @ got, strength[0] ** 2 * got) < 1e-5


def test_stacks_without_full_rank() -> None:
    """Duplicates, a zero adapter, one without the module, ranks that add up beyond the smaller side."""
    a, b, c = three()
    zero = Factors(torch.zeros(48, 2), torch.randn(2, 40))
    absent = Factors(torch.zeros(48, 0), torch.zeros(0, 40))
    wide = [product(48, 40, 20, 10 + i) for i in range(4)]
    for given in ([a, a, b], [a, zero, b], [a, absent, c], wide, [zero, absent], [absent]):
        total = sum(dense(f) for f in given)
        result = merge_all("core_space", {NAME: given}, inner="task_arithmetic")[NAME]
        assert isinstance(result.delta, Factors) == (sum(f.rank for f in given) < 40)
        flat = merge_all("core_space", {NAME: given}, inner="task_arithmetic", flatten=True)[NAME].delta
        assert isinstance(flat, Factors) and flat.rank <= min(40, sum(f.rank for f in given))
        assert relative(dense(result.delta), total) < 1e-6
        if float(total.norm()) > 0:
            u, parts, v = cores(given)
            want = u @ brute.ties({"": parts}, 0.3, [1.0] * len(given))[""] @ v
            assert relative(merge_one("core_space", given, inner="ties", density=0.3), want) < 1e-5
    assert float(merge_one("core_space", [zero, absent], inner="iso_c").norm()) == 0.0
    assert float(merge_one("core_space", [absent, absent], inner="ties").norm()) == 0.0


def test_a_small_unit_of_b_beside_a_large_one_of_a() -> None:
    """Products matter, not how they are divided between the factors."""
    a, b, _ = three()
    scale = torch.tensor([2.0**-24, 1.0, 2.0**20, 1.0])
    shifted = Factors(a.b * scale, a.a / scale[:, None])
    assert (
        relative(merge_one("core_space", [shifted, b], inner="iso_c"), merge_one("core_space", [a, b], inner="iso_c"))
        < 1e-6
    )
    assert relative(merge_one("core_space", [shifted, b], inner="task_arithmetic"), dense(a) + dense(b)) < 1e-6


def test_one_adapter_returns_itself() -> None:
    for inner in ("task_arithmetic", "ties"):
        extra = {"density": 1.0} if inner == "ties" else {}
        assert relative(merge_one("core_space", three()[:1], inner=inner, **extra), dense(three()[0])) < 1e-6


@pytest.mark.parametrize("inner", ["ties", "iso_c", "task_arithmetic"])
def test_rotation_permutation_scale_and_sign(inner: str) -> None:
    factors = [Factors(f.b.double(), f.a.double()) for f in three()]
    extra = {"density": 0.4} if inner == "ties" else {}

    def f(given: list[Factors], **more: object) -> torch.Tensor:
        return merge_one("core_space", given, inner=inner, **extra, **more)

    plain = f(factors)
    q, p = rotation(48, 1), rotation(40, 2)
    # Signs of rotated bases may differ: votes follow them, since no vote is zero here.
    assert relative(f([Factors(q @ x.b, x.a @ p) for x in factors]), q @ plain @ p) < 1e-9
    assert relative(f(factors[::-1]), plain) < 1e-9
    assert relative(f([Factors(x.b * 3.5, x.a) for x in factors]), 3.5 * plain) < 1e-9
    assert relative(f([Factors(-x.b, x.a) for x in factors]), -plain) < 1e-9
    assert relative(f(factors, weights=[1.0, 0.5, 2.0]), f(factors[::-1], weights=[2.0, 0.5, 1.0])) < 1e-9


def test_equal_singular_values_are_reported() -> None:
    q = rotation(20, 3)
    one, two = (Factors(q[:, i : i + 2].contiguous(), rotation(20, 4)[i : i + 2].contiguous()) for i in (0, 2))
    result = merge_all("core_space", {NAME: [one, two]}, inner="ties")[NAME]
    assert "differ by" in result.warnings[0] and NAME in result.warnings[0]
    assert not merge_all("core_space", {NAME: three()}, inner="ties")[NAME].warnings


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"inner": "tise"}, "one of task_arithmetic, ties"),
        ({}, "needs 'inner'"),
        ({"inner": "slerp"}, "one of task_arithmetic, ties"),
        ({"inner": "sce", "density": 0.5}, "inner method sce has no parameter 'density'"),
        ({"inner": "iso_c", "density": 0.5}, "inner method iso_c has no parameter 'density'"),
        ({"inner": "sce", "weights": [1.0, 2.0]}, "inner method sce has no weights"),
        ({"inner": "ties", "density": 1.5}, "a number in [0, 1]"),
        ({"inner": "magmax", "inner_dialect": "paper"}, "no dialect 'paper'"),
        ({"inner": "ram", "epsilon": [0.1, 0.2]}, "one number"),
    ],
)
def test_refused(asked: dict[str, object], said: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        bind_matrix(get_matrix("core_space", "adapters"), asked, 2, "default")
    assert said in f"{caught.value} {caught.value.expected}"


def test_more_adapters_than_an_element_wise_method_takes() -> None:
    method = get_matrix("core_space", "adapters")
    with pytest.raises(ArgumentError, match="at most 64 adapters; got 65"):
        bind_matrix(method, {"inner": "ties"}, 65, "default")
    many = [product(12, 10, 2, i) for i in range(80)]
    assert relative(merge_one("core_space", many, inner="task_arithmetic"), sum(dense(f) for f in many)) < 1e-6


@pytest.mark.parametrize("dims", ["core", "rank", "q"])
def test_tsv_in_the_core(dims: str) -> None:
    """Sizes from the core, from the rank of each task, or from the matrix; flattened on request."""
    factors = three()
    weights = [1.0, 0.5, -2.0]
    u, parts, v = cores(factors)
    scaled = [w * p for w, p in zip(weights, parts, strict=True)]
    if dims == "rank":
        factors, weights = [product(48, 40, 6, seed, decay=0.9) for seed in range(3)], [1.0, 0.5, -2.0]
        u, parts, v = cores(factors)
        scaled = [w * p for w, p in zip(weights, parts, strict=True)]
    want = brute.tsv(scaled, {"core": 13, "rank": 6, "q": 40}[dims])
    got = merge_one("core_space", factors, inner="tsv_m", dims=dims, weights=weights)
    assert relative(got, u @ want @ v) < 1e-5
    flat = merge_one("core_space", factors, inner="tsv_m", dims=dims, weights=weights, flatten=True)
    assert relative(flat, u @ brute.flatten(want, min(want.shape)) @ v) < 1e-5


def test_tsv_of_stacks_without_full_rank() -> None:
    a, b, _ = three()
    absent = Factors(torch.zeros(48, 0), torch.zeros(0, 40))
    for given in ([a, a, b], [a, absent, b]):
        u, parts, v = cores(given)
        live = [p for p in parts if float(p.norm()) > 1e-9]
        k = min(u.shape[1], v.shape[0]) // len(given)
        got = merge_one("core_space", given, inner="tsv_m")
        assert relative(got, u @ brute.tsv(live, k * len(live)) @ v) < 1e-5
    assert float(merge_one("core_space", [absent, absent], inner="tsv_m").norm()) == 0.0
