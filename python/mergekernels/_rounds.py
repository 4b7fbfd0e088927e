"""The rounds of a method over tensors in memory: each runs a pass of measurement and hands over what it yields."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import _cpu
from ._backends.dispatch import Backend, require
from ._keeping import Kept
from ._methods.protocol import ByTensor, Coeffs, Method, Round, Spec, Stats, alone
from .ops.assembly import alignment, parts
from .ops.inputs import Inputs
from .ops.program import Program
from .ops.select import run_sweep
from .ops.stream import run_program
from .ops.sums import Gram, Reduce, Sums
from .tensors import Piece

if TYPE_CHECKING:
    from ._cpu import BlockSums

__all__ = ["resolve_scope", "run_divergence", "run_gram", "run_reduce"]


def resolve_scope(
    method: Method,
    specs: Sequence[Spec],
    tensors: Sequence[Inputs],
    backend: Backend,
    threads: int,
    nan: str,
    kept: list[Kept] | None = None,
) -> Coeffs:
    """Run the rounds of one scope: all its tensors, in scope order. The specs differ only in their tensor.

    kept : gets what the last summing round kept, where the scope is one whole tensor and it is worth remembering.

    Raises
    ------
    DataError : with nan="error", NaN or Inf in an input. BackendError : the backend lacks what a round needs.
    """
    state = method.start(specs[0])
    while isinstance(state, Round):
        stats, visited = _run(method, state, specs, tensors, backend, threads, nan, kept)
        state = method.resolve(specs[0], state, stats, visited)
    return state


def _run(
    method: Method,
    state: Round,
    specs: Sequence[Spec],
    tensors: Sequence[Inputs],
    backend: Backend,
    threads: int,
    nan: str,
    kept: list[Kept] | None,
) -> tuple[Stats, int]:
    n = specs[0].scope.n
    if state.op == "select":
        assert state.selection is not None
        return run_sweep(state.selection, tensors, backend, threads, nan)
    if state.op == "votes":
        assert state.coeffs is not None
        votes = _cpu.StreamStats(tensors[0].num_models, 0)
        for spec, inputs in zip(specs, tensors, strict=True):
            run_program(method.apply(spec, state.coeffs), inputs, None, backend, threads, "propagate", votes)
        return votes, n
    if state.op == "each":
        assert state.each is not None
        found_by = {}
        for spec, inputs in zip(specs, tensors, strict=True):
            found_by[spec.name] = resolve_scope(state.each, [alone(spec)], [inputs], backend, threads, nan)
        return ByTensor(of=found_by), n
    values = []
    for spec, inputs in zip(specs, tensors, strict=True):
        if state.op == "reduce":
            assert state.reduce is not None and state.coeffs is not None
            program = method.apply(spec, state.coeffs)
            bits = None if kept is None else Kept.of(backend, program, inputs.n, 8 * inputs.n)
            if kept is not None:
                kept[:] = [] if bits is None else [bits]
            found = run_reduce(program, state.reduce, inputs, backend, threads, bits)
        elif state.op == "gram":
            assert state.gram is not None
            found = run_gram(state.gram, inputs, backend, threads)
        else:
            found = (run_divergence(state.row_length, inputs, backend, threads),)
        if nan == "error" and not all(all(map(math.isfinite, s)) for s in found):
            _find_nonfinite(inputs, backend, threads)
        values.append(found)
    return Sums(tuple(values)), n


def run_reduce(
    program: Program, request: Reduce, inputs: Inputs, backend: Backend, threads: int, kept: Kept | None = None
) -> tuple[array[float], ...]:
    """The sums of a program over one tensor, one array of one number per slot. kept : gets what is kept."""
    require(backend, program.features | {"reduce"})
    sums = _cpu.BlockSums(request.num_slots(len(program.weights)), 1, inputs.n)
    for part in parts(inputs, alignment(program.slab)):
        backend.reduce(
            program,
            request,
            sums,
            part.flat,
            part.base,
            part.models,
            compute=inputs.compute,
            threads=threads,
            **({} if kept is None else {"kept": kept.views(part.flat)}),  # only for a backend that has "reduce:kept"
        )
    return _fold(sums)


def run_gram(request: Gram, inputs: Inputs, backend: Backend, threads: int) -> tuple[array[float], ...]:
    """The dot products of one tensor, one array with a number per segment for each pair."""
    require(backend, frozenset({"gram"}))
    segments = request.segments
    num_models = inputs.num_models
    count, length = (1, inputs.n) if segments.axis == "tensor" else (segments.count, segments.length)
    sums = _cpu.BlockSums(num_models * (num_models + 1) // 2, count, length)
    if segments.axis == "tensor":
        align = alignment()
    elif segments.axis == "rows":
        align = max(1, segments.length)
    else:
        align = 4096 * segments.count
    for part in parts(inputs, align):
        piece = part.flat
        if segments.axis == "rows":
            piece = Piece(part.start, part.count // segments.length, segments.length, segments.length)
        elif segments.axis == "columns":
            piece = Piece(part.start, part.count // segments.count, segments.count, segments.count)
        backend.gram(request, sums, piece, part.base, part.models, compute=inputs.compute, threads=threads)
    return _fold(sums)


def run_divergence(row_length: int, inputs: Inputs, backend: Backend, threads: int) -> array[float]:
    """The divergence of each row of the one model from the base."""
    require(backend, frozenset({"divergence"}))
    found = array("d")
    for part in parts(inputs, row_length):
        assert part.base is not None
        found += backend.divergence(
            row_length, part.flat, part.base, part.models[0], compute=inputs.compute, threads=threads
        )
    return found


def _fold(sums: BlockSums) -> tuple[array[float], ...]:
    folded = []
    for slot in range(sums.num_slots):
        numbers = array("d")
        numbers.frombytes(sums.fold(slot))
        folded.append(numbers)
    return tuple(folded)


def _find_nonfinite(inputs: Inputs, backend: Backend, threads: int) -> None:
    """Name the first NaN or Inf of the inputs, if a sum is not finite because of one."""
    models = inputs.num_models
    program = Program((1.0,) * models, (None,) * models, base=inputs.has_base)
    run_program(program, inputs, None, backend, threads, "error")
