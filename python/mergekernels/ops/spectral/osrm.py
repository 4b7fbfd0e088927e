"""Initial factors that annihilate given inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...errors import ArgumentError
from ._blocks import orthonormal
from ._random import normal
from .gram import gram
from .qr import tall_qr
from .sharded import Sharded, check_matrix, dense

if TYPE_CHECKING:
    import torch

__all__ = ["osrm_init"]


def osrm_init(H: Any, rank: int, seed: int = 0, centre: bool = False) -> torch.Tensor:
    """The factor a of an adapter that sees least of given inputs: r directions in which H^T H is smallest.

    H : inputs of the module on other tasks, (samples, n): a tensor, Sharded, or a list of such, which are stacked.
    rank : rows of the result, 1 to n. seed : where H leaves more than `rank` directions free, they are random ones
    among these. centre : subtract the mean input first.
    Returns a (rank, n) with orthonormal rows, float32 (float64 for float64 input), such that ||a H^T||_F^2 is the sum
    of the `rank` least eigenvalues of H^T H, up to 1e-6 ||H||_F. Start training with b = 0.
    Errors: ArgumentError, DataError for NaN or Inf.
    Source: OSRM, arXiv 2505.22934 (one data matrix per task; stacking and the random choice are ours).
    """
    import torch

    parts = list(H) if isinstance(H, (list, tuple)) else [H]
    if not parts:
        raise ArgumentError("osrm_init needs inputs", code="argument.inputs", expected="at least one matrix")
    checked = [dense(check_matrix(p, f"H[{i}]" if len(parts) > 1 else "H")) for i, p in enumerate(parts)]
    widths = {int(p.shape[1]) for p in checked}
    if len(widths) != 1:
        raise ArgumentError(
            "inputs differ in width", code="argument.shape", got=", ".join(str(w) for w in sorted(widths))
        )
    n = widths.pop()
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= n:
        raise ArgumentError("rank is out of range", code="argument.rank", expected=f"1 to {n}", got=str(rank))
    h = torch.cat(checked)
    if centre and h.shape[0]:
        h = h - h.mean(0, dtype=torch.float64).to(h.dtype)
    if h.shape[0] + rank <= n:
        q = dense(tall_qr(Sharded([h], 0).mT).q).to(torch.float64)
        free = normal(n, rank, seed, 0, q)
        for _ in range(2):
            free = orthonormal(free - q @ (q.mT @ free))[0]
    else:
        free = torch.linalg.eigh(gram(h))[1][:, :rank]
    return free.mT.contiguous().to(h.dtype)
