"""`mttkrp`: the products of a stack in factored form with two of three factor matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..._backends import _tensor
from ..._backends import _triton_mttkrp as kernels
from ...errors import ArgumentError, DataError
from ..spectral.sharded import Sharded
from .stack import Stack, is_module, stacks_of
from .tasks import Tasks

if TYPE_CHECKING:
    import torch

__all__ = ["mttkrp"]


def mttkrp(stack: Any, factors: Any, mode: int) -> Any:
    """The matricised tensor of a stack X[t] = B_t A_t times the Khatri-Rao product of two factors, without forming X.

    With P = A V, S = B^T U over the stacked columns i, own(i) the task of column i and C~[i] = C[own(i)]:
    mode 0: M[t] = sum of P_i S_i over own(i) = t, (T, c). mode 1: M = B (P C~), (m, c). mode 2: M = A^T (S C~), (n, c).
    4 R c (m or n) flops for each product with B or A, where R is the sum of the ranks.

    stack : a list of (B, A) pairs, B (m, r_t) and A (r_t, n), or a list of such lists. factors : [C (T, c), U (m, c),
    V (n, c)] for each module; the one of `mode` is not read and may be None.
    Returns M in float64, for a list of modules a list. B in row shards (A in column shards) take U (V) in the same
    shards or whole and return M of mode 1 (mode 2) whole; only P and S, (R, c), cross the cut.
    Error, in parts of the sums of magnitudes: on the CPU and of float64 stacks (m + R) 2^-52, in mode 2 (n + R) 2^-52,
    whatever the threads. Of float32 stacks on a GPU 2^-18 in CUDA C++, which takes many modules in one call, and
    (m + R) 2^-23 in Triton.
    Errors: ArgumentError, DataError for NaN or Inf.
    """
    if mode not in (0, 1, 2):
        raise ArgumentError("mode is not usable", code="mttkrp.mode", expected="0, 1 or 2", got=repr(mode))
    stacks = stacks_of(stack)
    if is_module(stack):
        return _all(stacks, [_checked(stacks[0], factors, mode)], mode)[0]
    if len(factors) != len(stacks):
        raise ArgumentError(
            "factors do not fit the stacks",
            code="mttkrp.factors",
            expected=f"{len(stacks)} lists of three",
            got=str(len(factors)),
        )
    return _all(stacks, [_checked(s, f, mode) for s, f in zip(stacks, factors, strict=True)], mode)


def _checked(stack: Stack, factors: Any, mode: int) -> list[Any]:
    """The factors in float64 on the device of the stack, None for the one of the mode."""
    import torch

    if not isinstance(factors, (list, tuple)) or len(factors) != 3:
        raise ArgumentError(
            "factors are not usable",
            code="mttkrp.factors",
            expected="[C, U, V]",
            got=f"{type(factors).__name__} of {len(factors)}" if hasattr(factors, "__len__") else repr(factors),
        )
    c, u, v = factors
    (m, n), tasks = stack.shape, len(stack.ranks)
    sizes = ((c, tasks, "C"), (u, m, "U"), (v, n, "V"))
    wide: list[Any] = []
    for k, (x, size, name) in enumerate(sizes):
        if k == mode:
            wide.append(None)
            continue
        x = x.dense() if isinstance(x, Sharded) else x
        if not isinstance(x, torch.Tensor) or x.ndim != 2 or x.shape[0] != size:
            raise ArgumentError(
                f"factor {name} does not fit the stack",
                code="mttkrp.factors",
                expected=f"a matrix of {size} rows",
                got=str(tuple(x.shape)) if isinstance(x, torch.Tensor) else type(x).__name__,
            )
        if x.is_complex():
            raise ArgumentError(
                f"factor {name} is complex", code="mttkrp.factors", expected="real numbers", got=str(x.dtype)
            )
        if not bool(torch.isfinite(x).all()):
            raise DataError(f"factor {name} holds NaN or Inf", code="data.nonfinite", tensor=name)
        wide.append(x.to(stack.b.device, torch.float64))
    widths = {x.shape[1] for x in wide if x is not None}
    if len(widths) > 1:
        raise ArgumentError(
            "the factors differ in columns",
            code="mttkrp.factors",
            expected="equal columns",
            got=", ".join(map(str, sorted(widths))),
        )
    return wide


def _all(stacks: Sequence[Stack], factors: Sequence[list[Any]], mode: int) -> list[torch.Tensor]:
    """Modules that native code takes in one call for each width, the others one after the other."""
    found: dict[int, torch.Tensor] = {}
    batches: dict[tuple[str, int], list[tuple[int, Any]]] = {}
    for i, (stack, wide) in enumerate(zip(stacks, factors, strict=True)):
        width, whole = next(int(x.shape[1]) for x in wide if x is not None), _whole(stack)
        if whole is not None and _tensor.serves_products(*whole, width):
            batches.setdefault((str(whole[0].device), width), []).append((i, (*whole, stack.ranks, wide)))
    for (_, width), members in batches.items():
        modules = [module for _, module in members]
        if _tensor.fills(modules, width):
            products = _tensor.mttkrp(modules, mode, width)
            found.update({i: product for (i, _), product in zip(members, products, strict=True)})
    for i, (stack, wide) in enumerate(zip(stacks, factors, strict=True)):
        if i not in found:
            found[i] = _alone(stack, wide, mode)
    return [found[i] for i in range(len(stacks))]


def _whole(stack: Stack) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Its two matrices, unless they are in shards."""
    if isinstance(stack.b, Sharded) or isinstance(stack.at, Sharded):
        return None
    return stack.b, stack.at


