"""What the compiler made of the CUDA kernels: nothing spilled, no contraction, wide loads. Needs no GPU."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

KERNELS = (
    *("stream_kernel", "block_sums_kernel", "sweep_kernel", "bins_kernel", "program_kernel", "reduce_kernel"),
    *("list_kernel", "gram_rows_kernel", "gram_columns_kernel", "divergence_kernel", "rank_kernel"),
    *("seg_dot_kernel", "grouped_dot_kernel", "mask_merge_kernel"),
)
SMALL = ("jacobi_kernel",)
BY_COMPUTE = ("mask_sum_kernel",)
STACKS = {"als_kernel": 1, "mttkrp_thin_kernel": 2, "mttkrp_task_kernel": 1}


@pytest.fixture(scope="module")
def module() -> str:
    spec = importlib.util.find_spec("mergekernels._cuda")
    if spec is None or spec.origin is None:
        pytest.skip("the native module _cuda is not built (it needs nvcc when the package is built)")
    return spec.origin


@pytest.fixture(scope="module")
def tool() -> str:
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        bundled = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"
        if bundled.exists():
            return str(bundled)
    found = shutil.which("cuobjdump")
    if found is None:
        pytest.skip("no cuobjdump, neither Triton's nor the toolkit's")
    return found


def dump(tool: str, option: str, module: str) -> str:
    return subprocess.run([tool, option, module], check=True, capture_output=True, text=True).stdout


def test_no_kernel_uses_local_memory(tool: str, module: str) -> None:
    """Registers suffice on every architecture: neither stack frames nor spills."""
    usage = dump(tool, "-res-usage", module)
    found = re.findall(r"Function (\S+?):?\n\s*REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
    names = [name for name, *_ in found]
    for kernel in KERNELS:
        # float32 arithmetic on three dtypes, float64 on one.
        assert sum(kernel in name for name in names) % 4 == 0
        assert any(kernel in name for name in names)
    for kernel in SMALL:
        # SVD and eigenproblem, float32 and float64.
        assert any(kernel in name for name in names) and sum(kernel in name for name in names) % 4 == 0
    for kernel in BY_COMPUTE:
        # float32 and float64 arithmetic; the dtype of its only input is known at run time.
        assert any(kernel in name for name in names) and sum(kernel in name for name in names) % 2 == 0
    architectures = sum("mttkrp_task_kernel" in name for name in names)
    for kernel, variants in STACKS.items():
        assert sum(kernel in name for name in names) == variants * architectures > 0
    assert all(stack == "0" and local == "0" for _, _, stack, local in found), usage
    assert max(int(registers) for _, registers, *_ in found) <= 255


def test_arithmetic_is_not_contracted_and_loads_are_wide(tool: str, module: str) -> None:
    """In the embedded PTX; machine code has fused operations inside its exact divisions."""
    ptx = dump(tool, "-ptx", module)
    assert "stream_kernel" in ptx and "sweep_kernel" in ptx
    assert not re.findall(r"\b(?:fma|mad)\.(?:rn|rz|rm|rp)[.\w]*|div\.(?:full|approx)|\.ftz", ptx)
    assert "div.rn.f32" in ptx and "div.rn.f64" in ptx
    assert len(re.findall(r"ld\.global\.v(?:4\.[bfu]32|2\.[bfu]64)", ptx)) >= 20
    assert re.search(r"st\.global\.v(?:4\.[bfu]32|2\.[bfu]64)", ptx)


def test_module_needs_no_cuda_library(module: str) -> None:
    """The runtime is linked in: the module imports where there is neither driver nor toolkit."""
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("no readelf")
    needed = re.findall(
        r"NEEDED.*\[(.*?)\]", subprocess.run([readelf, "-d", module], capture_output=True, text=True).stdout
    )
    assert needed and not [name for name in needed if "cuda" in name or "torch" in name]
