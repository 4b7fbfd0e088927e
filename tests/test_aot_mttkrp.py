"""The Triton kernels of mttkrp, compiled ahead of time: float32 products without TF32, nothing spilled."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mergekernels.kernels import mttkrp
from test_aot_triton import LAUNCH_OPTIONS, TARGETS, ASTSource, cache, cuobjdump, triton

__all__ = ["cache"]


def compiled(kernel: Any, signature: dict[str, str], constants: dict[str, int], target: str) -> Any:
    """With pointers that are multiples of 16, and sizes of any value."""
    names = kernel.arg_names
    assert set(names) == set(signature) | set(constants)
    source = ASTSource(
        fn=kernel,
        signature={name: signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n, kind in signature.items() if kind[0] == "*"},
    )
    return triton.compile(source, target=TARGETS[target], options=LAUNCH_OPTIONS)


@pytest.mark.parametrize(
    "target", ["sm_90", *(pytest.param(t, marks=pytest.mark.slow) for t in TARGETS if t != "sm_90")]
)
def test_products_are_float32_and_nothing_spills(target: str, tmp_path: Path) -> None:
    rows, step, width = mttkrp.tile_sizes(False)
    signature = {"x": "*fp32", "p": "*fp32", "c": "*fp32", "owner": "*i32", "out": "*fp32"}
    signature |= dict.fromkeys(("rows", "ranks", "width"), "i32")
    outer = compiled(mttkrp.outer_kernel, signature, {"ROWS": rows, "STEP": step, "WIDTH": width}, target)
    signature = {"p": "*fp32", "s": "*fp32", "ends": "*i32", "out": "*fp64", "width": "i32"}
    task = compiled(mttkrp.task_kernel, signature, {"STEP": step, "WIDTH": width}, target)
    for found in (outer, task):
        if "ptx" not in found.asm:
            text = found.asm["amdgcn"]
            assert "scratch_memory_size: 0" in text or ".private_segment_fixed_size: 0" in text
            continue
        assert "tf32" not in found.asm["ptx"] and ".local" not in found.asm["ptx"]
        binary = tmp_path / "kernel.cubin"
        binary.write_bytes(found.asm["cubin"])
        usage = subprocess.run([cuobjdump(), "-res-usage", str(binary)], check=True, capture_output=True, text=True)
        sizes = re.search(r"STACK:(\d+) .*LOCAL:(\d+)", usage.stdout)
        assert sizes is not None and sizes.groups() == ("0", "0"), usage.stdout
