"""`nuclear_norm`: the sum of singular values."""

from __future__ import annotations

from typing import Any

from .batching import one_or_many
from .gram import gram
from .qr import tall_qr
from .sharded import check_matrix, dense

__all__ = ["nuclear_norm"]


def nuclear_norm(X: Any) -> Any:
    """The sum of singular values, float64, without vectors.

    X : a matrix (2-D tensor of any float dtype, Sharded, or Factors), or a list of them. Returns a float, or a list.
    Promise: 1e-7 relative (float32 input, from the float64 Gram of the short side); 1e-13 for float64 tensors.
    Errors: ArgumentError, DataError for NaN or Inf.
    """
    return one_or_many(X, _nuclear_norm)


def _nuclear_norm(x: Any, what: str) -> float:
    import torch

    from ...adapters.model import Factors

    if isinstance(x, Factors):
        check_matrix(x.b, f"b of {what}")
        check_matrix(x.a, f"a of {what}")
        return float(torch.linalg.svdvals(tall_qr(x.b).r @ tall_qr(x.a.mT).r.mT).sum())
    matrix = check_matrix(x, what)
    if matrix.dtype == torch.float64:
        return float(torch.linalg.svdvals(dense(matrix)).sum())
    m, n = matrix.shape
    return float(torch.linalg.eigvalsh(gram(matrix if m >= n else matrix.mT)).clamp_min(0).sqrt().sum())
