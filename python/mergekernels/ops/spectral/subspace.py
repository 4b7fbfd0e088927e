"""Dominant subspaces of matrices without a full decomposition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, overload

from ...errors import ArgumentError
from ._maps import Map, Matrix, as_map

if TYPE_CHECKING:
    import torch

__all__ = ["Subspace", "subspace"]


@dataclass(frozen=True)
class Subspace:
    """A dominant invariant subspace.

    basis : (n, k) for side "right", (m, k) for "left": orthonormal columns, Ritz vectors in the order of `ritz`, in the
    matrix's dtype. ritz : (k,) squares of the singular values, float64, falling, on the CPU. captured : their sum over
    ||X||_F^2, in [0, 1]; 1 for a zero matrix. residual : of the worst pair, ||X^T X v - ritz v|| / ritz. gap :
    sigma_{k+1} / sigma_k: near 1 the subspace is ambiguous, 0 where nothing is left. rounds : of the iteration.
    """

    basis: torch.Tensor
    ritz: torch.Tensor
    captured: float
    residual: float
    gap: float
    rounds: int


@overload
def subspace(
    X: Matrix, k: int | None = ..., energy: float | None = ..., side: Literal["right", "left"] = ...,
    warm: torch.Tensor | None = ..., accuracy: Literal["energy", "subspace"] = ..., tol: float = ..., seed: int = ...,
) -> Subspace: ...  # fmt: skip
@overload
def subspace(
    X: Sequence[Matrix], k: int | Sequence[int] | None = ..., energy: float | None = ...,
    side: Literal["right", "left"] = ..., warm: Sequence[torch.Tensor | None] | None = ...,
    accuracy: Literal["energy", "subspace"] = ..., tol: float = ..., seed: int = ...,
) -> list[Subspace]: ...  # fmt: skip
def subspace(
    X: Matrix | Sequence[Matrix],
    k: int | Sequence[int] | None = None,
    energy: float | None = None,
    side: Literal["right", "left"] = "right",
    warm: torch.Tensor | Sequence[torch.Tensor | None] | None = None,
    accuracy: Literal["energy", "subspace"] = "energy",
    tol: float = 1e-5,
    seed: int = 0,
) -> Subspace | list[Subspace]:
    """The dominant k-dimensional invariant subspace of X^T X ("right") or X X^T ("left").

    X : one matrix or a list of matrices of any shapes: a tensor (m, n), Factors, or a Mix.
    k : dimension, 0 <= k <= min(m, n); for a list one number or one per matrix. The basis has fewer columns where the
    matrix has lower rank. energy : the least dimension that captures this share of ||X||_F^2, in (0, 1]; with `k` too
    the smaller of both.
    Errors: ArgumentError, DataError for NaN or Inf.
    """
    single = not isinstance(X, (list, tuple))
    items: Sequence[Matrix] = [X] if single else X  # type: ignore[list-item,assignment]
    ks = list(k) if isinstance(k, Sequence) else [k] * len(items)
    if len(ks) != len(items):
        raise ArgumentError("k must be one number or one per matrix", code="argument.k", got=str(len(ks)))
    results = []
    for i, (x, size) in enumerate(zip(items, ks, strict=True)):
        m = as_map(x, "X" if single else f"X[{i}]")
        if size is None and energy is None:
            raise ArgumentError("give k, energy or both", code="argument.k")
        if size is not None and not 0 <= size <= min(m.shape):
            raise ArgumentError("k out of range", code="argument.k", expected=f"0 to {min(m.shape)}", got=str(size))
        if energy is not None and not 0.0 < energy <= 1.0:
            raise ArgumentError("energy out of range", code="argument.energy", expected="(0, 1]", got=str(energy))
        results.append(_exact(m, size, energy, side))
    return results[0] if single else results


def _exact(x: Map, k: int | None, energy: float | None, side: str) -> Subspace:
    import torch

    dense = x.dense().to(torch.float64)
    u, s, vh = torch.linalg.svd(dense, full_matrices=False)
    squares, total = s.cpu().square(), x.norm2
    tol = min(1e-5, max(x.shape) * 1.2e-7)
    rank = int((s > tol * s[0]).sum()) if len(s) else 0
    if k is None:
        k = rank
    k = min(k, rank)
    if energy is not None and total > 0.0:
        reached = torch.cumsum(squares, 0) >= energy * total * (1.0 - 1e-12)
        k = min(k, int(reached.to(torch.int8).argmax()) + 1 if bool(reached.any()) else k)
    basis = (vh[:k].T if side == "right" else u[:, :k]).contiguous().to(x.dtype)
    gap = float(s[k] / s[k - 1]) if 0 < k < rank else 0.0
    captured = min(1.0, float(squares[:k].sum()) / total) if total > 0.0 else 1.0
    return Subspace(basis, squares[:k], captured, 0.0, gap, 0)
