"""Every feature of the Triton kernels under Triton's interpreter, bit for bit against the reference.

Some cases of each kind run always, the rest are `exhaustive`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton's interpreter is asked for before start: TRITON_INTERPRET=1", allow_module_level=True)


import feature_cases as cases
from mergekernels._backends import triton as backend

LARGEST = 9000


def some(found: Sequence[Any], step: int, first: int = 0) -> pytest.MarkDecorator:
    """One case in `step` as an ordinary test, the others as exhaustive ones."""
    params = [
        pytest.param(case, id=cases.by_name(case), marks=[] if i % step == first else pytest.mark.exhaustive)
        for i, case in enumerate(found)
    ]
    return pytest.mark.parametrize("case", params)


@some(cases.program_cases(60, LARGEST), 5, 3)
def test_programs(case: Any) -> None:
    cases.check_program(backend, case)


@some(cases.program_cases(60, LARGEST)[::9], 6, 2)
def test_programs_in_pieces(case: Any) -> None:
    cases.check_program(backend, case, pieces="cut")


@some(cases.program_cases(60, LARGEST)[::13], 6, 2)
def test_statistics_alone_and_output_alone(case: Any) -> None:
    cases.check_program(backend, case, output=False)
    cases.check_program(backend, case, counted=False)


@some(cases.mark_cases(30, LARGEST), 3)
def test_marks(case: Any) -> None:
    cases.check_mark(backend, case)


@some(cases.sweep_cases(LARGEST), 3)
def test_sweeps(case: Any) -> None:
    cases.check_sweep(backend, case)


@some(cases.gram_cases(), 6)
def test_dot_products(case: Any) -> None:
    cases.check_gram(backend, case)


@some(cases.reduce_cases(30, LARGEST), 4)
def test_reductions(case: Any) -> None:
    cases.check_reduce(backend, case)


@some(cases.divergence_cases(), 5)
def test_divergences(case: Any) -> None:
    cases.check_divergence(backend, case)
