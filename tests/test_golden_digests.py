"""One digest per method and dtype: every backend, instruction set, thread count and shard cut must reproduce it.

`python tests/test_golden_digests.py` writes golden/digests.json anew, from the reference backend; a changed digest is a
changed result, to be explained in the changelog.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from digest_runs import merged, merged_sharded
from golden_family import DTYPES
from mergekernels import _cpu
from method_cases import CASES

FILE = Path(__file__).parent / "golden" / "digests.json"
GOLDEN: dict[str, dict[str, str]] = json.loads(FILE.read_text()) if FILE.exists() else {}

@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors are small here, and on a busy machine torch's threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


each = pytest.mark.parametrize(("case", "dtype"), [(c, d) for c in CASES for d in DTYPES])


@each
def test_cpu(case: str, dtype: str) -> None:
    assert merged(case, dtype, backend="cpu", threads=2) == GOLDEN[case][dtype]


@each
def test_reference(case: str, dtype: str) -> None:
    assert merged(case, dtype, backend="reference") == GOLDEN[case][dtype]


@each
def test_threads(case: str, dtype: str) -> None:
    for threads in (1, 3, 8):
        assert merged(case, dtype, backend="cpu", threads=threads) == GOLDEN[case][dtype], threads


@each
def test_instruction_sets(case: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for isa in _cpu.isas()[1:]:
        monkeypatch.setenv("MERGEKERNELS_CPU_ISA", isa)
        assert merged(case, dtype, backend="cpu", threads=2) == GOLDEN[case][dtype], isa


@each
@pytest.mark.parametrize("dim", [0, 1])
def test_shards(case: str, dtype: str, dim: int) -> None:
    assert merged_sharded(case, dtype, dim, backend="cpu", threads=2) == GOLDEN[case][dtype]


if __name__ == "__main__":
    FILE.write_text(
        json.dumps({c: {d: merged(c, d, backend="reference") for d in DTYPES} for c in CASES}, indent=1) + "\n"
    )
