"""Dominant subspaces of matrices without a full decomposition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, overload

from ...errors import ArgumentError
from ._arguments import check_size, per_matrix
from ._blocks import orthonormal
from ._inputs import Input, as_map
from ._maps import Map, transposed
from ._pairs import leading
from .batching import in_threads
from .sharded import check_matrix, dense

if TYPE_CHECKING:
    import torch

__all__ = ["Subspace", "subspace"]


@dataclass(frozen=True)
class Subspace:
    """A dominant invariant subspace.

    basis : (n, k) for side "right", (m, k) for "left": orthonormal columns, Ritz vectors in the order of `ritz`,
    float32 (float64 for float64 input). ritz : (k,) squared singular values, float64, falling, on the CPU.
    captured : their sum over ||X||_F^2, in [0, 1]; 1 for a zero matrix.
    residual : the worst of ||X^T X v - ritz v|| / ritz when the iteration stopped; 0 where nothing was iterated.
    gap : sigma_{k+1} / sigma_k: near 1 the subspace is ambiguous; 0 where X has no more directions.
    rounds : times the basis of the iteration was filled; 0 where nothing was iterated.
    """

    basis: torch.Tensor
    ritz: torch.Tensor
    captured: float
    residual: float
    gap: float
    rounds: int


@overload
def subspace(
    X: Input,
    k: int | None = ...,
    energy: float | None = ...,
    side: Literal["right", "left"] = ...,
    warm: torch.Tensor | None = ...,
    accuracy: Literal["energy", "subspace"] = ...,
    tol: float = ...,
    seed: int = ...,
) -> Subspace: ...
@overload
def subspace(
    X: Sequence[Input],
    k: int | Sequence[int] | None = ...,
    energy: float | None = ...,
    side: Literal["right", "left"] = ...,
    warm: Sequence[torch.Tensor | None] | None = ...,
    accuracy: Literal["energy", "subspace"] = ...,
    tol: float = ...,
    seed: int = ...,
) -> list[Subspace]: ...
def subspace(
    X: Input | Sequence[Input],
    k: int | Sequence[int] | None = None,
    energy: float | None = None,
    side: Literal["right", "left"] = "right",
    warm: torch.Tensor | Sequence[torch.Tensor | None] | None = None,
    accuracy: Literal["energy", "subspace"] = "energy",
    tol: float = 1e-5,
    seed: int = 0,
) -> Subspace | list[Subspace]:
    """The dominant k-dimensional invariant subspace of X^T X (side "right") or X X^T ("left").

    X : one matrix or a list of matrices of any shapes: a tensor (m, n), Sharded, Factors, or a Mix. 16-bit input is
    computed in float32.
    k : dimension, 0 to min(m, n); for a list one number or one per matrix. The basis has fewer columns where the matrix
    has lower rank (`rank_cut`).
    energy : the least dimension that captures this share of ||X||_F^2, in (0, 1]; with `k` the smaller of both.
    warm : a basis near the one sought, (n, any) or (m, any) by `side`, for one matrix; a list with one or None for each
    of a list. It saves time and does not change the promise.
    accuracy : "energy" promises quality: ||X - X W W^T||_F <= (1 + 1e-4) times the least possible (with
    directions above the cut of the rank only) + 1e-6 ||X||_F.
    "subspace" iterates until the residual of every pair is at most `tol` times its own Ritz value (or rounding in X's
    dtype), which pins the subspace down where there is a gap at the cut.
    tol : for "subspace", in (0, 1). seed : of the random start.
    Returns Subspace, or a list of them.
    Errors: ArgumentError, DataError for NaN or Inf.
    Source: block Lanczos with thick restarts (Stewart, 2001; Zhou and Saad, 2008); the whole spectrum where that is
    cheaper.
    """
    for name, value, known in (("side", side, ("right", "left")), ("accuracy", accuracy, ("energy", "subspace"))):
        if value not in known:
            raise ArgumentError(f"unknown {name}", code=f"argument.{name}", expected=" or ".join(known), got=str(value))
    if not 0.0 < tol < 1.0:
        raise ArgumentError("tol is out of range", code="argument.tol", expected="(0, 1)", got=str(tol))
    single, items, sizes = per_matrix(X, k, "k")
    starts: Sequence[Any] = [warm] if single else [None] * len(items) if warm is None else list(warm)
    if len(starts) != len(items):
        raise ArgumentError(
            "warm must be one basis or None per matrix",
            code="argument.warm",
            expected=str(len(items)),
            got=str(len(starts)),
        )
    tasks = []
    for i, (x, size, start) in enumerate(zip(items, sizes, starts, strict=True)):
        name = "X" if single else f"X[{i}]"
        m = as_map(x, name)
        tasks.append((m, check_size(m, size, energy, "k"), _check_warm(start, m, side, name)))

    def one(task: tuple[Map, int, torch.Tensor | None]) -> Subspace:
        return _subspace(task[0], task[1], energy, side, task[2], accuracy == "subspace", tol, seed)

    results = in_threads(tasks, one)
    return results[0] if single else results


def _check_warm(warm: Any, x: Map, side: str, name: str) -> torch.Tensor | None:
    if warm is None:
        return None
    start = dense(check_matrix(warm, f"warm of {name}"))
    rows = x.shape[1] if side == "right" else x.shape[0]
    if start.shape[0] != rows:
        raise ArgumentError(
            f"warm of {name} has the wrong height", code="argument.warm", expected=str(rows), got=str(start.shape[0])
        )
    return start


def _subspace(
    x: Map, k: int, energy: float | None, side: str, warm: torch.Tensor | None, strict: bool, tol: float, seed: int
) -> Subspace:
    if side == "left":
        x = transposed(x)
    pairs = leading(x, k, energy, strict=strict, tol=tol, warm=warm, seed=seed)
    found, values = pairs.k, pairs.values
    basis = orthonormal(pairs.v)[0].to(x.dtype) if found else pairs.v
    ritz = values[:found].square()
    gap = float(values[found] / values[found - 1]) if 0 < found < len(values) else 0.0
    captured = min(1.0, float(ritz.sum()) / pairs.total) if pairs.total > 0.0 else 1.0
    return Subspace(basis, ritz, captured, pairs.residual, gap, pairs.rounds)
