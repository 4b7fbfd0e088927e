"""The Triton kernels of learned coefficients are compiled ahead of time: exact arithmetic, no mathematics library."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("under the interpreter kernels are not compiled", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from mergekernels.kernels import learned  # noqa: E402
from mergekernels.kernels._common import LAUNCH_OPTIONS  # noqa: E402

INEXACT = re.compile(r"fma\.|div\.full|div\.approx|\.ftz|sqrt\.approx|rcp\.approx|ex2|lg2|__nv_")


def ptx_of(kernel: Any, result: str, constants: dict[str, Any], compute: str) -> str:
    names = kernel.arg_names
    pointers = {"table": "*i64", "coefficients": compute, names[2]: result}
    assert set(names) == set(pointers) | set(constants)
    source = ASTSource(
        fn=kernel,
        signature={name: pointers.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in pointers},
    )
    return str(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=LAUNCH_OPTIONS).asm["ptx"])


@pytest.mark.parametrize("code", [pytest.param(0, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_kernels_compile_exactly(
    code: int, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
    compute = "*fp64" if code == 3 else "*fp32"
    kinds = {"LOGITS": code, "COMPUTE": 3 if code == 3 else 2}
    inputs = {**kinds, "HAS_BASE": True, "DTYPE": code, "GRADIENT": code}
    sums = {**inputs, "NUM_MODELS": 3, "BLOCKS": learned.SUM_BLOCKS}
    merge = {**inputs, "NUM_MODELS": 3, "OUT": code, "ALIGNED": True, "BLOCK": 256}
    texts = [
        ptx_of(learned.seg_dot_kernel, "*fp64", {**sums, "GROUPS": 4, "HAS_MASK": True}, compute),
        ptx_of(learned.mask_sum_kernel, "*fp64", {**kinds, "BLOCKS": learned.SUM_BLOCKS}, compute),
    ]
    out = {0: "*i16", 2: "*fp32", 3: "*fp64"}[code]
    for slope, masked in ((False, False), (True, True)):
        texts.append(ptx_of(learned.mask_merge_kernel, out, {**merge, "SLOPE": slope, "MASKED": masked}, compute))
    for text in texts:
        assert not INEXACT.search(text)
