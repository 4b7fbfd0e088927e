"""ties through the public calls, against a brute-force implementation and tables worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mergekernels as mk
from brute import ties as brute_ties
from mergekernels._backends.reference.select import select_point
from mergekernels.ops import Keep, Program, select, stream
from mergekernels.tensors import tensor_id

BACKENDS = ("reference", "cpu")


def flat(x: torch.Tensor) -> np.ndarray:
    return x.reshape(-1).float().numpy()


@pytest.mark.parametrize("backend", BACKENDS)
def test_table_by_hand(backend: str) -> None:
    """Four coordinates: agreement, conflict won by weight, cancelling vote, trimmed away."""
    base = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0])
    a = base + torch.tensor([4.0, 4.0, 2.0, 0.5, 0.0])
    b = base + torch.tensor([2.0, -8.0, -2.0, 0.25, 0.0])
    # density 0.6 keeps three entries of each: coordinate 3 goes. Votes: 6, -4, 0 (counts as +).
    got = mk.merge([a, b], "ties", base=base, weights=[1, 1], density=0.6, backend=backend)
    assert got.tolist() == [1 + 3.0, 1 - 8.0, 1 + 2.0, 1.0, 1.0]
    # With weights 3 and 1 the vote at coordinate 1 is 12 - 8 > 0; means are weighted.
    got = mk.merge([a, b], "ties", base=base, weights=[3, 1], density=0.6, backend=backend)
    assert got.tolist() == [1 + (12 + 2) / 4, 1 + 4.0, 1 + 2.0, 1.0, 1.0]
    # Without normalize the agreeing weighted deltas are summed; lambda scales them.
    got = mk.merge([a, b], "ties", base=base, weights=[1, 1], density=0.6, normalize=False, scale=0.5, backend=backend)
    assert got.tolist() == [1 + 3.0, 1 - 4.0, 1 + 1.0, 1.0, 1.0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_paper_keeps_one_more_and_all_ties(backend: str) -> None:
    """100 distinct magnitudes at 20 % keep 21; a constant vector is kept whole."""
    base = torch.zeros(100)
    ramp = torch.arange(1.0, 101.0)
    got = mk.merge([ramp], "ties", base=base, density=0.2, dialect="paper", backend=backend)
    assert int((got != 0).sum()) == 21
    got = mk.merge([torch.full((100,), 3.0)], "ties", base=base, density=0.2, dialect="paper", backend=backend)
    assert int((got != 0).sum()) == 100
    got = mk.merge([torch.full((100,), 3.0)], "ties", base=base, weights=1, density=0.2, backend=backend)
    assert int((got != 0).sum()) == 20


@pytest.mark.parametrize("backend", BACKENDS)
def test_paper_zero_vote_takes_the_majority(backend: str) -> None:
    """Signs -, -, + elect minus, which the cancelling fourth takes; where elected signs balance it stays at base."""
    base = torch.zeros(4)
    a, b = torch.tensor([-1.0, -2.0, 3.0, 5.0]), torch.tensor([-1.0, -2.0, 3.0, -5.0])
    got = mk.merge([a, b], "ties", base=base, density=1.0, dialect="paper", backend=backend)
    assert got.tolist() == [-1.0, -2.0, 3.0, -5.0]
    a, b = torch.tensor([-1.0, 3.0, 5.0]), torch.tensor([-1.0, 3.0, -5.0])
    got = mk.merge([a, b], "ties", base=torch.zeros(3), density=1.0, dialect="paper", backend=backend)
    assert got.tolist() == [-1.0, 3.0, 0.0]


def test_tie_policies_keep_exactly_k() -> None:
    """Equal magnitudes: index keeps the first ones, hash keeps others, neither more than k."""
    base, model = torch.zeros(1000), torch.full((1000,), 2.0)
    kept = {
        policy: mk.merge([model], "ties", base=base, weights=1, density=0.25, tie_policy=policy, name="w") != 0
        for policy in ("hash", "index", "all")
    }
    assert kept["index"].nonzero().flatten().tolist() == list(range(250))
    assert int(kept["hash"].sum()) == 250 and not torch.equal(kept["hash"], kept["index"])
    # No favour for the first rows: the upper half of the indices holds about half of the survivors.
    assert 95 <= int(kept["hash"][500:].sum()) <= 155
    assert bool(kept["all"].all())
    other = mk.merge([model], "ties", base=base, weights=1, density=0.25, name="another") != 0
    assert not torch.equal(other, kept["hash"])


settings_ = {
    "weights": st.sampled_from([[1.0, 1.0, 1.0], [0.3, 1.7, -0.5], [0.0, 1.0, 2.0], [1.0, -1.0, 0.0]]),
    "density": st.sampled_from([[0.2, 0.2, 0.2], [1.0, 0.5, 0.0], [0.001, 0.9, 0.35]]),
    "scale": st.sampled_from([1.0, 0.7, -2.0, 0.0]),
    "normalize": st.booleans(),
    "policy": st.sampled_from(["hash", "index", "all"]),
    "scope": st.sampled_from(["tensor", "model"]),
    "zero_vote": st.sampled_from(["positive", "majority", "zero"]),
    "seed": st.sampled_from([0, 1, 2**63 + 5]),
    "values": st.integers(0, 2**32),
}


@pytest.mark.parametrize("backend", BACKENDS)
@given(**settings_)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_default_dialect_equals_brute_force(
    backend, weights, density, scale, normalize, policy, scope, zero_vote, seed, values
) -> None:
    """State dicts with many ties, zeros and cancelling votes, every option."""
    base, models = family(values)
    got = mk.merge_state_dicts(
        models,
        "ties",
        base=base,
        weights=weights,
        density=density,
        scale=scale,
        normalize=normalize,
        tie_policy=policy,
        scope=scope,
        zero_vote=zero_vote,
        seed=seed,
        backend=backend,
    )
    want = brute_ties(
        {n: flat(t) for n, t in base.items()},
        [{n: flat(t) for n, t in m.items()} for m in models],
        weights=weights,
        density=density,
        scale=scale,
        normalize=normalize,
        policy=policy,
        scope=scope,
        zero_vote=zero_vote,
        seed=seed,
    )
    for name in base:
        np.testing.assert_array_equal(flat(got[name]), want[name], err_msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    density=settings_["density"],
    scale=settings_["scale"],
    normalize=st.booleans(),
    scope=settings_["scope"],
    values=settings_["values"],
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_paper_dialect_equals_brute_force(backend, density, scale, normalize, scope, values) -> None:
    base, models = family(values)
    got = mk.merge_state_dicts(
        models,
        "ties",
        base=base,
        density=density,
        scale=scale,
        normalize=normalize,
        scope=scope,
        dialect="paper",
        backend=backend,
    )
    want = brute_ties(
        {n: flat(t) for n, t in base.items()},
        [{n: flat(t) for n, t in m.items()} for m in models],
        weights=[1.0] * 3,
        density=density,
        scale=scale,
        normalize=normalize,
        policy="all",
        scope=scope,
        zero_vote="majority",
        dialect="paper",
    )
    for name in base:
        np.testing.assert_array_equal(flat(got[name]), want[name], err_msg=name)


def family(seed: int) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """A base and three models of small tensors; deltas on a coarse grid, so that ties and cancelling votes abound."""
    g = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (7, 9), "b.bias": (13,), "c": (1,), "d.empty": (0, 4), "e": ()}
    base = {n: torch.randn(s, generator=g) for n, s in shapes.items()}
    grid = [0.0, 0.25, -0.25, 0.5, -0.5, 1.0, 3.0]
    models = [
        {n: b + torch.tensor(grid)[torch.randint(len(grid), b.shape, generator=g)] for n, b in base.items()}
        for _ in range(3)
    ]
    return base, models


@pytest.mark.parametrize("cut", ["rows", "columns", "uneven", "one each"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_shards_give_the_same_bits(cut: str, dtype: torch.dtype) -> None:
    """Lists of row or column shards in place of whole tensors, for every input or only some."""
    g = torch.Generator().manual_seed(5)
    base = torch.randn(12, 10, generator=g).to(dtype)
    models = [base + (torch.randn(12, 10, generator=g).to(dtype) * 4).round() / 4 for _ in range(2)]
    dim, sizes = {"rows": (0, [4, 4, 4]), "columns": (1, [5, 5]), "uneven": (0, [1, 0, 11]), "one each": (1, [1] * 10)}[
        cut
    ]
    whole = mk.merge(models, "ties", base=base, weights=1, density=0.3, name="w")
    shards = [list(m.split(sizes, dim)) for m in models]
    for base_value in (base, list(base.split(sizes, dim))):
        got = mk.merge(shards, "ties", base=base_value, weights=1, density=0.3, name="w", shard_dim=dim)
        assert [t.shape[dim] for t in got] == sizes
        assert torch.equal(torch.cat(got, dim), whole)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_shards_of_three_dimensions(dim: int) -> None:
    g = torch.Generator().manual_seed(6)
    base = torch.randn(4, 6, 5, generator=g)
    model = base + (torch.randn(4, 6, 5, generator=g) * 2).round() / 2
    whole = mk.merge([model], "ties", base=base, weights=1, density=0.4, name="w")
    sizes = [1, 0, base.shape[dim] - 1]
    got = mk.merge([list(model.split(sizes, dim))], "ties", base=base, weights=1, density=0.4, name="w", shard_dim=dim)
    assert torch.equal(torch.cat(got, dim), whole)


@pytest.mark.parametrize("policy", ["hash", "index"])
def test_names_are_ordered_by_their_bytes(policy: str) -> None:
    """ "Z" comes before "a": of equal magnitudes under "index" the first name's survive."""
    names = ["a", "Z", "m.w"]
    base = {n: torch.zeros(50) for n in names}
    model = {n: torch.ones(50) for n in names}
    got = mk.merge_state_dicts([model], "ties", base=base, weights=1, density=0.4, scope="model", tie_policy=policy)
    want = brute_ties(
        {n: flat(t) for n, t in base.items()},
        [{n: flat(t) for n, t in model.items()}],
        weights=[1.0],
        density=[0.4],
        scope="model",
        policy=policy,
    )
    for name in names:
        np.testing.assert_array_equal(flat(got[name]), want[name])
    if policy == "index":
        assert [int(got[n].sum()) for n in ("Z", "a", "m.w")] == [50, 10, 0]


def test_large_tensor_takes_the_sampled_route() -> None:
    """Above the size where a sample is drawn, with ties beyond the candidates' capacity: same points as by sorting."""
    g = torch.Generator().manual_seed(0)
    n = 200_001
    base = (torch.randn(n, generator=g) * 0.02).bfloat16()
    tuned = (base.float() + torch.randn(n, generator=g) * 1e-4).bfloat16()  # a quarter of it ties at density 0.2
    smooth = base.float() + torch.randn(n, generator=g) * 1e-3
    for model in (tuned, smooth.bfloat16()):
        delta = model.float() - base.float()
        for density in (0.001, 0.2, 0.9):
            k = int(density * n)
            for policy in ("hash", "index", "all"):
                (got,) = select([model], k, base=base, policy=policy, name="w", seed=3)
                want = select_point(delta, k, policy, 3, tensor_id("w"), 0)
                assert torch.equal(kept(delta, got), kept(delta, want)), (density, policy)


def kept(delta: torch.Tensor, keep: Keep) -> torch.Tensor:
    """The positions that a point keeps."""
    program = Program((1.0,), (keep,), base=False, seed=3, tensor=tensor_id("w"))
    return stream([delta], program).nonzero().flatten()
