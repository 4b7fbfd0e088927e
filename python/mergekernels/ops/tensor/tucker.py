"""`tucker`: shared bases of a stack and one small core per task."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import ArgumentError
from ..arguments import check_integer
from ..spectral.batching import in_single_threads, in_threads
from ._lifted import tucker_of_tiles
from ._terms import signed, signs
from .stack import Core, Stack, cores_of, is_module, stacks_of
from .tiled import TileStack, tile_stacks

if TYPE_CHECKING:
    import torch

__all__ = ["Tucker", "tucker"]

_log = logging.getLogger("mergekernels")


@dataclass(frozen=True)
class Tucker:
    """D_t ~ u o_t v^T. Unpacks as (u, v, cores, error).

    u : (m, p), v : (n, p2), orthonormal columns in the stack's dtype, row shards where B (A) came in shards; rotated so
    that sum o_t o_t^T and sum o_t^T o_t (weights 1) are diagonal and falling, the largest entry of each column
    positive. cores : (T, p, p2), u^T D_t v in float64. error : relative, of the weighted stack. task_errors : err_t /
    ||D_t||, 0 for a zero task. history : the relative error after every sweep. bounds : (low, high) between which the
    best possible relative error lies. converged : whether `tol` was reached.
    """

    u: Any
    v: Any
    cores: torch.Tensor
    error: float
    task_errors: tuple[float, ...]
    history: tuple[float, ...]
    bounds: tuple[float, float]
    converged: bool

    def __iter__(self) -> Iterator[Any]:
        yield from (self.u, self.v, self.cores, self.error)


def tucker(
    stack: Any,
    p: int | float,
    p2: int | float | None = None,
    *,
    weights: Sequence[float] | Sequence[Sequence[float]] | None = None,
    max_iter: int = 100,
    tol: float = 1e-6,
) -> Any:
    """Bases u, v and cores o_t that minimise sum_t w_t ||D_t - u o_t v^T||_F^2, D_t = B_t A_t never formed.

    Higher-order orthogonal iteration in float64 on the core of the stack, from the leading eigenvectors of both sides.

    stack : as for `cp_als`; for a TileStack p and p2 are integers, and the lower bound is 0. p : columns of u, 1 or
    more, cut to the rank of the stack; a float in (0, 1) is the share of the weighted energy that the out side alone
    must keep. p2 : likewise for v; None for p. weights : non-negative number per task (for several modules a list of
    such lists), None for 1. max_iter : sweeps, 1 or more; stopping there is a warning. tol : stop where the relative
    error changes by less, from sweep 2.
    Returns Tucker, or a list of them. Errors: ArgumentError, DataError for NaN or Inf.
    Source: De Lathauwer, De Moor, Vandewalle 2000.
    """
    max_iter = check_integer(max_iter, 1, 1 << 31, "max_iter")
    if isinstance(tol, bool) or not isinstance(tol, (int, float)) or not 0.0 <= tol < float("inf"):
        raise ArgumentError("tol is not usable", code="tucker.tol", expected="0 or more", got=repr(tol))
    sizes = (_check_size(p, "p"), _check_size(p if p2 is None else p2, "p2"))
    tiles = tile_stacks(stack)
    single = isinstance(stack, TileStack) if tiles else is_module(stack)
    count = len(tiles) if tiles else 1 if single else len(stack)
    given: Any = [weights] * count if single or weights is None or not _nested(weights) else weights
    if len(given) != count:
        raise ArgumentError("weights do not fit", code="tucker.weights", expected=str(count), got=str(len(given)))
    if tiles:
        found = []
        for one, mine in zip(tiles, given, strict=True):
            found.append(tucker_of_tiles(one, sizes, mine, lambda x, w: _fits(stacks_of(x), [w], sizes, max_iter, tol)))
    else:
        found = _fits(stacks_of(stack), given, sizes, max_iter, tol)
    for i, result in enumerate(found):
        if not result.converged:
            _log.warning("tucker: stack[%d]: no convergence in %d sweeps, error %.6g", i, max_iter, result.error)
    return found[0] if single else found


def _fits(
    stacks: Sequence[Stack], given: Sequence[Any], sizes: tuple[int | float, int | float], max_iter: int, tol: float
) -> list[Tucker]:
    """The outcome of every module."""
    cores = cores_of(stacks)
    tasks = [(core, _weights(core, w, i), sizes) for i, (core, w) in enumerate(zip(cores, given, strict=True))]
    small = all(core.b.device.type == "cpu" and core.b.numel() + core.a.numel() < 1 << 18 for core in cores)
    return (in_single_threads if small else in_threads)(tasks, lambda task: _tucker(*task, max_iter, tol))


def _nested(weights: Any) -> bool:
    return bool(weights) and isinstance(weights[0], (list, tuple))


def _check_size(p: Any, name: str) -> int | float:
    if isinstance(p, float) and 0.0 < p < 1.0:
        return p
    if isinstance(p, int) and not isinstance(p, bool) and p >= 1:
        return p
    raise ArgumentError(
        f"{name} is not usable",
        code=f"tucker.{name}",
        expected="an integer of at least 1, or a share in (0, 1)",
        got=repr(p),
    )


def _weights(core: Core, weights: Any, i: int) -> torch.Tensor:
    import torch

    count = len(core.ranks)
    values = [1.0] * count if weights is None else [float(w) for w in weights]
    if len(values) != count or not all(0.0 <= w < float("inf") for w in values):
        raise ArgumentError(
            "weights are not usable",
            code="tucker.weights",
            tensor=f"stack[{i}]",
            expected=f"{count} non-negative numbers",
            got=repr(weights),
        )
    return torch.tensor(values, dtype=torch.float64, device=core.b.device)


def _leading(gram: torch.Tensor, size: int | float, total: float) -> tuple[torch.Tensor, float]:
    """The leading eigenvectors that `size` asks for, and the sum of the eigenvalues beyond."""
    import torch

    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0).clamp_min(0.0), vectors.flip(1)
    rank = max(1, int((values > 1e-24 * values[0]).sum())) if len(values) else 0
    if isinstance(size, float):
        reached = torch.cumsum(values, 0) >= size * total * (1.0 - 1e-12)
        size = int(reached.to(torch.int8).argmax()) + 1 if bool(reached.any()) else rank
    size = min(size, rank)
    return vectors[:, :size], float(values[size:].sum())


def _is_tall(rows: int, columns: int) -> bool:
    return columns < rows


def _improved(
    core: Core, x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor, size: int
) -> tuple[torch.Tensor, float]:
    """The `size` leading left vectors of Y = [sqrt(w_t) x_t y_t^T], (p, T k), at most its rank, and their energy.

    From the smaller of Y Y^T, which needs no Y, and Y^T Y: that is the rule where Y has fewer columns than rows, as of
    dense updates in small bases. Y times its vectors goes through a QR, so that small values do no harm.
    """
    import torch

    if not _is_tall(x.shape[0], len(core.ranks) * y.shape[0]):
        gram = core.tasks.within(x, y, weights) @ x.mT
        basis = _leading(gram, size, 0.0)[0]
        return basis, float((basis * (gram @ basis)).sum())
    image = core.tasks.images(x, y, weights)
    vectors = _leading(image.mT @ image, size, 0.0)[0]
    basis = torch.linalg.qr(image @ vectors)[0]
    return basis, float((image.mT @ basis).square().sum())


def _tucker(
    core: Core, weights: torch.Tensor, sizes: tuple[int | float, int | float], max_iter: int, tol: float
) -> Tucker:
    total = float((core.norm2 * weights).sum())
    b, a = core.b, core.a

    def gram(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return core.tasks.within(x, y, weights) @ x.mT

    u, tail_u = _leading(gram(b, a), sizes[0], total)
    v, tail_v = _leading(gram(a, b), sizes[1], total)
    history: list[float] = []
    converged = total == 0.0
    scale = total or 1.0
    for _ in range(max_iter if total > 0.0 else 0):
        u, _ = _improved(core, b, v.mT @ a, weights, u.shape[1])
        v, kept = _improved(core, a, u.mT @ b, weights, v.shape[1])
        history.append(max(0.0, (total - kept) / scale) ** 0.5)
        if len(history) > 1 and abs(history[-2] - history[-1]) < tol:
            converged = True
            break
    u, v = _rotated(core, u, v)
    full = core.expand(u, v)
    found = [signs(x) for x in full]
    full = [signed(x, sign) for x, sign in zip(full, found, strict=True)]
    u, v = u * found[0], v * found[1]
    cores = _cores(core, u, v)
    lost = core.norm2 - (cores * cores).sum((1, 2))
    errors = [
        (max(0.0, x) / n) ** 0.5 if n > 0 else 0.0 for x, n in zip(lost.tolist(), core.norm2.tolist(), strict=True)
    ]
    error = max(0.0, float((lost * weights).sum()) / scale) ** 0.5
    bounds = (max(tail_u, tail_v) / scale) ** 0.5, ((tail_u + tail_v) / scale) ** 0.5
    return Tucker(full[0], full[1], cores * core.scale, error, tuple(errors), tuple(history), bounds, converged)


def _cores(core: Core, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """u^T D_t v of every task, (T, p, p2)."""
    import torch

    left, right = (torch.split(x, list(core.ranks), 1) for x in (u.mT @ core.b, v.mT @ core.a))
    return torch.stack([x @ y.mT for x, y in zip(left, right, strict=True)])


def _rotated(core: Core, u: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same subspaces in the basis in which the sums of o_t o_t^T and of o_t^T o_t are diagonal and falling."""
    import torch

    cores = _cores(core, u, v)
    left = torch.linalg.eigh((cores @ cores.mT).sum(0))[1].flip(1)
    right = torch.linalg.eigh((cores.mT @ cores).sum(0))[1].flip(1)
    return u @ left, v @ right
