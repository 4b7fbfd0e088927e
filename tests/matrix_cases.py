"""Adapters in memory, and the loop that drives a method over matrices, without files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mergekernels._methods.arguments import bind_matrix
from mergekernels._methods.matrix import MatrixSpec, Merged, measured_state
from mergekernels._methods.matrix_table import get_matrix
from mergekernels.adapters.model import Delta, Factors
from mergekernels.tensors import tensor_id

Deltas = Mapping[str, Sequence[Delta]]


def product(m: int, n: int, rank: int, seed: int, dtype: torch.dtype = torch.float32, decay: float = 1.0) -> Factors:
    """Random factors; with decay below 1 the units fall off geometrically."""
    draw = torch.Generator().manual_seed(seed)
    sizes = decay ** torch.arange(rank, dtype=torch.float64)
    b = torch.randn(m, rank, generator=draw, dtype=torch.float64) * sizes
    a = torch.randn(rank, n, generator=draw, dtype=torch.float64)
    return Factors(b.to(dtype), a.to(dtype))


def dense(delta: Delta) -> torch.Tensor:
    """The matrix in float64."""
    return delta.b.double() @ delta.a.double() if isinstance(delta, Factors) else delta.double()


def merge_all(
    name: str, deltas: Deltas, *, takes: str = "adapters", dialect: str = "default", seed: int = 0, **arguments: Any
) -> dict[str, Merged]:
    """Every module's result of the method, before the driver's lambda."""
    method = get_matrix(name, takes)  # type: ignore[arg-type]
    count = len(next(iter(deltas.values())))
    params = bind_matrix(method, arguments, count, dialect)
    specs = {}
    for module, given in deltas.items():
        first = given[0]
        shape = first.shape if isinstance(first, Factors) else tuple(first.shape)
        specs[module] = MatrixSpec(module, shape, count, params, dialect, seed, tensor_id(module))
    state = measured_state(
        method, params, dialect, lambda at: {m: method.measure(specs[m], deltas[m], at) for m in deltas}
    )
    return {m: method.merge(specs[m], deltas[m], state) for m in deltas}


def merge_one(name: str, deltas: Sequence[Delta], **arguments: Any) -> torch.Tensor:
    """The merged matrix of a single module, float64."""
    return dense(merge_all(name, {"layers.0.q_proj": deltas}, **arguments)["layers.0.q_proj"].delta)


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """||got - want||_F / ||want||_F in float64; the norm of got where want is zero."""
    size = float(want.double().norm())
    return float((got.double() - want.double()).norm()) / (size or 1.0)


def rotation(n: int, seed: int) -> torch.Tensor:
    """A random orthogonal matrix, float64."""
    draw = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, generator=draw, dtype=torch.float64))[0]
