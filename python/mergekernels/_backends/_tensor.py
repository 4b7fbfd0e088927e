"""Native least squares and products of stacks: which code serves a call, and the call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from .. import _cpu
from ..tensors import F32, F64
from . import _cuda_launches as launches
from . import cuda_small
from ._cuda_plan import address
from ._isa import isa

if TYPE_CHECKING:
    import torch

    Module = tuple[torch.Tensor, torch.Tensor, tuple[int, ...], list[torch.Tensor | None]]

__all__ = ["LARGE", "NUMBERS", "fills", "least_squares", "mttkrp", "room", "serves_products"]

NUMBERS = 6
"""Of the report of a start: err / ||X||, whether it has ended (2: it needs an orthonormal out factor), sweeps, longer
steps, alarms, ridge."""

LARGE = 1 << 21
"""Numbers in a core from which one problem is worth several threads of a library."""

_LEAST_PROX = 1e-9
"""Least proximal weight of native sweeps from starts of their own: they invert Grams, and an inverse of a singular one
makes the error rise. Explicit factors are for sweeps that are compared with others'."""


def least_squares(
    b: torch.Tensor, a: torch.Tensor, ranks: Sequence[int], width: int, problems: int
) -> Callable[..., Any] | None:
    """What runs sweeps of cores b (N, p, R) and a (N, q, R), float64; None if tensor operations are better or needed.

    On the CPU, native code has one thread for each problem: not for cores of `LARGE` numbers with fewer problems than
    threads, and without a fused multiply-add (the instruction set "base") not for more than 32 terms. On an NVIDIA GPU
    the state of a problem must fit on the chip.
    The result takes (the problems, starts per module, norm2, state, history, report, options, sweeps).
    """
    import torch

    shape = (len(ranks), sum(ranks), int(b.shape[1]), int(a.shape[1]), width)
    if str(b.dtype) != "torch.float64" or min(shape) < 1:
        return None
    if b.device.type == "cpu":
        if b[0].numel() + a[0].numel() > LARGE and problems < torch.get_num_threads():
            return None
        if isa() == "base" and width > 32:
            return None
        return partial(_launch, b.contiguous(), a.contiguous(), tuple(ranks), shape, None)
    if cuda_small.why_not(b.device) is not None:
        return None
    fitting = room(shape, launches.queue_of(b)[0])
    if fitting is None:
        return None
    return partial(_launch, b.contiguous(), a.contiguous(), tuple(ranks), shape, fitting)


def room(shape: tuple[int, int, int, int, int], device: int) -> bool | None:
    """Whether a problem's cores stay in global memory; None if not even its state fits on the chip of the device.

    shape : tasks, sum of ranks, rows of both cores, terms.
    """
    native = launches.native()
    limit = native.jacobi_limit(device)
    return next((far for far in (False, True) if native.als_room(shape, far) <= limit), None)


