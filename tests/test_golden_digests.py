"""One digest per method and dtype: every backend, instruction set, thread count and shard cut must reproduce it.

`python tests/test_golden_digests.py` writes golden/digests.json anew, from the reference backend; a changed digest is a
changed result, to be explained in the changelog.
"""

from __future__ import annotations

import json

import pytest

import mergekernels as mk
from digest_runs import FILE, GOLDEN, merged, merged_sharded
from golden_family import DTYPES
from mergekernels import _cpu
from method_cases import CASES

pytestmark = pytest.mark.usefixtures("one_thread")

each = pytest.mark.parametrize(("case", "dtype"), [(c, d) for c in CASES for d in DTYPES])


def test_every_method_has_a_case() -> None:
    known = {name: info for name, info in mk.methods().items() if info.tier != "T2"}
    assert {c.method for c in CASES.values()} == set(known)
    dialects = {(c.method, c.dialect) for c in CASES.values()}
    assert dialects >= {(name, d) for name, info in known.items() for d in info.dialects if d == "default"}
    assert set(GOLDEN) == set(CASES)


@each
def test_cpu(case: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for threads in (1, 2, 3, 8):
        assert merged(case, dtype, backend="cpu", threads=threads) == GOLDEN[case][dtype], threads
    for isa in _cpu.isas()[1:]:
        monkeypatch.setenv("MERGEKERNELS_CPU_ISA", isa)
        assert merged(case, dtype, backend="cpu", threads=2) == GOLDEN[case][dtype], isa


@each
def test_shards(case: str, dtype: str) -> None:
    for dim in (0, 1):
        assert merged_sharded(case, dtype, dim, backend="cpu", threads=2) == GOLDEN[case][dtype], dim


# The reference is slow: two dtypes of every method here, the others with the slow tests.
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(c, d, marks=[] if (i + j) % 2 == 0 else [pytest.mark.slow])
        for i, c in enumerate(CASES)
        for j, d in enumerate(DTYPES)
    ],
)
def test_reference(case: str, dtype: str) -> None:
    assert merged(case, dtype, backend="reference") == GOLDEN[case][dtype]


if __name__ == "__main__":
    FILE.write_text(
        json.dumps({c: {d: merged(c, d, backend="reference") for d in DTYPES} for c in CASES}, indent=1) + "\n"
    )
