"""The hot loops of the CPU backend as the compiler left them: whole vectors of their instruction set, no contraction.

The built module is disassembled. A loop is what a backward jump encloses; innermost loops are looked at. In each step
of a pass every one of them that computes with floating-point numbers must do so in the widest registers of its
instruction set (ymm for AVX2, zmm for AVX-512) and in no scalar instruction. AVX-512 code is checked on any machine.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from mergekernels import _cpu

REGISTERS = {"avx2": "ymm", "avx512": "zmm"}
FLOATS = r"(?:add|sub|mul|div|sqrt|min|max)"
SCALAR = re.compile(rf"v?{FLOATS}s[sd]$|v?cvt(?:ss2sd|sd2ss|t?s[sd]2si|si2s[sd])\w*$")
PACKED = re.compile(rf"v?{FLOATS}p[sd]$|v?cvtp[sd]2p[sd]\w*$")

STEPS = (
    *("weigh_block", "vote_block", "copy_block", "norms_block", "trim_block", "apply_factors", "elect_block"),
    *("merge_block", "divide_block", "alone_block", "limit_block", "useful_block", "finish_block", "add_quantity"),
    "variances",
)
"""Steps that do arithmetic, each for float and for double."""

MASKS = ("points_mask", "words_mask", "bits_mask", "bytes_mask", "has_bad")
"""Steps that compare or expand; they have loops of another kind as well, over ties or bytes."""

Loop = list[tuple[str, str]]


def disassembly() -> str:
    """The code of the module with its symbols; a wheel has none, the build that it comes from does."""
    tool = shutil.which("objdump")
    if tool is None:
        pytest.skip("no objdump, from the binutils that come with a compiler")
    builds = Path(__file__).parents[1].glob("build/*/_cpu*.so")
    found = sorted(builds, key=lambda p: p.stat().st_mtime, reverse=True)
    for path in [Path(_cpu.__file__), *found]:
        text = subprocess.run(
            [tool, "-d", "-C", "--no-show-raw-insn", str(path)], check=True, capture_output=True, text=True
        ).stdout
        if "weigh_block" in text:
            return text
    pytest.skip("the symbols of the module are stripped, and no build folder is at hand")


@pytest.fixture(scope="module")
def functions() -> dict[str, dict[str, list[tuple[int, str, str]]]]:
    """Per instruction set and function: (address, mnemonic, operands) of each instruction."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the instruction sets are those of x86")
    found: dict[str, dict[str, list[tuple[int, str, str]]]] = {"avx2": {}, "avx512": {}}
    for name, body in re.findall(r"^[0-9a-f]+ <(.*)>:\n((?:.+\n)*)", disassembly(), flags=re.MULTILINE):
        where = re.search(r"mergekernels::(avx2|avx512)::\(anonymous namespace\)::(.*)", name)
        if where is None:
            continue
        lines = re.findall(r"^\s*([0-9a-f]+):\t(\S+)[ \t]*(.*)$", body, flags=re.MULTILINE)
        found[where.group(1)][where.group(2)] = [(int(a, 16), op, args) for a, op, args in lines]
    return found


def innermost_loops(code: list[tuple[int, str, str]]) -> list[Loop]:
    """Stretches from the target of a backward jump to the jump that hold no other such stretch."""
    place = {address: i for i, (address, _, _) in enumerate(code)}
    spans = []
    for i, (_, op, args) in enumerate(code):
        target = re.match(r"([0-9a-f]+)\b", args) if op.startswith("j") else None
        if target is not None and place.get(int(target.group(1), 16), i + 1) <= i:
            spans.append((place[int(target.group(1), 16)], i))
    inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    return [[(op, args) for _, op, args in code[a : b + 1]] for a, b in inner]


def instances(functions: dict[str, list[tuple[int, str, str]]], step: str) -> dict[str, list[tuple[int, str, str]]]:
    """The copies of a template, by their full names."""
    return {name: code for name, code in functions.items() if re.match(rf"(?:void |bool )?{step}\b", name)}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("isa", REGISTERS)
def test_arithmetic_is_in_whole_vectors(
    functions: dict[str, dict[str, list[tuple[int, str, str]]]], isa: str, step: str
) -> None:
    copies = instances(functions[isa], step)
    for kind, packed in (("float", "ps"), ("double", "pd")):
        of_kind = [name for name in copies if re.match(rf"(?:void |bool )?{step}<{kind}\b", name)]
        assert of_kind, f"no {step} of {kind}"
        for name in of_kind:
            loops = innermost_loops(copies[name])
            wide = 0
            for loop in loops:
                scalar = [op for op, _ in loop if SCALAR.match(op)]
                assert not scalar, f"{isa} {name}: {scalar}"
                arithmetic = [(op, args) for op, args in loop if PACKED.match(op)]
                # Conversions and widened sums have one operand of half the width.
                assert all(REGISTERS[isa] in args for _, args in arithmetic), f"{isa} {name}: {arithmetic}"
                wide += any(REGISTERS[isa] in args and packed in op for op, args in arithmetic)
            # The compiler may unroll the loop over a block completely.
            straight = sum(REGISTERS[isa] in args for _, op, args in copies[name] if PACKED.match(op))
            assert wide or straight >= 16, f"{isa} {name}: no vectorised loop"


@pytest.mark.parametrize("step", MASKS)
@pytest.mark.parametrize("isa", REGISTERS)
def test_masks_are_in_whole_vectors(
    functions: dict[str, dict[str, list[tuple[int, str, str]]]], isa: str, step: str
) -> None:
    copies = instances(functions[isa], step)
    assert len(copies) >= 2
    for name, code in copies.items():
        wide = [loop for loop in innermost_loops(code) if any(REGISTERS[isa] in args for _, args in loop)]
        straight = sum(REGISTERS[isa] in args for _, _, args in code)
        assert wide or straight >= 16, f"{isa} {name}"


@pytest.mark.parametrize("isa", REGISTERS)
def test_philox_multiplies_whole_vectors(functions: dict[str, dict[str, list[tuple[int, str, str]]]], isa: str) -> None:
    """Four vectors of groups at a time: after the rounds that all share, 2 + 16 products for each."""
    (code,) = instances(functions[isa], "philox_dense").values()
    (loop,) = [x for x in innermost_loops(code) if any(op == "vpmuludq" for op, _ in x)]
    products = [args for op, args in loop if op == "vpmuludq"]
    assert len(products) == 4 * 18 and all(REGISTERS[isa] in args for args in products)


@pytest.mark.parametrize("isa", REGISTERS)
def test_loads_and_stores_convert_whole_vectors(
    functions: dict[str, dict[str, list[tuple[int, str, str]]]], isa: str
) -> None:
    for step, kinds in (("load_block", ("vpmovzxwd", "vpslld")), ("store_block", ("vpsrld",))):
        for name, code in instances(functions[isa], step).items():
            ops = {op for _, op, args in code if REGISTERS[isa] in args}
            assert ops.issuperset(kinds), f"{isa} {name}: {sorted(ops)}"


def test_nothing_is_contracted(functions: dict[str, dict[str, list[tuple[int, str, str]]]]) -> None:
    fused = re.compile(r"vf[n]?m(?:add|sub)")
    for isa, found in functions.items():
        assert found, f"no code for {isa}"
        for name, code in found.items():
            operations = [(op, operands) for _, op, operands in code if fused.match(op)]
            if name.startswith("thin_rows"):  # products with a stated bound, not of stated bits
                assert operations and all(op.endswith("pd") and REGISTERS[isa] in x for op, x in operations)
            else:
                assert not operations, f"{isa} {name}"