def _launch(
    b: torch.Tensor,
    a: torch.Tensor,
    ranks: tuple[int, ...],
    shape: tuple[int, int, int, int, int],
    far: bool | None,
    problems: Sequence[int],
    starts: int,
    norm2: torch.Tensor,
    state: torch.Tensor,
    history: torch.Tensor,
    report: torch.Tensor,
    options: Any,
    sweeps: int,
) -> None:
    """Up to `sweeps` sweeps of each problem; far None: on the CPU."""
    import torch

    counts = torch.tensor(ranks)
    owner = torch.repeat_interleave(torch.arange(len(ranks), dtype=torch.int32), counts).to(b.device)
    ends = torch.tensor([0, *ranks], dtype=torch.int64).cumsum(0).to(torch.int32).to(b.device)
    size, each = norm2.tolist(), 8 * state[0].numel()
    table = [
        (
            b.data_ptr() + 8 * b[0].numel() * (i // starts),
            a.data_ptr() + 8 * a[0].numel() * (i // starts),
            state.data_ptr() + each * i,
            history.data_ptr() + 8 * sweeps * row,
            report.data_ptr() + 8 * NUMBERS * i,
            size[i // starts],
        )
        for row, i in enumerate(problems)
    ]
    prox = max(options.prox, _LEAST_PROX) if options.search else options.prox
    common = (shape, owner.data_ptr(), ends.data_ptr(), options.tol, prox, sweeps, options.search)
    if far is None:
        _cpu.als(table, *common, options.threads, isa())
        return
    native = launches.native()
    kept: list[Any] = [owner, ends]
    with launches.launching():
        native.als(on_device(native.als_table(table), b.device, kept), len(table), *common, far, *launches.queue_of(b))


def serves_products(b: torch.Tensor, at: torch.Tensor, width: int) -> bool:
    """Whether `mttkrp` takes a stack: on an NVIDIA GPU with the CUDA module, and on the CPU where no library is faster.

    One is on the CPU without a fused multiply-add (the instruction set "base") from 17 columns on.
    """
    if b.device != at.device:
        return False
    if b.device.type != "cpu":
        return cuda_small.why_not(b.device) is None
    return width <= 16 or isa() != "base"


def fills(modules: Sequence[Module], width: int) -> bool:
    """Whether a call of `mttkrp` is better than a library's, module after module.

    On a GPU it has a block for 64 stacked columns and 16 or 64 columns of the factors: fewer than 128 of them leave
    most of the device idle over sums as long as m, which a library cuts. The number is an estimate, not measured.
    """
    if modules[0][0].device.type == "cpu":
        return True
    columns = 16 if width <= 16 else 64
    return sum(-(-sum(ranks) // 64) for _, _, ranks, _ in modules) * -(-width // columns) >= 128


def mttkrp(modules: Sequence[Module], mode: int, width: int) -> list[torch.Tensor]:
    """The products of `ops.mttkrp`, float64, of all modules of a device in one call.

    modules : (b (m, R), at (n, R), ranks, [C, U, V]) each, float32 or float64 stacks, factors float64 or None.
    """
    import torch

    device = modules[0][0].device
    rows = [(len(ranks), b.shape[0], at.shape[0])[mode] for b, at, ranks, _ in modules]
    results = [torch.empty((r, width), dtype=torch.float64, device=device) for r in rows]
    if width and device.type == "cpu":
        _on_cpu(modules, mode, width, results)
    elif width:
        _on_gpu(modules, mode, width, results)
    return results


def _on_cpu(modules: Sequence[Module], mode: int, width: int, results: Sequence[torch.Tensor]) -> None:
    import torch

    from .._native import as_tuple, view_of

    table, kept = [], []
    for (b, at, ranks, factors), out in zip(modules, results, strict=True):
        b, at = b.contiguous(), at.contiguous()
        wide = [None if f is None else f.contiguous() for f in factors]
        c, u, v = (address(f) for f in wide)
        table.append((as_tuple(view_of(b)), as_tuple(view_of(at)), list(ranks), c, u, v, out.data_ptr()))
        kept.append((b, at, wide))
    _cpu.mttkrp(table, mode, width, torch.get_num_threads(), isa())


def _on_gpu(modules: Sequence[Module], mode: int, width: int, results: Sequence[torch.Tensor]) -> None:
    """P and S of all modules in one launch, what comes of them in a second; stacks of each dtype for themselves."""
    import torch

    kept: list[Any] = []
    thin: dict[str, tuple[list[Any], list[Any]]] = {}
    sums = []
    for (b, at, ranks, factors), out in zip(modules, results, strict=True):
        if not sum(ranks) or not out.numel():
            out.zero_()
            continue
        b, at = b.contiguous(), at.contiguous()
        c, u, v = (None if f is None else f.contiguous() for f in factors)
        columns = sum(ranks)
        p, s = out.new_empty((2, columns, width)).unbind(0)
        ends = torch.tensor([0, *ranks], dtype=torch.int64).cumsum(0).to(torch.int32).to(out.device)
        owner = torch.repeat_interleave(torch.arange(len(ranks), dtype=torch.int32), torch.tensor(ranks))
        owner = owner.to(out.device)
        kept.append((b, at, c, u, v, p, s, ends, owner))
        inner, outer = thin.setdefault(str(b.dtype), ([], []))
        for x, f, to, needed in ((at, v, p, mode != 2), (b, u, s, mode != 1)):
            if needed and columns:
                inner.append((x.data_ptr(), address(f), 0, 0, to.data_ptr(), columns, columns, x.shape[0], True))
        if mode:
            x, f = (b, p) if mode == 1 else (at, s)
            outer.append(
                (
                    *(x.data_ptr(), f.data_ptr(), address(c), owner.data_ptr(), out.data_ptr()),
                    *(columns, out.shape[0], columns, False),
                )
            )
        else:
            sums.append((p.data_ptr(), s.data_ptr(), ends.data_ptr(), out.data_ptr(), len(ranks)))
    native = launches.native()
    with launches.launching():
        for dtype, both in thin.items():
            code = (F32 if dtype == "torch.float32" else F64).code
            for items in both:
                if items:
                    table, tiles = native.thin_table(items, width, code)
                    place = on_device(table, results[0].device, kept)
                    native.thin(place, len(items), width, tiles, code, *launches.queue_of(results[0]))
        if sums:
            table, elements = native.task_table(sums, width)
            place = on_device(table, results[0].device, kept)
            native.task_sums(place, len(sums), width, elements, *launches.queue_of(results[0]))


def on_device(table: bytes, device: torch.device, kept: list[Any]) -> int:
    """Where a table lies on the device; `kept` keeps it, which the allocator hands on in the order of the stream."""
    import torch

    kept.append(torch.frombuffer(bytearray(table), dtype=torch.uint8).to(device))
    return int(kept[-1].data_ptr())
