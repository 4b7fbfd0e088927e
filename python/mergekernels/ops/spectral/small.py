"""`small_svd` and `small_eigh`: many small decompositions, in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ...errors import ArgumentError
from .batching import one_or_many
from .cuts import check_tol, rank_cut
from .sharded import check_matrix, dense

if TYPE_CHECKING:
    import torch

__all__ = ["SmallEigh", "SmallSVD", "small_eigh", "small_svd"]


@dataclass(frozen=True)
class SmallSVD:
    """M = u diag(s) vh, all float64.

    u : (p, k) and vh : (k, s) with k = min(p, s), None if only values were wanted. s : (k,), falling.
    rank : how many of s are above the cut.
    """

    u: torch.Tensor | None
    s: torch.Tensor
    vh: torch.Tensor | None
    rank: int


@dataclass(frozen=True)
class SmallEigh:
    """G = vectors diag(values) vectors^T, float64, values falling.

    rank : how many |values| are above tol times the largest.
    """

    vectors: torch.Tensor
    values: torch.Tensor
    rank: int


def small_svd(M: Any, tol: float | None = None, want: Literal["vectors", "values"] = "vectors") -> Any:
    """Thin singular value decompositions in float64.

    M : a matrix (p, s), p and s up to 2048, or a list of them. tol : relative cut for `rank`, in [0, 1); default
    `rank_cut(p, s)`, that of matrices made from float32 data. want : "values" leaves the vectors out.
    Returns SmallSVD, or a list of them. The entry of largest magnitude in each column of u is positive (the first on a
    tie), so that vectors of distinct values do not depend on the library that computes them.
    Promise: residual and orthogonality at most 1e-13 times the norm. Vectors of equal values are arbitrary.
    Errors: ArgumentError, DataError for NaN or Inf.
    """
    if want not in ("vectors", "values"):
        raise ArgumentError("want is unknown", code="argument", expected="'vectors' or 'values'", got=repr(want))
    return one_or_many(M, lambda m, what: _small_svd(dense(check_matrix(m, what)), tol, want))


def _small_svd(m: torch.Tensor, tol: float | None, want: str) -> SmallSVD:
    import torch

    cut = check_tol(tol, rank_cut(int(m.shape[0]), int(m.shape[1])))
    wide = m.to(torch.float64)
    if want == "values":
        s = torch.linalg.svdvals(wide)
        return SmallSVD(None, s, None, count(s, cut))
    u, s, vh = torch.linalg.svd(wide, full_matrices=False)
    u, vh = fix_signs(u, vh)
    return SmallSVD(u, s, vh, count(s, cut))


def count(s: torch.Tensor, cut: float) -> int:
    """How many of the falling values are above cut * the first."""
    return int((s > cut * s[0]).sum()) if s.numel() else 0


def fix_signs(u: torch.Tensor, vh: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Turns each pair so that the entry of largest magnitude in u's column (the first on a tie) is positive."""
    import torch

    if u.numel() == 0:
        return u, vh
    largest = u.gather(0, u.abs().argmax(0, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(u.dtype)
    return u * sign, vh * sign.mT


def small_eigh(G: Any, tol: float | None = None) -> Any:
    """Eigenvalues, falling, and eigenvectors of symmetric matrices, in float64.

    G : a symmetric matrix (s, s), s up to 2048, or a list of them; the lower triangle is read. tol : relative cut for
    `rank`, in [0, 1); default s * 2.2e-16.
    Returns SmallEigh, or a list of them; signs of vectors as in `small_svd`.
    Promise: residual and orthogonality at most 1e-13 times the norm.
    Errors: ArgumentError (also for what is not square), DataError for NaN or Inf.
    """
    return one_or_many(G, lambda g, what: _small_eigh(dense(check_matrix(g, what)), tol, what))


def _small_eigh(g: torch.Tensor, tol: float | None, what: str) -> SmallEigh:
    import torch

    s = int(g.shape[0])
    if g.shape[1] != s:
        raise ArgumentError(
            f"{what} is not square", code="matrix.square", tensor=what, expected=str((s, s)), got=str(tuple(g.shape))
        )
    cut = check_tol(tol, rank_cut(s, s, torch.float64))
    values, vectors = torch.linalg.eigh(g.to(torch.float64))
    values, vectors = values.flip(0), vectors.flip(1)
    vectors, _ = fix_signs(vectors, vectors.mT)
    top = values.abs().max() if s else values.sum()
    return SmallEigh(vectors, values, int((values.abs() > cut * top).sum()))
