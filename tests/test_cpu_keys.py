"""Counting passes of the cpu backend over every key, against the reference: joint keys, searches that share a model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from cpu_cases import ISAS, values
from feature_cases import SweepCase, by_name, check_sweep, sweep_cases
from mergekernels import _cpu
from mergekernels._backends import cpu
from mergekernels._native import view_of
from mergekernels.ops.sweeps import Interval, Sweep
from mergekernels.tensors import F32, Piece


@pytest.fixture(autouse=True, params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("MERGEKERNELS_CPU_ISA", request.param)
    yield request.param


@pytest.mark.parametrize("case", sweep_cases(), ids=by_name)
def test_sweeps(case: SweepCase) -> None:
    check_sweep(cpu, case, threads=1)
    check_sweep(cpu, case, threads=3, pieces="cut")


def test_a_large_sweep_in_threads() -> None:
    # The team is as large as the bytes are worth.
    n = 900_001
    models = [values("normal", n, F32, m) for m in range(3)]
    base = values("normal", n, F32, 9)
    request = Sweep((Interval("key", 1, 0x3F000000, 0, 0), Interval("tie", 0, 2**31, 0, 2)), key="variance", seed=5)
    piece = Piece.flat(0, n)
    case = SweepCase("large", request, piece, base, tuple(models), 3, 7, 5000)
    for threads in (1, 2, 3):
        check_sweep(cpu, case, threads=threads)


def test_joint_keys_need_all_models() -> None:
    x = torch.zeros(10)
    request = Sweep((Interval("key", 1, 5),), key="variance")
    with pytest.raises(ValueError, match="all models"):
        cpu.sweep(
            request,
            _cpu.SweepStats([1], [1], [5], [0], 0, 9),
            Piece.flat(0, 10),
            None,
            [view_of(x), None],
            compute=F32,
            tensor=0,
            offset=0,
            threads=1,
        )


def test_many_searches_of_one_model() -> None:
    n = 5000
    x = values("normal", n, F32, 1)
    intervals = tuple(Interval("key", 0x30000000 + i * 1000, 0x3F000000 + i, 0, 0) for i in range(128))
    check_sweep(cpu, SweepCase("many", Sweep(intervals, base=False), Piece.flat(0, n), None, (x,), 3, 7, 50))
    with pytest.raises(ValueError, match="128 searches"):
        _cpu.SweepStats([1] * 129, [1] * 129, [5] * 129, [0] * 129, 0, 9)
