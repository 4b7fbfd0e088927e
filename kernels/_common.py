"""What the Triton kernels share: element types as bits, exact arithmetic, Philox, and launch options.

Element types are constexpr numbers, the codes of `mergekernels.tensors`: 0 bfloat16, 1 float16, 2 float32, 3 float64.
bfloat16 travels as int16 and is widened by a shift, because Triton's interpreter computes bfloat16 on wrong bits.
Scalars and per-model numbers come through one int64 table instead of arguments, so that no value is specialised.
"""

# mypy: ignore-errors
# Branches on constexpr stay statements, of which Triton compiles one; results are taken apart whole.
# ruff: noqa: SIM108

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

BF16 = tl.constexpr(0)
F16 = tl.constexpr(1)
F32 = tl.constexpr(2)
F64 = tl.constexpr(3)

# The header of the table; rows of ROW numbers per model follow.
N = tl.constexpr(0)
G0 = tl.constexpr(1)
COLS = tl.constexpr(2)
LD = tl.constexpr(3)
SEED = tl.constexpr(4)
TENSOR = tl.constexpr(5)
BASE = tl.constexpr(6)
OFFSET = tl.constexpr(7)
START = tl.constexpr(8)
CAPACITY = tl.constexpr(9)
JOINT_POINT = tl.constexpr(10)  # tau, tie rule, word, index
VALUES = tl.constexpr(14)  # of a table: address
LENGTH = tl.constexpr(15)
SEGMENTS = tl.constexpr(16)
GROUP_TENSOR = tl.constexpr(17)
ROW_FACTORS = tl.constexpr(18)  # of the key "importance": address
ROW_LENGTH = tl.constexpr(19)
AT_LEAST = tl.constexpr(20)
QUANTITY_SLOTS = tl.constexpr(21)  # the first slot of each of the eleven quantities
HEADER = tl.constexpr(32)

# A row: the address of the input, then of a program the rule of the model, of a sweep a search.
ADDRESS = tl.constexpr(0)
POINT = tl.constexpr(1)  # tau, tie rule, word, index
TOP = tl.constexpr(5)  # the same for the entries that a band cuts off
RULE = tl.constexpr(9)
THRESHOLD = tl.constexpr(10)
MASK = tl.constexpr(11)  # address of the bytes or bits
THRESHOLDS = tl.constexpr(12)  # address, 0 if nothing is divided
ROW = tl.constexpr(16)

MAX_KEY_F32 = tl.constexpr(0x7F800001)
MAX_KEY_F64 = tl.constexpr(0x7FF0000000000001)
DRAW_PURPOSE = tl.constexpr(0)
TIE_PURPOSE = tl.constexpr(2)
GROUP_PURPOSE = tl.constexpr(3)

# Contraction would change bits; no value of these kernels depends on the number of warps.
LAUNCH_OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}


def block_size(itemsize: int, interpreted: bool, *, heavy: bool = False) -> int:
    """Elements per program: 16 bytes of every input per thread, and few programs where each takes 0.5 ms.

    heavy : the program computes exponentials, which take many registers.
    """
    if interpreted:
        return 4096
    return 256 if itemsize == 8 or heavy else 1024


@triton.jit
def element_offsets(table, BLOCK: tl.constexpr):
    """Positions in the piece of this program's elements, int64 [BLOCK], beginning at the launch's first element."""
    start = tl.multiple_of(tl.load(table + START), 16)
    return start + tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)


@triton.jit
def flat_index(table, e, FLAT: tl.constexpr):
    """Flat index in the unsharded tensor of position e of the piece, int64."""
    g = tl.load(table + G0) + e
    if not FLAT:
        cols = tl.load(table + COLS)
        r = e // cols
        g = tl.load(table + G0) + r * tl.load(table + LD) + (e - r * cols)
    return g


