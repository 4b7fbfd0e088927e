"""Every method with the Triton kernels: the golden digest. Dtypes take turns, the interpreter being slow."""

from __future__ import annotations

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton's interpreter is asked for before start: TRITON_INTERPRET=1", allow_module_level=True)


from digest_runs import GOLDEN, merged
from golden_family import DTYPES
from method_cases import CASES

QUICK = ("linear", "ties", "sce", "magmax", "arcee_fusion", "model_stock-rows", "nuslerp-columns")


# All of them take minutes.
@pytest.mark.parametrize("case", [pytest.param(c, marks=[] if c in QUICK else [pytest.mark.slow]) for c in CASES])
def test_digest(case: str) -> None:
    dtype = list(DTYPES)[list(CASES).index(case) % len(DTYPES)]
    assert merged(case, dtype, backend="triton") == GOLDEN[case][dtype]
