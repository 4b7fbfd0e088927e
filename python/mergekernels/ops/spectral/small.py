"""`small_svd` and `small_eigh`: many small decompositions, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Optional

from ...errors import ArgumentError, DataError
from .batching import groups, in_threads
from .cuts import check_tol, rank_cut
from .sharded import check_matrix, dense

if TYPE_CHECKING:
    import torch

__all__ = ["SmallEigh", "SmallSVD", "small_eigh", "small_svd"]


Parts = tuple[Optional["torch.Tensor"], "torch.Tensor", Optional["torch.Tensor"]]

LIMIT = 1 << 26
"""Bytes of a batch that one call takes."""


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

    M : a matrix (p, s) of any float dtype, p and s up to 2048, or a list of them of any shapes. tol : relative cut for
    `rank`, in [0, 1); default `rank_cut(p, s)`, that of matrices made from float32 data. want : "values" leaves the
    vectors out.
    Returns SmallSVD, or a list of them. The entry of largest magnitude in each column of u is positive (the first on a
    tie), so that vectors of distinct values do not depend on the library that computes them.
    On CUDA, sides up to 128: one-sided Jacobi, one block for each matrix; otherwise LAPACK or cuSOLVER.
    Promise: residual and orthogonality at most 1e-13 times the norm. Vectors of equal values are arbitrary.
    Errors: ArgumentError, DataError for NaN or Inf, or where Jacobi's sweeps do not converge.
    """
    if want not in ("vectors", "values"):
        raise ArgumentError("want is unknown", code="argument", expected="'vectors' or 'values'", got=repr(want))
    named = _named(M, "M")
    cuts = [check_tol(tol, rank_cut(int(m.shape[0]), int(m.shape[1]))) for _, m in named]
    vectors = want == "vectors"

    def factor(batch: torch.Tensor) -> Parts:
        import torch

        if not vectors:
            return None, torch.linalg.svdvals(batch), None
        u, s, vh = torch.linalg.svd(batch, full_matrices=False)
        u, vh = fix_signs(u, vh)
        return u, s, vh

    def on_chip(batch: Sequence[torch.Tensor]) -> list[tuple[Parts, Any]]:
        from ..._backends.cuda_small import small_svd_batch

        made: list[tuple[Parts, Any]] = []
        for u, s, vh, convergence in small_svd_batch(batch, vectors=vectors):
            if u is not None and vh is not None:
                u, vh = fix_signs(u, vh)
            made.append(((u, s, vh), convergence))
        return made

    found = _decomposed(named, cuts, factor, on_chip, eigh=False)
    results = [SmallSVD(u, s, vh, rank) for (u, s, vh), rank in found]
    return results if isinstance(M, (list, tuple)) else results[0]


def small_eigh(G: Any, tol: float | None = None) -> Any:
    """Eigenvalues, falling, and eigenvectors of symmetric matrices, in float64.

    G : a symmetric matrix (s, s) of any float dtype, s up to 2048, or a list of them; the lower triangle is read.
    tol : relative cut for `rank`, in [0, 1); default s * 2.2e-16.
    Returns SmallEigh, or a list of them; signs of vectors as in `small_svd`.
    On CUDA, s up to 128: Jacobi, one block for each matrix; otherwise LAPACK or cuSOLVER.
    Promise: residual and orthogonality at most 1e-13 times the norm.
    Errors: ArgumentError (also for what is not square), DataError for NaN or Inf, or where sweeps do not converge.
    """
    import torch

    named = _named(G, "G")
    for what, g in named:
        if g.shape[0] != g.shape[1]:
            raise ArgumentError(
                f"{what} is not square", code="matrix.square", tensor=what, expected="(s, s)", got=str(tuple(g.shape))
            )
    cuts = [check_tol(tol, rank_cut(int(g.shape[0]), int(g.shape[0]), torch.float64)) for _, g in named]

    def factor(batch: torch.Tensor) -> Parts:
        values, vectors = torch.linalg.eigh(batch)
        return fix_signs(vectors.flip(-1), vectors.mT)[0], values.flip(-1), None

    def on_chip(batch: Sequence[torch.Tensor]) -> list[tuple[Parts, Any]]:
        from ..._backends.cuda_small import small_eigh_batch

        return [((fix_signs(v, v.mT)[0], w, None), convergence) for v, w, convergence in small_eigh_batch(batch)]

    found = _decomposed(named, cuts, factor, on_chip, eigh=True)
    results = [SmallEigh(v, w, rank) for (v, w, _), rank in found if v is not None]
    return results if isinstance(G, (list, tuple)) else results[0]


def _named(x: Any, letter: str) -> list[tuple[str, torch.Tensor]]:
    """What errors call each matrix, and the matrix in float64; values are not yet read."""
    import torch

    many = isinstance(x, (list, tuple))
    names = [f"{letter}[{i}]" for i in range(len(x))] if many else [letter]
    pairs = zip(names, x if many else [x], strict=True)
    return [(name, dense(check_matrix(m, name, finite=False)).to(torch.float64)) for name, m in pairs]


