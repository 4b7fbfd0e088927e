"""opcm against the authors' loop in float64, and what its definition implies."""

from __future__ import annotations

import math

import pytest
import torch

import mergekernels as mk
import spectral_brute as brute
from mergekernels._methods.matrix import MatrixSpec, measured_state
from mergekernels._methods.matrix_table import get_matrix
from mergekernels._methods.spectral.opcm import project_away
from mergekernels.adapters.model import Factors
from spectral_cases import lora


def models(count: int, seed: int = 0) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """A base, and task vectors of separated spectra."""

    def task(t: int) -> dict[str, torch.Tensor]:
        g = torch.Generator().manual_seed(100 * seed + t)
        return {
            "a.weight": brute.with_spectrum(30, 20, brute.spectra(20)["power"], 7 * t, torch.float32),
            "b.weight": brute.with_spectrum(16, 28, brute.spectra(16)["power"], 7 * t + 1, torch.float32),
            "embed_tokens.weight": torch.randn(12, 8, generator=g),
            "a.bias": torch.randn(30, generator=g),
        }

    return {k: torch.zeros_like(v) for k, v in task(0).items()}, [task(t) for t in range(count)]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_formula(alpha):
    base, tasks = models(4)
    report: dict = {}
    found = mk.merge_state_dicts(tasks, "opcm", base=base, alpha=alpha, report=report)
    expected = brute.opcm(tasks, ["a.weight", "b.weight"], alpha)
    for name, value in expected.items():
        assert brute.error(found[name], value) < 2e-5, name
    norms = [math.sqrt(sum(float(v.double().square().sum()) for v in t.values())) for t in tasks]
    total = math.sqrt(sum(float(v.double().square().sum()) for v in found.values()))
    assert total == pytest.approx(sum(norms) / 4, rel=1e-6)
    assert report["a.bias"]["norm"] == pytest.approx(sum(norms) / 4, rel=1e-6)


def test_order_counts_and_the_first_model_alone_is_returned():
    base, tasks = models(3)
    one = mk.merge_state_dicts(tasks[:1], "opcm", base=base)
    for name, value in tasks[0].items():
        assert brute.error(one[name], value) < 1e-6
    there = mk.merge_state_dicts(tasks, "opcm", base=base)
    back = mk.merge_state_dicts(tasks[::-1], "opcm", base=base)
    assert brute.error(there["a.weight"], back["a.weight"]) > 0.01


@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
@pytest.mark.parametrize("rank", [20, 6])
def test_projection(shape, rank):
    x = brute.with_spectrum(*shape, brute.spectra(20)["power"][:rank], 1, torch.float32)
    y = brute.with_spectrum(*shape, brute.spectra(20)["flat"], 2, torch.float32)
    kept, k = project_away(x, y, 0.5, 1e-5)
    u, s, v = brute.svd(x)
    assert len(s) == rank and 0 < k < rank
    inner = u.T @ kept.double() @ v
    assert float(inner[:k, :k].abs().max()) < 1e-5 * float(y.norm())
    assert float(inner.diagonal().abs().max()) < 1e-5 * float(y.norm())
    # What lies outside the spaces of x stays.
    outside = y.double() - u @ (u.T @ y.double())
    assert float((kept.double() - u @ (u.T @ kept.double()) - outside).norm()) < 1e-5 * float(y.norm())


def test_nothing_so_far_and_zero_tasks():
    base, tasks = models(3)
    zero = {k: torch.zeros_like(v) for k, v in tasks[0].items()}
    found = mk.merge_state_dicts([zero, tasks[0], zero], "opcm", base=base)
    norm = math.sqrt(sum(float(v.double().square().sum()) for v in tasks[0].values()))
    for name, value in tasks[0].items():
        assert brute.error(found[name], value / 3) < 1e-6  # the mean norm of three, of which two are zero
    assert norm > 0
    assert not any(v.any() for v in mk.merge_state_dicts([zero, zero], "opcm", base=base).values())


def test_factors_equal_dense():
    factors = [{"x": lora(40, 32, 4, t), "y": lora(24, 36, 3, 50 + t)} for t in range(3)]
    method = get_matrix("opcm", "adapters")
    params = {"lambda": 1.0, "alpha": 0.5, "exclude": "", "conv": "mean", "experts": "", "rank_tol": None}
    specs = {n: MatrixSpec(n, factors[0][n].shape, 3, params) for n in ("x", "y")}
    state = measured_state(
        method, params, "default", lambda s: {n: method.measure(specs[n], [f[n] for f in factors], s) for n in specs}
    )
    expected = brute.opcm([{n: f[n].b.double() @ f[n].a.double() for n in f} for f in factors], ["x", "y"], 0.5)
    for n, spec in specs.items():
        found = method.merge(spec, [f[n] for f in factors], state)
        assert isinstance(found.delta, Factors)
        assert brute.error(found.delta.dense(), expected[n]) < 2e-5
