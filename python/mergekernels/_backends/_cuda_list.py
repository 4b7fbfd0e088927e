"""`stream` over a list of small tensors on a GPU: one launch over many (tensor, tile) items, with one table."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..ops.program import Program
from ..tensors import DType, Piece, TensorView
from . import _cuda_launches as launches
from ._cuda_plan import address, fields
from ._device import Operands, operands
from ._gpu import extras_for
from ._launches import Extras

if TYPE_CHECKING:
    import torch

__all__ = ["Job", "can_list", "stream_list"]

_ALIGNMENT = 16


@dataclass(frozen=True)
class Job:
    """One tensor of a list: a program without `copy`, marks and ranks; `out` is dense. All lie on one device."""

    program: Program
    piece: Piece
    base: TensorView | None
    models: Sequence[TensorView]
    out: TensorView
    compute: DType


@dataclass(frozen=True)
class _Ready:
    """A job whose inputs are dense and of one dtype, with what its program needs beside them."""

    number: int
    job: Job
    inputs: Operands
    extras: Extras


def can_list(program: Program) -> bool:
    """Whether a program may be part of a list."""
    return not program.copy and not program.features & {"rank", "marked"}


def stream_list(jobs: Sequence[Job], *, check: bool) -> list[int]:
    """Run all jobs. check : wait, and tell the numbers of those with NaN or Inf in an input or the result."""

    groups: dict[tuple[torch.device, DType, DType], list[_Ready]] = {}
    for number, job in enumerate(jobs):
        if not job.piece.numel:
            continue
        inputs = operands(job.base, job.models, job.compute)
        extras = extras_for(launches, job.program, inputs, job.piece, job.compute, ())
        key = (inputs.present[0].device, inputs.dtype, job.compute)
        groups.setdefault(key, []).append(_Ready(number, job, inputs, extras))
    flags = [(group, _launch(group, *key, check=check)) for key, group in groups.items()]
    bad: list[int] = []
    for group, found in flags:
        if found is not None:
            bad += [ready.number for ready, flag in zip(group, found.tolist(), strict=True) if flag]
    return sorted(bad)


def _launch(group: list[_Ready], device: torch.device, dtype: DType, compute: DType, *, check: bool) -> Any:
    """The flags of the jobs of one device and dtype, on the device; None without `check`."""
    import torch

    native = launches.native()
    plans = [native.plan(fields(r.job.program, r.job.piece, r.extras), compute.code) for r in group]
    tiles = array("i")
    for i, ready in enumerate(group):
        for tile in range(-(-ready.job.piece.numel // native.TILE)):
            tiles.extend((i, tile))
    places, size = [], 0
    for part in plans:
        places.append(size)
        size += -(-len(part) // _ALIGNMENT) * _ALIGNMENT
    # Items are all of one size; the first is made without knowing where the table will lie.
    items_at = size
    size += len(group) * len(_item(native, group[0], 0, compute))
    tiles_at = size
    table = torch.empty(tiles_at + 4 * len(tiles), dtype=torch.uint8, device=device)
    data = bytearray(table.numel())
    for place, part in zip(places, plans, strict=True):
        data[place : place + len(part)] = part
    items = b"".join(_item(native, r, table.data_ptr() + p, compute) for r, p in zip(group, places, strict=True))
    data[items_at:tiles_at] = items
    data[tiles_at:] = tiles.tobytes()
    table.copy_(torch.frombuffer(data, dtype=torch.uint8))
    flags = torch.zeros(len(group), dtype=torch.int32, device=device) if check else None
    start = table.data_ptr()
    with launches.launching():
        native.program_list(
            start + items_at,
            start + tiles_at,
            len(tiles) // 2,
            address(flags),
            dtype.code,
            compute.code,
            *launches.queue_of(table),
        )
    return flags


def _item(native: Any, ready: _Ready, plan: int, compute: DType) -> bytes:
    out = ready.job.out
    models = [address(x) for x in ready.inputs.models]
    made: bytes = native.list_item(
        plan, launches.box(ready.job.piece), address(ready.inputs.base), models, out.ptr, out.dtype.code, compute.code
    )
    return made
