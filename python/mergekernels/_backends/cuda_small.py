"""`small_svd` and `small_eigh` of many matrices at once by the CUDA module: one block of threads for each.

A launch takes matrices of unequal shapes; those whose blocks need about the same memory share one. A block needs room
for two matrices (s x s, and p x s with p >= s): where only the first fits on the chip, the second is held in global
memory. Of float64 on an H100 (227 KiB) both fit up to 128 x 96, and all up to 128 x 128 can be decomposed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from .._native import torch_dtype
from ..errors import ArgumentError
from ..tensors import F64, DType
from . import _cuda_launches as launches
from ._cuda_plan import address
from ._device import no_gpu

if TYPE_CHECKING:
    import torch

__all__ = ["SWEEPS", "Convergence", "fits", "small_eigh_batch", "small_svd_batch", "why_not"]

SWEEPS = 30
"""Most sweeps over all pairs that a matrix gets."""


class Convergence(NamedTuple):
    """How one matrix went.

    sweeps : sweeps over all pairs of columns, the last of which found nothing to do; 0 if 30 did not suffice, -1 if the
    matrix has NaN or Inf, and then there is no result. off : largest cosine between two columns (off-diagonal entry
    beside the diagonal, for eigenproblems) that the last sweep met; 8 eps is small enough.
    """

    sweeps: int
    off: float


@dataclass(frozen=True)
class _Job:
    """One matrix, tall: its number in the batch, whether it was turned, and what its block needs."""

    number: int
    turned: bool
    p: int
    s: int
    far: bool
    threads: int
    room: int


def why_not(device: torch.device) -> str | None:
    """Why nothing can be decomposed on a device here, None if it can."""
    import torch

    if device.type != "cuda":
        return f"it computes on an NVIDIA GPU, and a tensor is on {device}"
    if importlib.util.find_spec("mergekernels._cuda") is None:
        return "the native module _cuda is not built (it needs nvcc when the package is built)"
    if torch.version.hip is not None:
        return "it is for NVIDIA GPUs, and this torch is built for ROCm"
    return no_gpu()


def fits(p: int, s: int, device: int, *, eigh: bool = False, compute: DType = F64) -> bool:
    """Whether a p x s matrix can be decomposed on the chip of a device: no empty ones, sides up to 128."""
    return _plan(max(p, s), min(p, s), device, eigh, compute) is not None


def small_svd_batch(
    matrices: Sequence[torch.Tensor], *, vectors: bool = True, compute: DType = F64
) -> list[tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None, Convergence]]:
    """(u, s, vh, convergence) of each matrix, in the compute dtype: M = u diag(s) vh.

    matrices : (p, s) of any strides on one device, all of which fit. u : (p, k), s : (k,) falling, vh : (k, s) with
    k = min(p, s); u and vh are None without `vectors`. compute : F64 or F32.
    Values below eps squared of the largest entry are zeros; vectors of zeros complete the others to an orthonormal
    set. A matrix has the same bits in every batch. Residual and orthogonality: 1e-13 of the norm in float64.
    Waits for the device. Errors: ArgumentError for what does not fit, BackendError.
    """
    import torch

    if not matrices:
        return []
    jobs, device, dtype = _jobs(matrices, False, compute), matrices[0].device, torch_dtype(compute)
    inputs = [m.to(dtype) for m in matrices]
    sides = [min(m.shape) for m in matrices]
    values = _split(torch.empty(sum(sides), dtype=dtype, device=device), sides)
    u = vh = values
    if vectors:
        u = _empty([(int(m.shape[0]), k) for m, k in zip(matrices, sides, strict=True)], dtype, device)
        vh = _empty([(k, int(m.shape[1])) for m, k in zip(matrices, sides, strict=True)], dtype, device)
    reports = torch.empty((len(inputs), 2), dtype=torch.float64, device=device)
    far = _far(jobs, dtype, device)
    items = []
    for job in jobs:
        m, left, right = inputs[job.number], u[job.number], vh[job.number].t()
        if job.turned:
            m, left, right = m.t(), right, left
        parts = (*_strided(m), *(_strided(left) if vectors else _NONE), *(_strided(right) if vectors else _NONE))
        items.append((*parts, address(values[job.number]), address(far[job.number]), address(reports[job.number])))
    found = _run(False, jobs, items, reports, compute)
    if not vectors:
        return [(None, s, None, c) for s, c in zip(values, found, strict=True)]
    smallest = torch.stack([s[-1] for s in values]).tolist()
    for i, least in enumerate(smallest):
        if least == 0 and found[i].sweeps > 0:
            _complete(vh[i].t() if sides[i] == matrices[i].shape[1] else u[i], values[i])
    return list(zip(u, values, vh, found, strict=True))


def small_eigh_batch(
    matrices: Sequence[torch.Tensor], *, compute: DType = F64
) -> list[tuple[torch.Tensor, torch.Tensor, Convergence]]:
    """(vectors, values, convergence) of each symmetric matrix G = vectors diag(values) vectors^T, in the compute dtype.

    matrices : (s, s), of which the lower triangle is read. values : (s,) falling. Otherwise as `small_svd_batch`.
    """
    import torch

    if not matrices:
        return []
    jobs, device, dtype = _jobs(matrices, True, compute), matrices[0].device, torch_dtype(compute)
    inputs = [m.to(dtype) for m in matrices]
    sides = [int(m.shape[0]) for m in matrices]
    values = _split(torch.empty(sum(sides), dtype=dtype, device=device), sides)
    vectors = _empty([(s, s) for s in sides], dtype, device)
    reports = torch.empty((len(inputs), 2), dtype=torch.float64, device=device)
    far = _far(jobs, dtype, device)
    items = []
    for job in jobs:
        i = job.number
        parts = (*_strided(inputs[i]), *_NONE, *_strided(vectors[i]))
        items.append((*parts, address(values[i]), address(far[i]), address(reports[i])))
    found = _run(True, jobs, items, reports, compute)
    return list(zip(vectors, values, found, strict=True))


_NONE = (0, 0, 0)


def _strided(x: torch.Tensor) -> tuple[int, int, int]:
    return (x.data_ptr(), x.stride(0), x.stride(1))


@lru_cache(maxsize=8)
def _limit(device: int) -> int:
    return int(launches.native().jacobi_limit(device))


def _plan(p: int, s: int, device: int, eigh: bool, compute: DType) -> tuple[bool, int, int] | None:
    """(one of two matrices in global memory, threads, bytes on the chip) for p x s, p >= s; None if it does not fit."""
    native = launches.native()
    if s < 1 or p > native.MAX_SIDE or (eigh and p != s):
        return None
    for far in (False, True):
        threads, room = native.jacobi_room(eigh, p, s, far, compute.code)
        if room <= _limit(device):
            return (far, threads, room)
    return None


def _jobs(matrices: Sequence[torch.Tensor], eigh: bool, compute: DType) -> list[_Job]:
    """The matrices, those with most work first."""
    device, _ = launches.queue_of(matrices[0])
    jobs = []
    for i, m in enumerate(matrices):
        p, s = (int(x) for x in m.shape)
        plan = _plan(max(p, s), min(p, s), device, eigh, compute)
        if plan is None or m.device != matrices[0].device:
            raise ArgumentError(
                f"matrix {i} cannot be decomposed on the chip",
                code="matrix.size",
                expected="sides of 1 to 128 that fit into shared memory, on one device",
                got=f"{p} x {s} on {m.device}",
            )
        jobs.append(_Job(i, p < s, max(p, s), min(p, s), *plan))
    return sorted(jobs, key=lambda job: -job.p * job.s * job.s)


def _split(x: torch.Tensor, sizes: list[int]) -> Sequence[torch.Tensor]:
    parts: Sequence[torch.Tensor] = x.split(sizes)  # type: ignore[no-untyped-call]
    return parts


def _empty(shapes: list[tuple[int, int]], dtype: torch.dtype, device: torch.device) -> Sequence[torch.Tensor]:
    """Dense matrices in one piece of memory."""
    import torch

    sizes = [p * s for p, s in shapes]
    whole = _split(torch.empty(sum(sizes), dtype=dtype, device=device), sizes)
    return [x.view(shape) for x, shape in zip(whole, shapes, strict=True)]


def _far(jobs: Sequence[_Job], dtype: torch.dtype, device: torch.device) -> dict[int, torch.Tensor | None]:
    """Room in global memory for those that need it."""
    wanted = [job for job in jobs if job.far]
    rooms = _empty([(job.p, job.s) for job in wanted], dtype, device)
    found: dict[int, torch.Tensor | None] = {job.number: None for job in jobs}
    found.update({job.number: room for job, room in zip(wanted, rooms, strict=True)})
    return found


def _run(
    eigh: bool, jobs: Sequence[_Job], items: Sequence[tuple[int, ...]], reports: torch.Tensor, compute: DType
) -> list[Convergence]:
    """Launches the jobs, those of like needs together, and waits for their reports."""
    import torch

    native = launches.native()
    # Blocks of one launch have the memory of the largest: not more than twice what any of them needs.
    groups: dict[tuple[int, int], list[int]] = {}
    for i, job in enumerate(jobs):
        groups.setdefault((job.threads, job.room.bit_length()), []).append(i)
    order = [i for group in groups.values() for i in group]
    table = bytearray(native.jacobi_table([(*items[i], jobs[i].p, jobs[i].s) for i in order], compute.code))
    on_device = torch.frombuffer(table, dtype=torch.uint8).to(reports.device)
    place, each = on_device.data_ptr(), len(table) // len(items)
    with launches.launching():
        for (threads, _), group in groups.items():
            room = max(jobs[i].room for i in group)
            native.jacobi(eigh, place, len(group), compute.code, threads, room, *launches.queue_of(reports))
            place += each * len(group)
    return [Convergence(int(sweeps), off) for sweeps, off in reports.tolist()]


def _complete(right: torch.Tensor, values: torch.Tensor) -> None:
    """Fills the columns of zeros, those of zero values at the end, so that all are orthonormal."""
    import torch

    rank = int((values > 0).sum())
    whole = torch.linalg.qr(right[:, :rank], mode="complete").Q
    right[:, rank:] = whole[:, rank:]
