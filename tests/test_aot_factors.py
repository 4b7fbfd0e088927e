"""The Triton kernel of factor tiles, compiled ahead of time: every product and sum rounded, nothing spilled."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from mergekernels.kernels import factors
from test_aot_triton import TARGETS, cache, check, compiled

__all__ = ["cache"]


def kernel(target: str) -> Any:
    rows, cols = factors.tile_size(False)
    pointers = {"table": "*i64", "b": "*fp32", "a": "*fp32", "out": "*fp32"}
    return compiled(factors.factor_tile_kernel, pointers, {"ROWS": rows, "COLS": cols}, TARGETS[target])


@pytest.mark.parametrize(
    "target", ["sm_90", *(pytest.param(t, marks=pytest.mark.slow) for t in TARGETS if t != "sm_90")]
)
def test_products_and_sums_are_separate_instructions(target: str, tmp_path: Path) -> None:
    found = kernel(target)
    check(found, tmp_path, wide=0)
    if "ptx" not in found.asm:
        assert "mfma" not in found.asm["amdgcn"]
        return
    ptx = found.asm["ptx"]
    # 32 sums in each of 128 threads, on no tensor core.
    for name in ("add", "mul"):
        found_pairs = len(re.findall(rf"{name}\.(?:rn\.)?f32x2\b", ptx))
        assert len(re.findall(rf"{name}\.(?:rn\.)?f32\b", ptx)) + 2 * found_pairs >= 32
    assert "mma" not in ptx and "tf32" not in ptx
