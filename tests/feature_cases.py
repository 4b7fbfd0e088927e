"""One seeded set of cases for every backend, and the comparison of a backend with the reference, bit for bit.

A test module of a backend takes the cases and calls the check of their kind::

    @pytest.mark.parametrize("case", program_cases(), ids=by_name)
    def test_programs(case): check_program(backend, case)

`device` is where the backend computes, `pieces` "whole" or "cut" (several calls on parts of the tensor).
"""

from __future__ import annotations

from feature_shared import Cut, by_name
from feature_streams import (
    MarkCase,
    ProgramCase,
    check_mark,
    check_program,
    mark_cases,
    program_cases,
)
from feature_sums import (
    DivergenceCase,
    GramCase,
    ReduceCase,
    check_divergence,
    check_gram,
    check_kept,
    check_reduce,
    divergence_cases,
    gram_cases,
    gram_sums,
    kept_cases,
    reduce_cases,
)
from feature_sweeps import SweepCase, check_sweep, sweep_cases

__all__ = [
    "Cut",
    "DivergenceCase",
    "GramCase",
    "MarkCase",
    "ProgramCase",
    "ReduceCase",
    "SweepCase",
    "by_name",
    "check_divergence",
    "check_gram",
    "check_kept",
    "check_mark",
    "check_program",
    "check_reduce",
    "check_sweep",
    "divergence_cases",
    "gram_cases",
    "gram_sums",
    "kept_cases",
    "mark_cases",
    "program_cases",
    "reduce_cases",
    "sweep_cases",
]
