"""The cases of every feature for a GPU backend; a test module imports them and gives `target`, see gpu_cases.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from zlib import crc32

import pytest
import torch

import mergekernels as mk
from feature_cases import (
    by_name,
    check_divergence,
    check_gram,
    check_mark,
    check_program,
    check_reduce,
    check_sweep,
    divergence_cases,
    gram_cases,
    mark_cases,
    program_cases,
    reduce_cases,
    sweep_cases,
)
from feature_streams import _expected_program as expected_program
from gpu_matrix import bits
from mergekernels._native import torch_dtype, view_of
from mergekernels.errors import DataError


def wanted(target: Any, case: Any) -> tuple[Any, str]:
    backend, device = target
    if backend.__name__.endswith(".triton") and crc32(case.name.encode()) % 12:
        pytest.skip("Triton compiles a kernel for each program: a twelfth of the cases")
    missing = case.needs - backend.FEATURES
    if missing:
        pytest.skip(f"the backend lacks {', '.join(sorted(missing))}")
    return backend, device


@pytest.mark.parametrize("case", program_cases(), ids=by_name)
def test_program(target: Any, case: Any) -> None:
    backend, device = wanted(target, case)
    check_program(backend, case, device)
    check_program(backend, case, device, pieces="cut")


@pytest.mark.parametrize("case", program_cases()[::7], ids=by_name)
def test_program_without_output_or_counts(target: Any, case: Any) -> None:
    backend, device = wanted(target, case)
    check_program(backend, case, device, output=False)
    check_program(backend, case, device, counted=False)


@pytest.mark.parametrize("case", mark_cases(), ids=by_name)
def test_mark(target: Any, case: Any) -> None:
    backend, device = wanted(target, case)
    check_mark(backend, case, device)
    check_mark(backend, case, device, pieces="cut")


@pytest.mark.parametrize("case", sweep_cases(), ids=by_name)
def test_sweep_keys(target: Any, case: Any) -> None:
    backend, device = wanted(target, case)
    check_sweep(backend, case, device)
    check_sweep(backend, case, device, pieces="cut")


@pytest.mark.parametrize("case", reduce_cases(), ids=by_name)
def test_reduce(target: Any, case: Any) -> None:
    backend, device = wanted(target, case)
    check_reduce(backend, case, device)
    check_reduce(backend, case, device, pieces="cut")


@pytest.mark.parametrize("case", gram_cases(), ids=by_name)
def test_gram(target: Any, case: Any) -> None:
    backend, device = wanted(target, case)
    check_gram(backend, case, device)


@pytest.mark.parametrize("case", divergence_cases(), ids=by_name)
def test_divergence(target: Any, case: Any) -> None:
    backend, device = wanted(target, case)
    check_divergence(backend, case, device)


def job_of(backend: Any, case: Any, device: str) -> tuple[Any, torch.Tensor]:
    out = torch.full((case.piece.numel,), float("nan"), dtype=torch_dtype(case.out), device=device)
    casts = case.casts or (None,) * (len(case.models) + 1)
    models = [replace(view_of(x.to(device)), cast=c) for x, c in zip(case.models, casts[1:], strict=False)]
    base = None if case.base is None else replace(view_of(case.base.to(device)), cast=casts[0])
    return backend.LISTS.Job(case.program, case.piece, base, models, view_of(out), case.compute), out


def test_list_of_tensors(target: Any) -> None:
    """Many programs over many tensors in one call, of every dtype: each result as if it were alone."""
    backend, device = target
    lists = getattr(backend, "LISTS", None)
    if lists is None:
        pytest.skip("the backend has no lists")
    cases = [c for c in program_cases() if lists.can_list(c.program) and c.piece.numel <= 9000 and not c.strided]
    assert len(cases) > 150 and {c.compute.name for c in cases} == {"F32", "F64"}
    pairs = [job_of(backend, c, device) for c in cases]
    found = lists.stream_list([job for job, _ in pairs], check=True)
    bad = []
    for i, (case, (_, out)) in enumerate(zip(cases, pairs, strict=True)):
        expected, facts = expected_program(case, True)
        assert expected is not None and facts is not None
        assert torch.equal(bits(out.cpu()), bits(expected)), case.name
        if any(count for _, count in facts["nonfinite"]):  # type: ignore[attr-defined]
            bad.append(i)
    assert found == bad and bad
    assert lists.stream_list([job for job, _ in pairs], check=False) == []


@pytest.fixture
def state_dicts(target: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """(name of the backend, state dicts, calls of its lists): a few dozen norms and biases beside two matrices."""
    backend, device = target
    if getattr(backend, "LISTS", None) is None:
        pytest.skip("the backend has no lists")
    if device == "cpu":
        monkeypatch.setattr(backend, "why_not", lambda op, views: None)
    calls = []
    run = backend.LISTS.stream_list
    monkeypatch.setattr(backend.LISTS, "stream_list", lambda jobs, **k: calls.append(len(jobs)) or run(jobs, **k))
    rng = torch.Generator().manual_seed(3)
    dicts = []
    for _ in range(3):
        d = {f"layer.{i}.norm": torch.randn(64 + 100 * i, generator=rng).to(torch.bfloat16) for i in range(30)}
        d |= {"wide": torch.randn(300, 300, generator=rng), "half": torch.randn(70, generator=rng).half()}
        d["counter"] = torch.arange(3)
        dicts.append({name: x.to(device) for name, x in d.items()})
    return backend.__name__.rpartition(".")[2], dicts, calls


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("task_arithmetic", {"weights": [0.3, 0.7]}),
        ("linear", {"weights": [1, 2]}),
        ("dare_linear", {"weights": 0.5, "density": 0.5, "dialect": "paper"}),
    ],
)
def test_small_tensors_of_state_dicts_share_a_launch(state_dicts: Any, method: str, more: dict[str, Any]) -> None:
    name, (base, *models), calls = state_dicts
    first = None if method == "linear" else base
    got = mk.merge_state_dicts(models, method, base=first, backend=name, seed=5, **more)
    assert calls == [31]
    host = [{k: v.cpu() for k, v in d.items()} for d in (base, *models)]
    expected = mk.merge_state_dicts(
        host[1:], method, base=None if first is None else host[0], backend="reference", seed=5, **more
    )
    assert list(got) == list(expected)
    for k, x in expected.items():
        assert torch.equal(got[k].cpu(), x), k


def test_a_small_tensor_that_is_not_finite_is_refused_by_name(state_dicts: Any) -> None:
    name, (base, *models), _ = state_dicts
    models[1]["layer.7.norm"][11] = float("inf")
    with pytest.raises(DataError, match=r"layer\.7\.norm") as found:
        mk.merge_state_dicts(models, "task_arithmetic", base=base, weights=1.0, backend=name)
    assert "11" in str(found.value)
    merged = mk.merge_state_dicts(models, "task_arithmetic", base=base, weights=1.0, backend=name, nan="propagate")
    assert not merged["layer.7.norm"].isfinite().all()
