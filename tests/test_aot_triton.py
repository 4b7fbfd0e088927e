"""Every Triton kernel, dtype and target is compiled ahead of time: exact arithmetic, wide loads, nothing spilled.

Triton compiles without a GPU. Not under TRITON_INTERPRET=1, where kernels are not compiled at all.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("under the interpreter kernels are not compiled", allow_module_level=True)

from mergekernels.kernels import select, stream  # noqa: E402
from mergekernels.kernels._common import LAUNCH_OPTIONS, block_size  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from mergekernels.tensors import BF16, F16, F32, F64, FLOAT_DTYPES, DType  # noqa: E402

POINTER = {BF16: "*i16", F16: "*fp16", F32: "*fp32", F64: "*fp64"}
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# 128 bits in one load: of float64 two, of 16-bit types four words of 32 bits.
WIDE = re.compile(r"ld\.global\.(v4\.[bfu]32|v2\.[bfu]64)")
INEXACT = re.compile(r"fma\.|div\.full|div\.approx|\.ftz|sqrt\.approx|rcp\.approx")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiled afresh, and nothing is left behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def compute_of(dtype: DType) -> DType:
    return F64 if dtype is F64 else F32


def compiled(kernel: Any, pointers: dict[str, str], constants: dict[str, Any], target: GPUTarget) -> Any:
    names = kernel.arg_names
    assert set(names) == set(pointers) | set(constants)
    source = ASTSource(
        fn=kernel,
        signature={name: pointers.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in pointers},
    )
    return triton.compile(source, target=target, options=LAUNCH_OPTIONS)


def stream_kernel(dtype: DType, out: DType, target: GPUTarget, **changes: Any) -> Any:
    constants: dict[str, Any] = {
        "NUM_MODELS": 3,
        "DTYPE": dtype.code,
        "COMPUTE": compute_of(dtype).code,
        "OUT": out.code,
        "HAS_OUT": True,
        "HAS_BASE": True,
        "COPY": False,
        "TRIM": True,
        "TIES": 2,
        "CONSENSUS": 1,
        "ZERO_VOTE": 1,
        "DIVISOR": 2,
        "SCALE": True,
        "RAW": False,
        "STATS": True,
        "SLOTS": 32,
        "FLAT": True,
        "QUADS": True,
        "ALIGNED": True,
        "MASKED": False,
        "UNROLL": 3,
        "BLOCK": block_size(dtype.itemsize, False),
    }
    pointers = {
        "table": "*i64",
        "coefficients": POINTER[compute_of(dtype)],
        "out_ptr": POINTER[out],
        "counters": "*i64",
    }
    return compiled(stream.stream_kernel, pointers, constants | changes, target)


def select_kernel(dtype: DType, target: GPUTarget, **changes: Any) -> Any:
    constants: dict[str, Any] = {
        "NUM_MODELS": 3,
        "DTYPE": dtype.code,
        "COMPUTE": compute_of(dtype).code,
        "HAS_BASE": True,
        "TIES": False,
        "HASH": True,
        "BINS": False,
        "FLAT": True,
        "QUADS": True,
        "ALIGNED": True,
        "MASKED": False,
        "BLOCK": block_size(dtype.itemsize, False),
    }
    pointers = dict.fromkeys(("table", "counters", "ordinals_ptr", "indices_ptr", "bins_ptr"), "*i64")
    return compiled(select.select_kernel, pointers, constants | changes, target)


def block_sums_kernel(dtype: DType, target: GPUTarget, **changes: Any) -> Any:
    constants: dict[str, Any] = {
        "DTYPE": dtype.code,
        "COMPUTE": compute_of(dtype).code,
        "HAS_BASE": True,
        "COPY": False,
        "SCALE": False,
        "ALIGNED": True,
        "BLOCKS": stream.NORM_BLOCKS,
    }
    pointers = {"table": "*i64", "coefficients": POINTER[compute_of(dtype)], "sums_ptr": "*fp64"}
    return compiled(stream.block_sums_kernel, pointers, constants | changes, target)


def cuobjdump() -> str:
    bundled = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    tool = str(bundled) if bundled.exists() else shutil.which("cuobjdump")
    if tool is None:
        pytest.skip("no cuobjdump, neither Triton's nor the toolkit's")
    return tool


def check(kernel: Any, tmp_path: Path, *, wide: int) -> None:
    """Exact arithmetic only, at least `wide` 128-bit loads, no stack and no local memory."""
    if "ptx" not in kernel.asm:
        assert kernel.asm["hsaco"]
        assert (
            "scratch_memory_size: 0" in kernel.asm["amdgcn"] or ".private_segment_fixed_size: 0" in kernel.asm["amdgcn"]
        )
        # Fused operations are part of AMD's division; `fma` of the source would be llvm.fma or a contracted fmul.
        assert "contract" not in kernel.asm["llir"] and "llvm.fmuladd" not in kernel.asm["llir"]
        return
    ptx = kernel.asm["ptx"]
    assert not INEXACT.findall(ptx)
    assert len(WIDE.findall(ptx)) >= wide
    assert ".local" not in ptx
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    usage = subprocess.run([cuobjdump(), "-res-usage", str(binary)], check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage)
    assert found is not None and (found[2], found[3]) == ("0", "0"), usage


def rounds(kernel: Any) -> set[str]:
    return set(re.findall(r"div\.[a-z0-9.]+", kernel.asm["ptx"]))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_bodies_are_exact_and_load_128_bits(dtype: DType, tmp_path: Path) -> None:
    """The launches that do nearly all of the work, for sm_90."""
    target = TARGETS["sm_90"]
    # A base and three models, 16 bytes each per thread or more.
    kernel = stream_kernel(dtype, dtype, target)
    check(kernel, tmp_path, wide=4)
    assert re.search(r"st\.global\.(v4\.[bfu]32|v2\.[bfu]64)", kernel.asm["ptx"])
    assert rounds(kernel) == {"div.rn.f64" if dtype is F64 else "div.rn.f32"}
    # The loop over models is not unrolled in select: one load for it and one for the base.
    kernel = select_kernel(dtype, target)
    check(kernel, tmp_path, wide=2)
    assert "mul.wide.u32" not in kernel.asm["ptx"], "words are drawn where none are asked for"
    check(block_sums_kernel(dtype, target), tmp_path, wide=0)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_every_kernel_compiles_for_every_target(dtype: DType, target: str, tmp_path: Path) -> None:
    goal = TARGETS[target]
    check(stream_kernel(dtype, dtype, goal), tmp_path, wide=4 if "sm" in target else 0)
    check(stream_kernel(dtype, dtype, goal, MASKED=True, FLAT=False, QUADS=False), tmp_path, wide=0)
    check(select_kernel(dtype, goal), tmp_path, wide=2)
    check(select_kernel(dtype, goal, TIES=True), tmp_path, wide=2)
    check(select_kernel(dtype, goal, TIES=True, BINS=True, MASKED=True, FLAT=False, QUADS=False), tmp_path, wide=0)
    check(block_sums_kernel(dtype, goal), tmp_path, wide=0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_every_variant_compiles(dtype: DType, tmp_path: Path) -> None:
    goal = TARGETS["sm_90"]
    for out in FLOAT_DTYPES:
        check(stream_kernel(dtype, out, goal, STATS=False), tmp_path, wide=4)
    changes: list[dict[str, Any]] = [
        {"ALIGNED": False},
        {"NUM_MODELS": 64, "UNROLL": 1},
        {"NUM_MODELS": 1, "UNROLL": 1, "HAS_BASE": False, "TRIM": False, "TIES": 0, "CONSENSUS": 0, "DIVISOR": 1},
        {"NUM_MODELS": 1, "UNROLL": 1, "COPY": True, "RAW": True, "SCALE": False},
        {"NUM_MODELS": 1, "UNROLL": 1, "COPY": True},
        {"HAS_OUT": False},
        {"TIES": 1, "ZERO_VOTE": 0, "DIVISOR": 3},
        {"QUADS": False, "ZERO_VOTE": -1},
    ]
    for change in changes:
        check(stream_kernel(dtype, dtype, goal, **change), tmp_path, wide=0)
    for change in (
        {"TIES": True, "HASH": False, "FLAT": False, "QUADS": False},
        {"TIES": True, "QUADS": False},
        {"HAS_BASE": False, "NUM_MODELS": 64},
        {"ALIGNED": False},
    ):
        check(select_kernel(dtype, goal, **change), tmp_path, wide=0)
    for change in ({"HAS_BASE": False}, {"COPY": True, "SCALE": True}, {"ALIGNED": False}):
        check(block_sums_kernel(dtype, goal, **change), tmp_path, wide=0)
