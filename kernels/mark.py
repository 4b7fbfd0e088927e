"""`mark` in Triton: what a program decides about each element and model, as packed bits."""

# mypy: ignore-errors
# Branches on constexpr stay statements, of which Triton compiles one; results are taken apart whole.
# ruff: noqa: RUF059, SIM109

from __future__ import annotations

import triton
import triton.language as tl

from ._combine import agrees, elected, merge, stands, term
from ._common import BASE, F64, START, N, delta, element_offsets, first_quads, flat_index, load
from ._quotient import quotient, useful
from ._rules import joint, segment_of
from ._switches import BASE_THERE, SUBTRACT, TABLE

__all__ = ["mark_kernel"]

_KEPT = tl.constexpr(0)
_AGREEING = tl.constexpr(1)


@triton.jit
def mark_kernel(
    table,
    coefficients,
    marks,
    P: tl.constexpr,
    KIND: tl.constexpr,
    NUM_MODELS: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    FLAT: tl.constexpr,
    QUADS: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Bit i % 8 of byte i // 8 of a model's marks: whether element i of the piece is kept, agrees, or is used.

    Reads (NUM_MODELS + base) * itemsize bytes per element, again from the cache for all but KIND 0; writes 1/8 byte
    per element and model. The bits beyond the piece are 0.

    table, coefficients, P, UNROLL, ALIGNED : see `stream_kernel`. marks : int64 [NUM_MODELS], addresses.
    KIND : 0 kept, 1 agreeing, 2 useful.
    """
    e = element_offsets(table, BLOCK)
    n = tl.load(table + N)
    mask = e < n
    g = flat_index(table, e, FLAT)
    quads = first_quads(table, BLOCK)
    x0 = tl.zeros([BLOCK], tl.float64 if COMPUTE == F64 else tl.float32)
    if P // BASE_THERE % 8:
        x0 = load(tl.load(table + BASE), e, mask, DTYPE, COMPUTE, MASKED, ALIGNED)[1]
    together = joint(table, x0, e, g, quads, mask, P, NUM_MODELS, DTYPE, COMPUTE, MASKED, QUADS, ALIGNED, UNROLL)
    at = g
    if P // TABLE % 8:
        at = segment_of(table, g, quads, P // TABLE % 8, QUADS)
    q = x0
    up = mask
    down = mask
    if KIND != _KEPT:
        num, total, vote, divisor, nonzero, lone, positive, negative = merge(
            table,
            coefficients,
            table,
            x0,
            together,
            at,
            e,
            g,
            quads,
            mask,
            P,
            NUM_MODELS,
            NUM_MODELS,
            DTYPE,
            COMPUTE,
            False,
            MASKED,
            QUADS,
            ALIGNED,
            UNROLL,
        )
        q = quotient(coefficients, num, divisor, nonzero, lone, P)
        up, down = elected(vote, P)
    first = tl.load(table + START) + tl.program_id(0).to(tl.int64) * BLOCK
    byte = first // 8 + tl.arange(0, BLOCK // 8).to(tl.int64)
    for m in tl.range(0, NUM_MODELS, loop_unroll_factor=UNROLL):
        if KIND == _KEPT or KIND == _AGREEING:
            x, d, kept, trimmed, et, weight, wt = term(
                table, coefficients, m, x0, together, at, e, g, quads, mask, P, DTYPE, COMPUTE, MASKED, QUADS, ALIGNED
            )
            flag = kept
            if KIND == _AGREEING:
                flag = agrees(stands(et, wt, P), up, down)
        else:
            d = delta(table, m, x0, e, mask, P // SUBTRACT % 8, DTYPE, COMPUTE, MASKED, ALIGNED)[1]
            flag = useful(coefficients, m, d, q)
        bits = tl.reshape((flag & mask).to(tl.int32), [BLOCK // 8, 8]) << tl.arange(0, 8)[None, :]
        packed = tl.sum(bits, axis=1).to(tl.uint8)
        tl.store(tl.load(marks + m).to(tl.pointer_type(tl.uint8)) + byte, packed, mask=byte * 8 < n)
