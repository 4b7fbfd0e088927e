"""Leading pairs of a flat spectrum on the CPU: eigenvectors of the Gram in the matrix's own precision.

Where many directions are wanted and none stands out, every step of an iteration gains little, and the decomposition of
a float32 Gram is cheaper than the products that an iteration needs (LAPACK, two cores: 13 n^3 operations at the rate of
products). Its rounding is relative to the largest value, so it serves only spectra without a head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._krylov import Ritz, Want
from ._maps import DenseMap, Map
from .gram import plain_gram
from .sharded import moderate

if TYPE_CHECKING:
    import torch

__all__ = ["plain_eigh", "suits"]

SHARE = 16  # least share of the directions, 1 / SHARE, for which all eigenvectors cost less than an iteration
SMALLEST = 256  # shorter side from which the float64 Gram's twice higher cost matters
HEAD = 100.0  # sigma_1^2 / sigma_k^2 above which rounding of float32 products reaches the wanted directions


def suits(x: Map, want: Want, strict: bool) -> bool:
    """Whether to try: single matrices in float32 on the CPU, of which a good part is wanted as a subspace."""
    import torch

    small = min(x.shape)
    return (
        strict
        and want.energy is None
        and isinstance(x, DenseMap)
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and small >= SMALLEST
        and SHARE * want.rank >= small
    )


def plain_eigh(x: Map, want: Want) -> Ritz | None:
    """The leading pairs of X^T X, (m, n) with m >= n, with spare ones that a polishing step needs; None for a head.

    The spare ones separate: what rounding mixes into a wanted vector comes from its neighbours, and projecting once
    more on all of these undoes it.
    """
    import torch

    k = want.rank
    if not moderate(x.dense()):
        return None
    values, vectors = torch.linalg.eigh(plain_gram([x.dense()], whole=False), UPLO="U")
    squares = values.flip(0).clamp_min(0.0)
    if float(squares[0]) > HEAD * float(squares[k - 1]):
        return None
    spare = min(x.shape[1], k + max(16, k // 4))
    basis = vectors[:, -spare:].flip(1).contiguous()
    residual = _residual(x, basis[:, :k], squares[:k])
    return Ritz(basis, squares[:spare].to(torch.float64), k, residual, 0, 0)


def _residual(x: Map, v: torch.Tensor, squares: torch.Tensor) -> float:
    """Of the last wanted vectors, which are the worst."""
    import torch

    v, squares = v[:, -8:], squares[-8:]
    rest = x.adjoint(x.times(v)) - v * squares
    return float((torch.linalg.vector_norm(rest, dim=0) / squares).max())
