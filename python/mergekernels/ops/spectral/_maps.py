"""Matrices as linear maps: dense, in factors, in shards, or sums of these, never formed if they need not be.

An operator multiplies from either side in the dtype of its argument and knows its Frobenius norm in float64.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import cached_property
from typing import TYPE_CHECKING, Union

from ...adapters.model import Factors
from ...errors import ArgumentError, DataError
from .mix import Mix

if TYPE_CHECKING:
    import torch

__all__ = ["DenseMap", "FactorMap", "Map", "MixMap", "as_map"]


class Map(ABC):
    """A linear map with the matrix X, (m, n)."""

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device

    @abstractmethod
    def times(self, y: torch.Tensor) -> torch.Tensor:
        """X @ y in y's dtype; y is (n, k)."""

    @abstractmethod
    def adjoint(self, y: torch.Tensor) -> torch.Tensor:
        """X^T @ y in y's dtype; y is (m, k)."""

    @abstractmethod
    def dense(self) -> torch.Tensor:
        """The matrix itself, in `dtype`."""

    @property
    @abstractmethod
    def work(self) -> int:
        """Multiplications of `times` with one column."""

    @cached_property
    def norm2(self) -> float:
        """Squared Frobenius norm, float64."""
        return self._norm2()

    @abstractmethod
    def _norm2(self) -> float: ...


class DenseMap(Map):
    """A dense matrix."""

    def __init__(self, x: torch.Tensor, name: str) -> None:
        self.x = _floating(x, name)
        self.shape = (int(x.shape[0]), int(x.shape[1]))
        self.dtype, self.device = self.x.dtype, x.device
        self.name = name
        if not math.isfinite(self.norm2):
            _refuse(self.x, name)

    def times(self, y: torch.Tensor) -> torch.Tensor:
        return self.x.to(y.dtype) @ y

    def adjoint(self, y: torch.Tensor) -> torch.Tensor:
        return self.x.T.to(y.dtype) @ y

    def dense(self) -> torch.Tensor:
        return self.x

    @property
    def work(self) -> int:
        return self.x.numel()

    def _norm2(self) -> float:
        return square_norm(self.x)


class FactorMap(Map):
    """b @ a."""

    def __init__(self, b: torch.Tensor, a: torch.Tensor, name: str) -> None:
        self.b, self.a = _floating(b, f"{name}.b"), _floating(a, f"{name}.a")
        if b.shape[1] != a.shape[0]:
            raise ArgumentError(
                f"{name}: the factors do not fit together",
                code="argument.factors",
                expected=f"a with {b.shape[1]} rows, as b has columns",
                got=f"b {tuple(b.shape)} and a {tuple(a.shape)}",
            )
        if self.b.dtype != self.a.dtype:
            import torch

            self.b, self.a = self.b.to(torch.float64), self.a.to(torch.float64)
        self.shape = (int(b.shape[0]), int(a.shape[1]))
        self.dtype, self.device = self.b.dtype, b.device
        for part, t in (("b", self.b), ("a", self.a)):
            if not math.isfinite(square_norm(t)):
                _refuse(t, f"{name}.{part}")

    @property
    def inner(self) -> int:
        """Columns of b."""
        return int(self.b.shape[1])

    def times(self, y: torch.Tensor) -> torch.Tensor:
        return self.b.to(y.dtype) @ (self.a.to(y.dtype) @ y)

    def adjoint(self, y: torch.Tensor) -> torch.Tensor:
        return self.a.T.to(y.dtype) @ (self.b.T.to(y.dtype) @ y)

    def dense(self) -> torch.Tensor:
        return self.b @ self.a

    @property
    def work(self) -> int:
        return self.inner * sum(self.shape)

    @cached_property
    def grams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """b^T b and a a^T in float64."""
        import torch

        b, a = self.b.to(torch.float64), self.a.to(torch.float64)
        return b.T @ b, a @ a.T

    def _norm2(self) -> float:
        left, right = self.grams
        return max(0.0, float((left * right).sum()))