@triton.jit
def load(address, e, mask, DTYPE: tl.constexpr, COMPUTE: tl.constexpr, MASKED: tl.constexpr, ALIGNED: tl.constexpr):
    """Elements e of the array at an address (int64): (as stored, exactly in the compute dtype). Masked ones are 0."""
    if DTYPE == BF16:
        p = address.to(tl.pointer_type(tl.int16))
    elif DTYPE == F16:
        p = address.to(tl.pointer_type(tl.float16))
    elif DTYPE == F32:
        p = address.to(tl.pointer_type(tl.float32))
    else:
        p = address.to(tl.pointer_type(tl.float64))
    # Addresses known to be multiples of 16 are what turns the loads of a body launch into 128-bit ones.
    if ALIGNED:
        p = tl.multiple_of(p, 16)
    if MASKED:
        raw = tl.load(p + e, mask=mask, other=0)
    else:
        raw = tl.load(p + e)
    x = raw
    if DTYPE == BF16:
        x = (raw.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    if COMPUTE == F64:
        x = x.to(tl.float64)
    else:
        x = x.to(tl.float32)
    return raw, x


@triton.jit
def delta(
    table,
    m,
    x0,
    e,
    mask,
    SUBTRACT: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    MASKED: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """The values of input m and what they differ from the base by: (x, x - x0), or (x, x)."""
    x = load(tl.load(table + HEADER + m * ROW), e, mask, DTYPE, COMPUTE, MASKED, ALIGNED)[1]
    d = x
    if SUBTRACT:
        d = x - x0
    return x, d


@triton.jit
def magnitude_bits(x):
    """The bits of |x| as int32 or int64."""
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return bits


@triton.jit
def key_of(d):
    """The key of |d|: its bits, every NaN one above infinity."""
    bits = magnitude_bits(d)
    if d.dtype == tl.float64:
        key = tl.minimum(bits, tl.full(bits.shape, MAX_KEY_F64, tl.int64))
    else:
        key = tl.minimum(bits, tl.full(bits.shape, MAX_KEY_F32, tl.int32))
    return key


@triton.jit
def is_nonfinite(x):
    """True where x is NaN or infinite."""
    if x.dtype == tl.float64:
        bad = magnitude_bits(x) >= 0x7FF0000000000000
    else:
        bad = magnitude_bits(x) >= 0x7F800000
    return bad


@triton.jit
def narrow(y, OUT: tl.constexpr):
    """Value rounded once to nearest even to the output dtype, every NaN canonical: (what to store, is it finite).

    bfloat16 comes as int16.
    """
    if OUT == F64:
        bits = y.to(tl.float64).to(tl.int64, bitcast=True)
        bits = tl.where(y != y, tl.full(bits.shape, 0x7FF8000000000000, tl.int64), bits)
        finite = (bits & 0x7FF0000000000000) != 0x7FF0000000000000
        out = bits.to(tl.float64, bitcast=True)
    else:
        z = y.to(tl.float32)
        bits = z.to(tl.int32, bitcast=True)
        if OUT != F32 and y.dtype == tl.float64:
            # Rounded to odd: toward zero, the last bit set where anything was cut off. That bit stands for the rest, so
            # that the second rounding gives what one rounding of the double would.
            back = z.to(tl.float64)
            bits = (bits - (tl.abs(back) > tl.abs(y)).to(tl.int32)) | (back != y).to(tl.int32)
            z = bits.to(tl.float32, bitcast=True)
        if OUT == F32:
            bits = tl.where(z != z, tl.full(bits.shape, 0x7FC00000, tl.int32), bits)
            finite = (bits & 0x7F800000) != 0x7F800000
            out = bits.to(tl.float32, bitcast=True)
        elif OUT == BF16:
            # Integer rounding: a cast truncates in the interpreter. The sum cannot overflow for a finite or infinite z.
            half = (bits >> 16) & 1
            rounded = ((bits + (half + 0x7FFF)) >> 16) & 0xFFFF
            rounded = tl.where(z != z, tl.full(bits.shape, 0x7FC0, tl.int32), rounded)
            finite = (rounded & 0x7F80) != 0x7F80
            out = rounded.to(tl.int16)
        else:
            rounded = z.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
            rounded = tl.where(z != z, tl.full(bits.shape, 0x7E00, tl.int32), rounded)
            finite = (rounded & 0x7C00) != 0x7C00
            out = rounded.to(tl.int16).to(tl.float16, bitcast=True)
    return out, finite


@triton.jit
def divide(a, b):
    """Quotient rounded to nearest even; plain float32 division is approximate on NVIDIA GPUs."""
    if a.dtype == tl.float64:
        q = a / b
    else:
        q = tl.div_rn(a, b)
    return q


@triton.jit
def philox(seed, tensor, stream, group):
    """The four Philox4x32-10 words of each group of four elements, uint32.

    Key: seed. Counter: group (64 bits), tensor id, stream.

    seed, tensor : int64 scalars (the low 32 bits of the tensor id count). stream : integer. group : int64 block, >= 0.
    """
    c0 = group.to(tl.uint32)
    c1 = (group >> 32).to(tl.uint32)
    zero = c0 ^ c0
    c2 = zero + tensor.to(tl.uint32)
    c3 = (zero.to(tl.int64) + stream).to(tl.uint32)
    k0 = zero + seed.to(tl.uint32)
    k1 = zero + (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        product0 = c0.to(tl.uint64) * tl.full(c0.shape, 0xD2511F53, tl.uint64)
        product1 = c2.to(tl.uint64) * tl.full(c0.shape, 0xCD9E8D57, tl.uint64)
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = product1.to(tl.uint32)
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = product0.to(tl.uint32)
        k0 = k0 + tl.full(k0.shape, 0x9E3779B9, tl.uint32)
        k1 = k1 + tl.full(k1.shape, 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def first_quads(table, BLOCK: tl.constexpr):
    """The groups of four that this program's elements form where flat indices are consecutive, int64 [BLOCK / 4]."""
    first = tl.load(table + G0) + tl.load(table + START) + tl.program_id(0).to(tl.int64) * BLOCK
    return (first >> 2) + tl.arange(0, BLOCK // 4).to(tl.int64)


@triton.jit
def words(seed, tensor, stream, g, quads, QUADS: tl.constexpr):
    """The word of each flat index g: lane g mod 4 of group g div 4, uint32.

    QUADS : the flat indices are those of the groups `quads` in order, so that one call gives four words.
    """
    if QUADS:
        c0, c1, c2, c3 = philox(seed, tensor, stream, quads)
        found = tl.reshape(tl.join(tl.join(c0, c2), tl.join(c1, c3)), g.shape)
    else:
        c0, c1, c2, c3 = philox(seed, tensor, stream, g >> 2)
        lane = g & 3
        found = tl.where((lane & 1) == 0, tl.where(lane == 0, c0, c2), tl.where(lane == 1, c1, c3))
    return found


@triton.jit
def tally2(a, b):
    """Numbers of true flags in two blocks of at most 2^15 elements, int64, by one reduction."""
    packed = tl.sum(a.to(tl.int32) + (b.to(tl.int32) << 16), axis=0)
    return (packed & 0xFFFF).to(tl.int64), (packed >> 16).to(tl.int64)


@triton.jit
def tally3(a, b, c):
    """Numbers of true flags in three blocks of at most 2^15 elements, int64, by one reduction."""
    packed = tl.sum(a.to(tl.int64) + (b.to(tl.int64) << 16) + (c.to(tl.int64) << 32), axis=0)
    return packed & 0xFFFF, (packed >> 16) & 0xFFFF, packed >> 32


@triton.jit
def report_nonfinite(first_ptr, count_ptr, number, bad, index):
    """Lower *first_ptr to the smallest index of a bad element and add their number to *count_ptr."""
    if number > 0:
        tl.atomic_add(count_ptr, number, sem="relaxed")
        nowhere = tl.full(index.shape, 0x7FFFFFFFFFFFFFFF, tl.int64)
        tl.atomic_min(first_ptr, tl.min(tl.where(bad, index, nowhere), axis=0), sem="relaxed")