def _decomposed(
    named: Sequence[tuple[str, torch.Tensor]],
    cuts: Sequence[float],
    factor: Callable[[torch.Tensor], Parts],
    on_chip: Callable[[Sequence[torch.Tensor]], list[tuple[Parts, Any]]],
    eigh: bool,
) -> list[tuple[Parts, int]]:
    """The decompositions in order, each with its rank.

    Jacobi where there is a GPU and a matrix fits; all others in batches of one shape, on CPU one thread each. Values
    and ranks are read once per batch, so that a GPU is waited for seldom.
    """
    made: dict[int, tuple[Parts, int]] = {}
    jacobi = [i for i, (_, m) in enumerate(named) if _fits_on_chip(m, eigh)]
    for group in groups([named[i][1].device for i in jacobi]):
        numbers = [jacobi[j] for j in group]
        results = on_chip([named[i][1] for i in numbers])
        for i, (_, convergence) in zip(numbers, results, strict=True):
            if convergence.sweeps < 1:
                _refuse(*named[i], convergence)
        ranks = _ranks([parts[1] for parts, _ in results], [cuts[i] for i in numbers])
        made.update({i: (parts, rank) for i, (parts, _), rank in zip(numbers, results, ranks, strict=True)})
    rest = [i for i in range(len(named)) if i not in made]
    tasks: list[list[int]] = []
    for group in groups([(named[i][1].shape, named[i][1].device) for i in rest]):
        numbers = [rest[j] for j in group]
        first = named[numbers[0]][1]
        share = len(numbers) if first.device.type != "cpu" else -(-len(numbers) // _threads())
        step = max(1, min(share, LIMIT // max(1, 8 * first.numel())))
        tasks += [numbers[i : i + step] for i in range(0, len(numbers), step)]
    batches = [[named[i] for i in task] for task in tasks]
    work = [(batch, cuts[task[0]]) for batch, task in zip(batches, tasks, strict=True)]
    for task, found in zip(tasks, in_threads(work, lambda w: _batch(w[0], w[1], factor)), strict=True):
        made.update(zip(task, found, strict=True))
    return [made[i] for i in range(len(named))]


def _threads() -> int:
    """Threads that torch would use in this one."""
    import torch

    return torch.get_num_threads()


def _batch(
    named: Sequence[tuple[str, torch.Tensor]], cut: float, factor: Callable[[torch.Tensor], Parts]
) -> list[tuple[Parts, int]]:
    """Matrices of one shape in one call."""
    import torch

    batch = torch.stack([m for _, m in named])
    if not bool(torch.isfinite(batch).all()):
        bad = int((~torch.isfinite(batch)).flatten(1).any(1).int().argmax())
        check_matrix(batch[bad], named[bad][0])
    left, values, right = factor(batch)
    sizes = values.abs()
    top = sizes.amax(-1, keepdim=True) if sizes.shape[-1] else sizes
    ranks = (sizes > cut * top).sum(-1).tolist()
    none: list[torch.Tensor | None] = [None] * len(named)
    parts = zip(none if left is None else left, values, none if right is None else right, strict=True)
    return list(zip(parts, ranks, strict=True))


def _refuse(name: str, m: torch.Tensor, convergence: Any) -> None:
    check_matrix(m, name)  # NaN and Inf have a message of their own
    raise DataError(
        f"{name}: Jacobi's sweeps did not converge",
        code="data.convergence",
        tensor=name,
        got=f"a cosine of {convergence.off:.1e} after 30 sweeps",
    )


def _fits_on_chip(m: torch.Tensor, eigh: bool) -> bool:
    if m.device.type != "cuda":
        return False
    from ..._backends import cuda_small

    return cuda_small.why_not(m.device) is None and cuda_small.fits(
        int(m.shape[0]), int(m.shape[1]), m.device.index or 0, eigh=eigh
    )


def _ranks(values: Sequence[torch.Tensor], cuts: Sequence[float]) -> list[int]:
    """How many values are larger in magnitude than the cut times the largest; all on one device."""
    import torch

    counts = [(s.abs() > c * s.abs().amax()).sum() for s, c in zip(values, cuts, strict=True)]
    return [int(k) for k in torch.stack(counts).tolist()]


def fix_signs(u: torch.Tensor, vh: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Turns each pair so that the entry of largest magnitude in u's column (the first on a tie) is positive."""
    if u.numel() == 0:
        return u, vh
    sign = signs_of(u)
    return u * sign, vh * sign.mT


def signs_of(u: torch.Tensor) -> torch.Tensor:
    """1 or -1 for each column, (..., 1, k), that makes its entry of largest magnitude positive. u : not empty."""
    import torch

    largest = u.gather(-2, u.abs().argmax(-2, keepdim=True))
    return torch.where(largest < 0, -1.0, 1.0).to(u.dtype)
