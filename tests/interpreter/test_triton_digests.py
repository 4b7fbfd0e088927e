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


# Each of these has a rule, vote, merge or sum that the others have not; the rest take minutes more.
SLOW = (
    "dare_ties",
    "della",
    "breadcrumbs-paper",
    "pcb",
    "ramplus_tl",
    "emr",
    "consensus",
    "nearswap",
    "fisher",
    "lines",
)


def _marks(case: str) -> list[pytest.MarkDecorator]:
    return [] if case in QUICK else [pytest.mark.slow if case in SLOW else pytest.mark.exhaustive]


@pytest.mark.parametrize("case", [pytest.param(c, marks=_marks(c)) for c in CASES])
def test_digest(case: str) -> None:
    dtype = list(DTYPES)[list(CASES).index(case) % len(DTYPES)]
    assert merged(case, dtype, backend="triton") == GOLDEN[case][dtype]