class MixMap(Map):
    """A weighted sum of a product of factors and a dense matrix."""

    def __init__(self, factors: FactorMap, matrix: DenseMap) -> None:
        import torch

        self.factors, self.matrix = factors, matrix
        self.shape, self.device = matrix.shape, matrix.device
        self.dtype = torch.promote_types(factors.dtype, matrix.dtype)

    def times(self, y: torch.Tensor) -> torch.Tensor:
        return self.factors.times(y) + self.matrix.times(y)

    def adjoint(self, y: torch.Tensor) -> torch.Tensor:
        return self.factors.adjoint(y) + self.matrix.adjoint(y)

    def dense(self) -> torch.Tensor:
        return self.factors.dense().to(self.dtype) + self.matrix.dense()

    @property
    def work(self) -> int:
        return self.factors.work + self.matrix.work

    def _norm2(self) -> float:
        import torch

        f = self.factors
        cross = (self.matrix.times(f.a.T.to(torch.float64)) * f.b.to(torch.float64)).sum()
        return max(0.0, self.matrix.norm2 + f.norm2 + 2.0 * float(cross))


Matrix = Union["torch.Tensor", Factors, Mix]


def as_map(x: Matrix, name: str) -> Map:
    """The map of a matrix argument, checked: two dimensions, floating, no NaN or Inf. `name` is for errors."""
    if isinstance(x, Factors):
        return FactorMap(x.b, x.a, name)
    if isinstance(x, Mix):
        return _mix_map(x, name)
    return DenseMap(x, name)


def _mix_map(mix: Mix, name: str) -> Map:
    import torch

    terms = [FactorMap(f.b, f.a, f"{name}.factors[{i}]") for i, (_, f) in enumerate(mix.factors)]
    whole = [DenseMap(d, f"{name}.dense[{i}]") for i, (_, d) in enumerate(mix.dense)]
    shapes = {t.shape for t in (*terms, *whole)}
    if len(shapes) != 1:
        raise ArgumentError(
            f"{name}: a mix needs terms of one shape",
            code="argument.shape",
            expected="one shape",
            got=", ".join(str(s) for s in sorted(shapes)) or "no term",
        )
    weights = [float(w) for w, _ in (*mix.factors, *mix.dense)]
    if not all(math.isfinite(w) for w in weights):
        raise ArgumentError(f"{name}: weights must be finite", code="argument.weights", got=str(weights))
    product = matrix = None
    if terms:
        wide = terms[0].dtype
        for t in terms:
            wide = torch.promote_types(wide, t.dtype)
        b = torch.cat([(t.b * w).to(wide) for (w, _), t in zip(mix.factors, terms, strict=True)], 1)
        product = FactorMap(b, torch.cat([t.a.to(wide) for t in terms], 0), name)
    if whole:
        total = whole[0].x * float(mix.dense[0][0])
        for (w, _), d in zip(mix.dense[1:], whole[1:], strict=True):
            total = total + d.x * float(w)
        matrix = DenseMap(total, name)
    if product is None:
        assert matrix is not None
        return matrix
    return product if matrix is None else MixMap(product, matrix)


def square_norm(x: torch.Tensor) -> float:
    """Sum of squares in float64."""
    import torch

    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2


def _floating(x: torch.Tensor, name: str) -> torch.Tensor:
    import torch

    if not isinstance(x, torch.Tensor) or x.dim() != 2:
        got = f"{x.dim()} dimensions" if isinstance(x, torch.Tensor) else type(x).__name__
        raise ArgumentError(f"{name} must be a matrix", code="argument.shape", expected="two dimensions", got=got)
    if not x.is_floating_point():
        raise ArgumentError(
            f"{name} must be real", code="argument.dtype", expected="a floating dtype", got=str(x.dtype)
        )
    return x if x.dtype in (torch.float32, torch.float64) else x.to(torch.float32)


def _refuse(x: torch.Tensor, name: str) -> None:
    import torch

    bad = ~torch.isfinite(x)
    if not bool(bad.any()):
        return
    where = [int(i) for i in bad.nonzero()[0]]
    raise DataError(
        f"holds NaN or Inf at {where}", code="data.nan", tensor=name, expected="finite values",
        got=str(float(x[where[0], where[1]])),
    )  # fmt: skip
