"""The cases of every feature for a GPU backend; a test module imports them and gives `target`, see gpu_cases.py."""

from __future__ import annotations

from typing import Any

import pytest

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


def wanted(target: Any, case: Any) -> tuple[Any, str]:
    backend, device = target
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
