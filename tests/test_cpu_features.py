"""The cpu backend over the cases of every feature: instruction sets, threads, cuts, with and without statistics."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cpu_cases import ISAS
from feature_cases import (
    MarkCase,
    ProgramCase,
    ReduceCase,
    by_name,
    check_kept,
    check_mark,
    check_program,
    check_reduce,
    kept_cases,
    mark_cases,
    program_cases,
    reduce_cases,
)
from mergekernels._backends import cpu


@pytest.fixture(autouse=True, params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("MERGEKERNELS_CPU_ISA", request.param)
    yield request.param


def _here(cases: tuple[object, ...]) -> list[object]:
    """Those that this backend says it can run."""
    return [c for c in cases if c.needs <= cpu.FEATURES]  # type: ignore[attr-defined]


@pytest.mark.parametrize("case", _here(program_cases()), ids=by_name)
def test_programs(case: ProgramCase) -> None:
    check_program(cpu, case, threads=1)
    check_program(cpu, case, threads=2, pieces="cut")
    check_program(cpu, case, threads=3, counted=False)
    check_program(cpu, case, threads=1, output=False)


@pytest.mark.parametrize("case", _here(mark_cases()), ids=by_name)
def test_marks(case: MarkCase) -> None:
    check_mark(cpu, case, threads=1)
    check_mark(cpu, case, threads=3, pieces="cut")


@pytest.mark.parametrize("case", _here(reduce_cases()), ids=by_name)
def test_sums(case: ReduceCase) -> None:
    check_reduce(cpu, case, threads=1)
    check_reduce(cpu, case, threads=2, pieces="cut")


@pytest.mark.parametrize("case", _here(kept_cases()), ids=by_name)
def test_what_is_kept_replaces_the_rules(case: ReduceCase) -> None:
    check_kept(cpu, case)
