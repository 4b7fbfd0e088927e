"""Dominant invariant subspaces by block Krylov iteration with thick restarts.

The basis V grows by blocks of X^T X applied to its last block, kept orthonormal by two passes of projection, so that
T = V^T X^T X V is known as it grows and X^T X V = V T + Q E with the next block Q. Eigenvectors of T give the pairs;
|E z| is the residual of one. When the basis is full, its best part starts the next round. Full orthogonality locks what
has converged: strong heads need no deflation, and a flat spectrum costs 6 to 8 products per vector.
Source: block Lanczos with the Krylov-Schur restart (Stewart 2001; Zhou and Saad 2008).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ._blocks import orthonormal
from ._maps import Map
from ._random import signs

if TYPE_CHECKING:
    import torch

__all__ = ["Ritz", "Want", "krylov"]

SPARE = 4  # pairs beyond the k-th that a restart keeps at least
MAX_ROUNDS = 40
GAP = 0.98
"""Ratio of squares at the cut below which the truncation itself, not only its quality, is well defined and wanted."""
EIGEN = 120.0
"""Times p^3: an eigenvalue decomposition of T costs 30 p^3, as measured, and may cost a quarter of a block."""


@dataclass(frozen=True)
class Want:
    """How many pairs: at most `rank`, and the least that reach `energy` of `total` where energy is given.

    cut : pairs whose singular value is at or below cut times the largest do not exist.
    """

    rank: int
    energy: float | None
    total: float
    cut: float

    def count(self, squares: torch.Tensor) -> int:
        """How many of these squared singular values (falling, float64, CPU) are wanted."""
        import torch

        if len(squares) == 0 or float(squares[0]) <= 0.0:
            return 0
        k = min(self.rank, int((squares > self.cut**2 * squares[0]).sum()))
        if self.energy is None or self.total <= 0.0:
            return k
        short = torch.cumsum(squares[:k], 0) < self.energy * self.total * (1.0 - 1e-12)
        return min(k, int(short.sum()) + 1)

    def reached(self, squares: torch.Tensor) -> bool:
        """Whether `count` of these values is all that is wanted, and more values could not change it."""
        if self.energy is None:
            return len(squares) >= self.rank
        k = self.count(squares)
        return k >= self.rank or float(squares[:k].sum()) >= self.energy * self.total * (1.0 - 1e-12)


@dataclass(frozen=True)
class Ritz:
    """Converged pairs of X^T X.

    basis : (n, k + spare), orthonormal up to rounding, in X's dtype. squares : Ritz values of its columns, float64,
    falling, on the CPU. k : the pairs asked for. residual : the worst of ||X^T X v - square v|| / square among them.
    rounds : times the basis was filled. columns : vectors multiplied by X^T X.
    """

    basis: torch.Tensor
    squares: torch.Tensor
    k: int
    residual: float
    rounds: int
    columns: int


def krylov(x: Map, want: Want, strict: bool, tol: float, warm: torch.Tensor | None, seed: int) -> Ritz | None:
    """The pairs wanted of X^T X, or None where a decomposition of the whole is the better way.

    strict : stop on the residual of every pair, tol relative to its own square; else when the energy that further steps
    could add is within the promise of `subspace`.
    """
    import torch

    n = x.shape[1]
    step = block_size(want, n)
    start = signs(n, step, seed, 0, torch.empty(0, dtype=x.dtype, device=x.device))
    if warm is not None and warm.shape[1]:
        start = torch.cat([warm.to(start), start], 1)
    if start.shape[1] * 2 > n:
        return None
    run = _Run(x, want, strict, tol, seed, orthonormal(start)[0])
    while run.rounds < MAX_ROUNDS:
        done = run.fill()
        if done is not None or run.hopeless():
            return done
        run.restart()
    return None


def block_size(want: Want, n: int) -> int:
    """Columns of one block: wide enough for the matrix units, narrow enough for a high degree."""
    guess = want.rank if want.energy is None else min(want.rank, 64)
    return min(max(8, min(64, (16 + guess // 8) // 8 * 8)), n)


def capacity(k: int, step: int) -> int:
    """Columns of the basis before a restart."""
    return max(2 * k, k + 8 * step)


class _Run:
    """The state of one iteration: basis, projected matrix, next block."""

    def __init__(self, x: Map, want: Want, strict: bool, tol: float, seed: int, block: torch.Tensor) -> None:
        import torch

        self.x, self.want, self.strict, self.tol, self.seed = x, want, strict, tol, seed
        self.eps = torch.finfo(x.dtype).eps
        self.v = block.new_empty((4 * block.shape[1], x.shape[1])).mT  # by columns, which products like
        self.t = torch.zeros((4 * block.shape[1],) * 2, dtype=torch.float64)
        self.p = 0  # columns of v that X^T X has been applied to
        self.block = block
        self.coupling = torch.zeros((0, 0), dtype=torch.float64)  # E: next block against the last one
        self.fresh = self.was_fresh = 0  # random columns in the next block, and in the last one
        self.k = want.rank if want.energy is None else min(want.rank, block.shape[1])
        self.rounds = self.columns = self.draws = 0
        self.squares = torch.zeros(0, dtype=torch.float64)
        self.vectors = torch.zeros((0, 0), dtype=torch.float64)

    def fill(self) -> Ritz | None:
        """Blocks until the basis is full or the pairs have converged."""
        step = self.block.shape[1]
        look = max(self.k + step, 2 * step) if self.rounds == 0 else 0
        first, self.rounds = self.rounds == 0, self.rounds + 1
        while True:
            self.advance()
            full = self.p + step > capacity(self.k, step)
            cheap = EIGEN * self.p**3 < 4.0 * step * self.x.work
            if not full and (self.p < look or not (first or cheap)):
                continue
            self.decompose()
            done = self.judge()
            if done is not None or self.hopeless() or self.p + step > capacity(self.k, step):
                return done
            look = self.k + step if cheap else max(int(1.35 * self.p), self.k + step)

    def advance(self) -> None:
        """Puts the next block into the basis and makes the one after it."""
        p, s = self.p, self.block.shape[1]
        self.reserve(p + s)
        self.v[:, p : p + s] = self.block
        w = self.x.adjoint(self.x.times(self.block))
        self.columns += s
        basis = self.v[:, : p + s]
        first = (w.mT @ basis).mT
        w = _minus(w, basis, first)
        along = first.to(device="cpu", dtype=self.t.dtype)
        diagonal = along[p:].diagonal().clamp_min(0.0)
        # A product with X^T X is wrong by eps |X| |X v|; what is smaller than that is noise, not a direction.
        top = max(float(diagonal.max()), float(self.squares[0]) if len(self.squares) else 0.0)
        noise = 8.0 * self.eps * math.sqrt(top * float(diagonal.max()))
        self.was_fresh = self.fresh
        self.draws += 1
        q, r, self.fresh = orthonormal(w, noise, signs_for=(self.seed, self.draws))
        again = (q.mT @ basis).mT
        q = _minus(q, basis, again)
        q, r_again, _ = orthonormal(q)
        along += again.to(device="cpu", dtype=self.t.dtype) @ r
        self.t[: p + s, p : p + s] = along
        self.t[p : p + s, : p + s] = along.mT
        self.coupling = r_again @ r
        self.block, self.p = q, p + s

    def reserve(self, columns: int) -> None:
        """Room for so many columns."""
        have = self.v.shape[1]
        if columns <= have:
            return
        more = max(columns, 2 * have)
        v, t = self.v.new_empty((more, self.v.shape[0])).mT, self.t.new_zeros((more, more))
        v[:, : self.p] = self.v[:, : self.p]
        t[: self.p, : self.p] = self.t[: self.p, : self.p]
        self.v, self.t = v, t

    def decompose(self) -> None:
        """Ritz pairs of what the basis holds."""
        import torch

        t = self.t[: self.p, : self.p]
        values, vectors = torch.linalg.eigh((t + t.mT) / 2)
        self.squares, self.vectors = values.flip(0).clamp_min(0.0), vectors.flip(1)
        if self.want.energy is not None:
            self.k = max(1, self.want.count(self.squares))

    def judge(self) -> Ritz | None:
        """The result, if nothing that is wanted is left to find."""
        import torch

        squares, found = self.squares, self.want.count(self.squares)
        top, step = float(squares[0]), self.block.shape[1]
        # T is known to rounding of its norm: smaller squares may be noise.
        clear = int((squares > 64.0 * self.eps * top).sum())
        exhausted = self.fresh == step and self.was_fresh > 0 and clear <= self.p - self.was_fresh
        if not exhausted and not self.want.reached(squares):
            return None
        if self.fresh and not self.was_fresh:
            return None  # an invariant subspace is complete: look once at what is outside of it
        kept = squares[:found]
        residuals = torch.linalg.vector_norm(self.coupling @ self.vectors[self.p - step :, :found], dim=0)
        if self.strict:
            converged = bool((residuals <= self.tol * kept + 8.0 * self.eps * (top * kept).sqrt()).all())
        else:
            # Second order: what the pairs gain from the next block, whose own values are below those of the last one.
            # On all spectra of the tests the pairs then lacked at most 5 times this sum; 2e-4 of the rest are allowed.
            outside = float(self.t.diagonal()[self.p - step : self.p].max())
            gain = float((residuals.square() / (kept - outside).clamp_min(1e-300)).sum())
            rest = max(0.0, self.want.total - float(kept.sum()))
            converged = gain <= max(2.5e-5 * rest, 1e-13 * self.want.total)
            if found and found < len(squares) and float(squares[found]) < GAP * float(kept[-1]):
                converged = converged and gain <= 2e-12 * float(kept.sum())
        if not converged:
            return None
        columns = min(self.p, found + max(SPARE, step))
        basis = self.v[:, : self.p] @ self.vectors[:, :columns].to(self.v)
        worst = float((residuals / kept).max()) if found else 0.0
        return Ritz(basis, squares[:columns], found, worst, self.rounds, self.columns)

    def hopeless(self) -> bool:
        """Whether so many pairs are needed that a decomposition of the whole is cheaper."""
        n = self.x.shape[1]
        if self.want.energy is None or self.want.reached(self.squares):
            return capacity(self.k, self.block.shape[1]) > 0.8 * n
        # The first quarter of the Ritz values is near the truth: no later value is above twice the last of these.
        early = self.p // 4
        missing = self.want.energy * self.want.total - float(self.squares[:early].sum())
        return self.p > n / 3 or early + missing / max(2.0 * float(self.squares[early]), 1e-300) > n / 4

    def restart(self) -> None:
        """Keeps the best Ritz vectors as the start of the next round."""
        keep = min(self.p, self.k + max(SPARE, (self.p - self.k) // 3))
        self.v[:, :keep] = self.v[:, : self.p] @ self.vectors[:, :keep].to(self.v)
        self.t.zero_()
        self.t.diagonal()[:keep] = self.squares[:keep]
        self.p = keep


def _minus(w: torch.Tensor, basis: torch.Tensor, along: torch.Tensor) -> torch.Tensor:
    """Subtracts basis @ along from w (stored by columns), in place."""
    w.mT.addmm_(along.mT, basis.mT, alpha=-1.0)
    return w