def _alone(stack: Stack, factors: list[Any], mode: int) -> torch.Tensor:
    whole = _whole(stack)
    if whole is not None and kernels.serves(whole[0]):
        return _by_triton(*whole, stack.ranks, factors, mode)
    return _by_torch(stack, factors, mode)


def _by_torch(stack: Stack, factors: list[Any], mode: int) -> torch.Tensor:
    """In float64, by the library: what the other routes are compared with."""
    members = Tasks(stack.ranks)
    if mode == 1:
        return _times(stack.b, _inner(stack.at, factors[2]) * members.rows(factors[0]))
    if mode == 2:
        return _times(stack.at, _inner(stack.b, factors[1]) * members.rows(factors[0]))
    return members.total(_inner(stack.at, factors[2]) * _inner(stack.b, factors[1]))


def _by_triton(
    b: torch.Tensor, at: torch.Tensor, ranks: tuple[int, ...], factors: list[Any], mode: int
) -> torch.Tensor:
    """Thin products by the library in float32, the gather by task fused with what follows."""
    import torch

    c, u, v = (torch.empty(0) if x is None else x.to(torch.float32) for x in factors)
    if mode == 1:
        return kernels.outer(b, at.mT @ v, c, ranks).to(torch.float64)
    if mode == 2:
        return kernels.outer(at, b.mT @ u, c, ranks).to(torch.float64)
    return kernels.task_sums(at.mT @ v, b.mT @ u, ranks)


def _inner(x: Any, factor: torch.Tensor) -> torch.Tensor:
    """x^T factor, shard after shard."""
    import torch

    if not isinstance(x, Sharded):
        product: torch.Tensor = x.to(torch.float64).mT @ factor
        return product
    pieces = factor.split(x.sizes, 0)  # type: ignore[no-untyped-call]
    total = torch.zeros((x.shape[1], factor.shape[1]), dtype=torch.float64, device=factor.device)
    for part, piece in zip(x.parts, pieces, strict=True):
        total += (part.to(torch.float64).mT @ piece.to(part.device)).to(total.device)
    return total


def _times(x: Any, small: torch.Tensor) -> torch.Tensor:
    import torch

    parts = x.parts if isinstance(x, Sharded) else [x]
    return torch.cat([(p.to(torch.float64) @ small.to(p.device)).to(small.device) for p in parts])
