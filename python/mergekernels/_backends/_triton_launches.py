"""The launches of the Triton backend; see `_launches.Launches`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from .._native import torch_dtype
from ..ops.program import Program
from ..ops.sweeps import Sweep
from ..tensors import BF16, F64, DType, Piece
from ._device import Operands, is_flat
from ._launches import SLOTS, Extras
from ._triton_ranks import launch_rank_masks, run
from ._triton_tables import (
    KEYS,
    box_table,
    coefficients,
    interpreted,
    kernels,
    program_table,
    quantity_slots,
    sweep_table,
    switches,
)

if TYPE_CHECKING:
    import torch

__all__ = [
    "launch_divergence",
    "launch_gram",
    "launch_mark",
    "launch_rank_masks",
    "launch_reduce",
    "launch_stream",
    "launch_sweep",
]

_KIND = {"kept": 0, "agreeing": 1, "useful": 2}


def launch_sweep(
    request: Sweep,
    inputs: Operands,
    piece: Piece,
    compute: DType,
    tensor: int,
    offset: int,
    counters: torch.Tensor,
    entries: torch.Tensor,
    bins: torch.Tensor | None,
    numbers: torch.Tensor | None,
) -> None:
    """See _launches.Launches."""
    block = _block(inputs, request)
    tables = sweep_table(request, inputs, piece, tensor, offset, entries.shape[2], numbers, block)
    constants = {
        "KEY": KEYS[request.key],
        "NUM_SEARCHES": len(request.intervals),
        "NUM_MODELS": len(inputs.models),
        "DTYPE": inputs.dtype.code,
        "COMPUTE": compute.code,
        "HAS_BASE": inputs.base is not None,
        "TIES": any(i is not None and i.stage == "tie" for i in request.intervals),
        "HASH": request.order == "hash",
        "BINS": bins is not None,
        **_place(piece),
        "ALIGNED": inputs.aligned,
    }
    # Pointers that a variant does not read are given what is at hand, of the type that they have elsewhere.
    spare = counters.view(torch_dtype(compute)) if numbers is None else numbers
    arguments = (counters, entries[0], entries[1], entries if bins is None else bins, spare)
    _cover(kernels("select").select_kernel, piece.numel, block, tables, arguments, constants)


def launch_stream(
    program: Program,
    inputs: Operands,
    piece: Piece,
    compute: DType,
    out: torch.Tensor | None,
    out_dtype: DType,
    counters: torch.Tensor | None,
    raw: bool,
    extras: Extras,
) -> None:
    """See _launches.Launches."""
    import torch

    block = _block(inputs, program)
    tables = program_table(program, inputs, piece, compute, extras, block=block)
    constants = {
        **_shared(program, inputs, compute),
        "NUM_INPUTS": program.num_inputs,
        "OUT": out_dtype.code,
        "HAS_OUT": out is not None,
        "RAW": raw,
        "STATS": counters is not None,
        "SLOTS": SLOTS,
        **_place(piece),
    }
    # bfloat16 is written as the integers that the kernel makes.
    written = tables if out is None else out.view(torch.int16) if out_dtype is BF16 else out
    arguments = (coefficients(program, inputs, compute), written, tables if counters is None else counters)
    _cover(kernels("stream").stream_kernel, piece.numel, block, tables, arguments, constants)


def launch_reduce(
    program: Program,
    quantities: tuple[str, ...],
    inputs: Operands,
    piece: Piece,
    compute: DType,
    sums: torch.Tensor,
    extras: Extras,
) -> None:
    """See _launches.Launches."""
    module = kernels("reduce")
    num_models = len(program.weights)
    slots = quantity_slots(quantities, num_models)
    table = program_table(program, inputs, piece, compute, extras, slots=slots)[0]
    numbers = coefficients(program, inputs, compute)
    shared = _shared(program, inputs, compute)
    # Those that need all models come apart from those that need one, four at a time for the sake of registers.
    for several in (False, True):
        wanted = [q for q in slots if (q in module.MERGED | module.TOTAL) == several]
        for first in range(0, len(wanted), 4):
            four = wanted[first : first + 4]
            needs_merge = bool(module.MERGED & set(four))
            blocks = module.blocks_for(needs_merge and (compute is F64 or bool(program.balance)))
            constants = {
                **shared,
                **{f"WHICH{i}": four[i] if i < len(four) else module.NONE for i in range(4)},
                "NEEDS_MERGE": needs_merge,
                "NEEDS_TOTAL": bool(module.TOTAL & set(four)),
                "NEEDS_IMPORTANCE": program.num_inputs > num_models,
                "NUM_INPUTS": program.num_inputs,
                "MODELS": 1 if set(four) <= module.SINGLE else num_models,
                "QUADS": piece.g0 % 4 == 0,
                "BLOCKS": blocks,
            }
            # All on the first axis: the others end at 65,535.
            grid = (constants["MODELS"] * -(-sums.shape[1] // blocks),)
            run(module.reduce_kernel, grid, (table, numbers, sums), constants)


def launch_mark(
    program: Program,
    kind: Literal["kept", "agreeing", "useful"],
    inputs: Operands,
    piece: Piece,
    compute: DType,
    marks: Sequence[torch.Tensor],
    extras: Extras,
) -> None:
    """See _launches.Launches."""
    import torch

    block = _block(inputs, program)
    tables = program_table(program, inputs, piece, compute, extras, block=block)
    addresses = torch.tensor([x.data_ptr() for x in marks], dtype=torch.int64).to(tables.device)
    constants = {**_shared(program, inputs, compute), "KIND": _KIND[kind], **_place(piece)}
    arguments = (coefficients(program, inputs, compute), addresses)
    _cover(kernels("mark").mark_kernel, piece.numel, block, tables, arguments, constants)


def launch_gram(
    subtract: bool,
    columns: bool,
    inputs: Operands,
    rows: int,
    cols: int,
    compute: DType,
    sums: torch.Tensor,
) -> None:
    """See _launches.Launches."""
    num_models = len(inputs.models)
    side, blocks = kernels("gram").tile(num_models, columns)
    constants = {
        "NUM_MODELS": num_models,
        "SIDE": side,
        "COLUMNS": columns,
        "DTYPE": inputs.dtype.code,
        "COMPUTE": compute.code,
        "HAS_BASE": subtract and inputs.base is not None,
        "ALIGNED": inputs.aligned,
        "BLOCKS": blocks,
    }
    sides = -(-num_models // side)
    grid = (sides * sides * -(-sums.shape[1] * sums.shape[2] // blocks),)
    run(kernels("gram").gram_kernel, grid, (box_table(inputs, rows, cols), sums), constants)


def launch_divergence(
    inputs: Operands,
    rows: int,
    cols: int,
    compute: DType,
    maxima: torch.Tensor,
    totals: torch.Tensor | None,
    sums: torch.Tensor,
) -> None:
    """See _launches.Launches."""
    constants = {
        "TERMS": totals is not None,
        "DTYPE": inputs.dtype.code,
        "COMPUTE": compute.code,
        "ALIGNED": inputs.aligned,
        "BLOCKS": 4,
    }
    grid = (-(-rows * sums.shape[2] // 4),)
    arguments = (box_table(inputs, rows, cols), maxima, maxima if totals is None else totals, sums)
    run(kernels("divergence").divergence_kernel, grid, arguments, constants)


def _place(piece: Piece) -> dict[str, bool]:
    return {"FLAT": is_flat(piece), "QUADS": is_flat(piece) and piece.g0 % 4 == 0}


def _shared(program: Program, inputs: Operands, compute: DType) -> dict[str, Any]:
    num_models = len(program.weights)
    return {
        "P": switches(program, inputs),
        "NUM_MODELS": num_models,
        "DTYPE": inputs.dtype.code,
        "COMPUTE": compute.code,
        "ALIGNED": inputs.aligned,
        # A few models are loaded at once; more would only cost registers, and long terms are not worth repeating.
        "UNROLL": num_models if num_models <= 4 and program.merge != "balance" else 1,
    }


def _block(inputs: Operands, request: Program | Sweep) -> int:
    """Elements per program."""
    return int(kernels("_common").block_size(inputs.dtype.itemsize, interpreted(), heavy=bool(request.balance)))


def _cover(
    kernel: Any, n: int, block: int, tables: torch.Tensor, arguments: tuple[Any, ...], constants: dict[str, Any]
) -> None:
    """Launches a kernel over n elements: whole blocks without masks, so that loads are wide, then the rest."""
    if n >= block:
        run(kernel, (n // block,), (tables[0], *arguments), constants | {"MASKED": False, "BLOCK": block})
    if n % block:
        run(kernel, (1,), (tables[1], *arguments), constants | {"MASKED": True, "BLOCK": block})
