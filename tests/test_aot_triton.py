"""Every Triton kernel, dtype and target is compiled ahead of time: exact arithmetic, wide loads, nothing spilled.

Triton compiles without a GPU. Not under TRITON_INTERPRET=1, where kernels are not compiled at all.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("under the interpreter kernels are not compiled", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from mergekernels.kernels import divergence, gram, mark, rank, reduce, select, stream  # noqa: E402
from mergekernels.kernels._common import LAUNCH_OPTIONS, block_size  # noqa: E402
from mergekernels.kernels._switches import pack  # noqa: E402
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


def common(dtype: DType) -> dict[str, Any]:
    return {"DTYPE": dtype.code, "COMPUTE": compute_of(dtype).code, "ALIGNED": True}


def place(dtype: DType) -> dict[str, Any]:
    return {"FLAT": True, "QUADS": True, "MASKED": False, "BLOCK": block_size(dtype.itemsize, False)}


TIES = {"POINTS": 1, "TIES": 2, "VOTE": 1, "ZERO_VOTE": 1, "DIVISOR": 2, "SCALE": 1, "BASE_THERE": 1, "SUBTRACT": 1}
DELTA = {"BASE_THERE": 1, "SUBTRACT": 1}
# The main combinations of switches: what the methods build, and between them every switch.
PROGRAMS: dict[str, dict[str, int]] = {
    "linear": {"DIVISOR": 1},
    "task_arithmetic": {**DELTA, "SCALE": 1},
    "passthrough": {"COPY": 1, "SCALE": 1},
    "dare_ties": {**TIES, "POINTS": 0, "TIES": 0, "DRAWS": 1, "FACTORS": 1},
    "dare_ties_paper": {**TIES, "TIES": 0, "DRAWS": 1, "FACTORS": 1},
    "della": {**TIES, "POINTS": 0, "TIES": 0, "MASKS": 1, "DIVIDES": 1},
    "breadcrumbs": {**DELTA, "POINTS": 1, "BANDS": 1, "TIES": 2, "DIVISOR": 4, "SCALE": 1},
    "marked": {**DELTA, "BITS": 1, "VOTE": 3, "DIVISOR": 3},
    "sce": {**DELTA, "JOINT": 1, "TIES": 2, "VOTE": 2, "DIVISOR": 2, "FLOOR": 1},
    "fusion": {**DELTA, "JOINT": 2, "TIES": 1},
    "magmax": {**DELTA, "MERGE": 2},
    "emr": {**DELTA, "VOTE": 2, "MERGE": 1, "ZERO_VOTE": 2},
    "ram": {**DELTA, "DIVISOR": 4, "ALONE": 1},
    "consensus": {**DELTA, "USEFUL": 1, "ANCHOR": 1},
    "rows": {**DELTA, "TABLE": 1, "LIMIT": 1},
    "columns": {"BASE_THERE": 1, "TABLE": 2, "LIMIT": 2},
    "groups": {**DELTA, "TABLE": 3},
    "fisher": {"MERGE": 3},
    "pcb": {**DELTA, "MERGE": 4},
}


def stream_kernel(dtype: DType, out: DType, target: GPUTarget, program: dict[str, int], **changes: Any) -> Any:
    constants: dict[str, Any] = {
        **common(dtype),
        **place(dtype),
        "BLOCK": block_size(dtype.itemsize, False, heavy=program.get("MERGE") == 4),
        "P": pack(**program),
        "NUM_MODELS": 3,
        "NUM_INPUTS": 6 if program.get("MERGE") == 3 else 3,
        "OUT": out.code,
        "HAS_OUT": True,
        "RAW": False,
        "STATS": True,
        "SLOTS": 32,
        "UNROLL": 1 if program.get("MERGE") == 4 else 3,
    }
    pointers = {
        "table": "*i64",
        "coefficients": POINTER[compute_of(dtype)],
        "out_ptr": POINTER[out],
        "counters": "*i64",
    }
    return compiled(stream.stream_kernel, pointers, constants | changes, target)


def mark_kernel(dtype: DType, target: GPUTarget, program: dict[str, int], kind: int) -> Any:
    constants = {**common(dtype), **place(dtype), "P": pack(**program), "KIND": kind, "NUM_MODELS": 3, "UNROLL": 3}
    pointers = {"table": "*i64", "coefficients": POINTER[compute_of(dtype)], "marks": "*i64"}
    return compiled(mark.mark_kernel, pointers, constants, target)


def select_kernel(dtype: DType, target: GPUTarget, **changes: Any) -> Any:
    constants: dict[str, Any] = {
        **common(dtype),
        **place(dtype),
        "KEY": 0,
        "NUM_SEARCHES": 3,
        "NUM_MODELS": 3,
        "HAS_BASE": True,
        "TIES": False,
        "HASH": True,
        "BINS": False,
    }
    pointers = dict.fromkeys(("table", "counters", "ordinals_ptr", "indices_ptr", "bins_ptr"), "*i64")
    pointers["numbers"] = "*i64" if changes.get("KEY") == 4 else POINTER[compute_of(dtype)]
    return compiled(select.select_kernel, pointers, constants | changes, target)


def reduce_kernel(dtype: DType, target: GPUTarget, program: dict[str, int], *quantities: int) -> Any:
    four = [*quantities, *[reduce.NONE] * (4 - len(quantities))]
    importance = program.get("MERGE") == 3
    merged = bool(reduce.MERGED & set(quantities))
    constants: dict[str, Any] = {
        **common(dtype),
        "P": pack(**program),
        **{f"WHICH{i}": q for i, q in enumerate(four)},
        "NEEDS_MERGE": merged,
        "NEEDS_TOTAL": bool(reduce.TOTAL & set(quantities)),
        "NEEDS_IMPORTANCE": importance,
        "NUM_MODELS": 3,
        "NUM_INPUTS": 6 if importance else 3,
        "MODELS": 3,
        "QUADS": True,
        "UNROLL": 3,
        "BLOCKS": reduce.blocks_for(merged and (dtype is F64 or program.get("MERGE") == 4)),
    }
    pointers = {"table": "*i64", "coefficients": POINTER[compute_of(dtype)], "sums_ptr": "*fp64"}
    return compiled(reduce.reduce_kernel, pointers, constants, target)


def gram_kernel(dtype: DType, target: GPUTarget, models: int, *, columns: bool = False, base: bool = True) -> Any:
    constants = {
        **common(dtype),
        "NUM_MODELS": models,
        "SIDE": gram.tile(models, columns)[0],
        "COLUMNS": columns,
        "HAS_BASE": base,
        "BLOCKS": gram.tile(models, columns)[1],
    }
    return compiled(gram.gram_kernel, {"table": "*i64", "sums_ptr": "*fp64"}, constants, target)


def divergence_kernel(dtype: DType, target: GPUTarget, *, terms: bool) -> Any:
    number = POINTER[compute_of(dtype)]
    pointers = {"table": "*i64", "maxima": number, "totals": number, "sums_ptr": "*fp64"}
    return compiled(divergence.divergence_kernel, pointers, {**common(dtype), "TERMS": terms, "BLOCKS": 4}, target)


def rank_kernels(dtype: DType, target: GPUTarget, stage: int, chunk: int = 2048) -> list[Any]:
    constants = {**common(dtype), "STAGE": stage, "HAS_BASE": True, "QUADS": True, "CHUNK": chunk}
    constants["STEPS"] = chunk.bit_length() - 1
    before = {"table": "*i64", "plan": "*i64", "places": "*i32", "flags": "*i32", "sorted_ptr": "*i64"}
    after = {"new_places": "*i32", "new_flags": "*i32", "masks": "*u8", "thresholds": "*i32"}
    sort = compiled(rank.sort_kernel, before, {**constants, "ROWS": 2048 // chunk}, target)
    search = {**constants, "DIVIDE": True, "BLOCK": 1024}
    return [sort, compiled(rank.search_kernel, {**before, **after}, search, target)]


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
    kernel = stream_kernel(dtype, dtype, target, TIES)
    check(kernel, tmp_path, wide=4)
    assert re.search(r"st\.global\.(v4\.[bfu]32|v2\.[bfu]64)", kernel.asm["ptx"])
    assert rounds(kernel) == {"div.rn.f64" if dtype is F64 else "div.rn.f32"}
    # The loop over models is not unrolled in select: one load for it and one for the base.
    kernel = select_kernel(dtype, target)
    check(kernel, tmp_path, wide=2)
    assert "mul.wide.u32" not in kernel.asm["ptx"], "words are drawn where none are asked for"
    check(reduce_kernel(dtype, target, DELTA, 1), tmp_path, wide=0)


def test_functions_use_doubles(tmp_path: Path) -> None:
    """The constants of exp and log are in the code as doubles, and no library is called."""
    kernel = divergence_kernel(BF16, TARGETS["sm_90"], terms=True)
    check(kernel, tmp_path, wide=0)
    ptx = kernel.asm["ptx"].upper()
    for number in (
        6.93147180369123816490e-01,
        1.90821492927058770002e-10,
        1.44269504088896338700e00,
        1.0 / 479001600.0,
    ):
        assert f"0D{struct.unpack('<Q', struct.pack('<d', number))[0]:016X}" in ptx
    assert "__NV_" not in ptx and "EX2" not in ptx and "LG2" not in ptx


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_every_kernel_compiles_for_every_target(dtype: DType, target: str, tmp_path: Path) -> None:
    goal = TARGETS[target]
    check(stream_kernel(dtype, dtype, goal, TIES), tmp_path, wide=4 if "sm" in target else 0)
    check(stream_kernel(dtype, dtype, goal, TIES, MASKED=True, FLAT=False, QUADS=False), tmp_path, wide=0)
    check(select_kernel(dtype, goal), tmp_path, wide=2)
    check(select_kernel(dtype, goal, TIES=True), tmp_path, wide=2)
    check(select_kernel(dtype, goal, TIES=True, BINS=True, MASKED=True, FLAT=False, QUADS=False), tmp_path, wide=0)
    check(reduce_kernel(dtype, goal, DELTA, 1), tmp_path, wide=0)
    check(reduce_kernel(dtype, goal, TIES, 2, 3), tmp_path, wide=0)
    check(mark_kernel(dtype, goal, TIES, 1), tmp_path, wide=4 if "sm" in target else 0)
    check(gram_kernel(dtype, goal, 2), tmp_path, wide=0)
    check(divergence_kernel(dtype, goal, terms=True), tmp_path, wide=0)
    for kernel in rank_kernels(dtype, goal, 1):
        check(kernel, tmp_path, wide=0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_compiles(name: str, dtype: DType, tmp_path: Path) -> None:
    goal, program = TARGETS["sm_90"], PROGRAMS[name]
    models = 1 if program.get("COPY") or program.get("JOINT") == 2 else 3
    sizes = {"NUM_MODELS": models, "NUM_INPUTS": models, "UNROLL": models} if models == 1 else {}
    for changes in ({}, {"STATS": False}, {"MASKED": True, "FLAT": False, "QUADS": False}):
        check(stream_kernel(dtype, dtype, goal, program, **sizes, **changes), tmp_path, wide=0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_every_variant_compiles(dtype: DType, tmp_path: Path) -> None:
    goal = TARGETS["sm_90"]
    for out in FLOAT_DTYPES:
        check(stream_kernel(dtype, out, goal, TIES, STATS=False), tmp_path, wide=4)
    one: dict[str, Any] = {"NUM_MODELS": 1, "NUM_INPUTS": 1, "UNROLL": 1}
    check(stream_kernel(dtype, dtype, goal, TIES, ALIGNED=False), tmp_path, wide=0)
    check(stream_kernel(dtype, dtype, goal, TIES, NUM_MODELS=64, NUM_INPUTS=64, UNROLL=1), tmp_path, wide=0)
    check(stream_kernel(dtype, dtype, goal, {"COPY": 1}, RAW=True, **one), tmp_path, wide=0)
    check(stream_kernel(dtype, dtype, goal, TIES, HAS_OUT=False), tmp_path, wide=0)
    for change in (
        {"TIES": True, "HASH": False, "FLAT": False, "QUADS": False},
        {"TIES": True, "QUADS": False},
        {"HAS_BASE": False, "NUM_SEARCHES": 64, "NUM_MODELS": 64},
        {"ALIGNED": False},
        {"KEY": 1},
        {"KEY": 2},
        {"KEY": 3, "BLOCK": block_size(dtype.itemsize, False, heavy=True)},
        {"KEY": 3, "BLOCK": block_size(dtype.itemsize, False, heavy=True), "TIES": True, "MASKED": True},
        {"KEY": 4},
    ):
        check(select_kernel(dtype, goal, **change), tmp_path, wide=0)
    for kind in (0, 1, 2):
        check(mark_kernel(dtype, goal, {**TIES, "USEFUL": int(kind == 2)}, kind), tmp_path, wide=4)
    for program, quantities in (
        (TIES, (4, 7, 10)),
        (PROGRAMS["sce"], (9,)),
        (PROGRAMS["pcb"], (10,)),
        (PROGRAMS["fisher"], (5, 8)),
        ({"COPY": 1, "SCALE": 1}, (1,)),
    ):
        check(reduce_kernel(dtype, goal, program, *quantities), tmp_path, wide=0)
    check(gram_kernel(dtype, goal, 3), tmp_path, wide=0)
    check(gram_kernel(dtype, goal, 5, base=False), tmp_path, wide=0)
    check(gram_kernel(dtype, goal, 3, columns=True), tmp_path, wide=0)
    check(divergence_kernel(dtype, goal, terms=False), tmp_path, wide=0)
    for stage in (0, 1, 2) if dtype is F64 else (1, 2):
        for chunk in (4, 2048):
            for kernel in rank_kernels(dtype, goal, stage, chunk):
                check(kernel, tmp_path, wide=0)
