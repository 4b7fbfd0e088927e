"""A method over matrices called on one matrix, as a driver does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mergekernels._methods.arguments import bind_matrix
from mergekernels._methods.matrix import MatrixSpec, Merged
from mergekernels._methods.matrix_table import get_matrix
from mergekernels.adapters.model import Delta, Factors


def merged(method: str, deltas: Sequence[Delta], **arguments: Any) -> Merged:
    found = get_matrix(method, "models")
    params = bind_matrix(found, arguments, len(deltas), "default")
    m, n = (int(x) for x in deltas[0].shape)
    return found.merge(MatrixSpec("w", (m, n), len(deltas), params), deltas)


def dense(found: Merged) -> torch.Tensor:
    return found.delta.dense() if isinstance(found.delta, Factors) else found.delta


def lora(m: int, n: int, r: int, seed: int, dtype: torch.dtype = torch.float32) -> Factors:
    g = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(m, r, generator=g).to(dtype), torch.randn(r, n, generator=g).to(dtype))


def rotation(n: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64)).Q.float()


def nothing(m: int, n: int) -> Factors:
    return Factors(torch.zeros(m, 0), torch.zeros(0, n))
