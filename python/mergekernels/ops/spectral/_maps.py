"""Matrices as linear maps: dense, in shards, in factors, or sums of these, never formed if they need not be.

A map multiplies from either side in the dtype of its argument and knows its Frobenius norm in float64.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import TYPE_CHECKING

from .sharded import Sharded, blocks, dense, moderate

if TYPE_CHECKING:
    import torch

__all__ = ["DenseMap", "FactorMap", "Map", "MixMap", "Wide", "scaled", "transposed"]

WIDE = 1 << 20  # elements of a float32 matrix that are widened to float64 at a time: 8 MB
NORM_BLOCK = 1 << 16  # elements whose squares are summed at a time: they stay in the cache


class Map(ABC):
    """A linear map with the matrix X, (m, n)."""

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device

    @abstractmethod
    def times(self, y: torch.Tensor) -> torch.Tensor:
        """X @ y in y's dtype; y is (n, k) on `device`."""

    @abstractmethod
    def adjoint(self, y: torch.Tensor) -> torch.Tensor:
        """X^T @ y in y's dtype; y is (m, k) on `device`."""

    @abstractmethod
    def dense(self) -> torch.Tensor:
        """The matrix itself, in `dtype`, on `device`."""

    @property
    @abstractmethod
    def work(self) -> int:
        """Multiplications of `times` with one column."""

    @cached_property
    def norm2(self) -> float:
        """Squared Frobenius norm, float64."""
        return self._norm2()

    @cached_property
    def near_norm2(self) -> float:
        """The same to about 1e-7 of itself, where that is cheaper."""
        return self.norm2

    @abstractmethod
    def _norm2(self) -> float: ...


class DenseMap(Map):
    """A dense matrix, whole or in shards."""

    def __init__(self, x: torch.Tensor | Sharded) -> None:
        self.x = x
        self.shape = (int(x.shape[0]), int(x.shape[1]))
        self.dtype, self.device = x.dtype, x.device

    def times(self, y: torch.Tensor) -> torch.Tensor:
        return _times(self.x, y)

    def adjoint(self, y: torch.Tensor) -> torch.Tensor:
        return _adjoint(self.x, y)

    def dense(self) -> torch.Tensor:
        return dense(self.x)

    @property
    def work(self) -> int:
        return self.shape[0] * self.shape[1]

    def _norm2(self) -> float:
        return square_norm(self.x)


class FactorMap(Map):
    """b @ a."""

    def __init__(self, b: torch.Tensor, a: torch.Tensor) -> None:
        self.b, self.a = b, a
        self.shape = (int(b.shape[0]), int(a.shape[1]))
        self.dtype, self.device = b.dtype, b.device

    @property
    def inner(self) -> int:
        """Columns of b."""
        return int(self.b.shape[1])

    def times(self, y: torch.Tensor) -> torch.Tensor:
        return _times(self.b, _times(self.a, y))

    def adjoint(self, y: torch.Tensor) -> torch.Tensor:
        return _adjoint(self.a, _adjoint(self.b, y))

    def dense(self) -> torch.Tensor:
        return self.b @ self.a

    @property
    def work(self) -> int:
        return self.inner * sum(self.shape)

    @cached_property
    def wide(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Both factors in float64."""
        import torch

        return self.b.to(torch.float64), self.a.to(torch.float64)

    @cached_property
    def grams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """b^T b and a a^T in float64."""
        b, a = self.wide
        return b.mT @ b, a @ a.mT

    def _norm2(self) -> float:
        if self.inner > min(self.shape):  # the product is smaller than the Grams
            b, a = self.wide
            return square_norm(b @ a)
        left, right = self.grams
        return max(0.0, float((left * right).sum()))

    @cached_property
    def near_norm2(self) -> float:
        import torch

        if self.inner <= 256 or self.dtype == torch.float64:
            return self.norm2
        if not (moderate(self.b) and moderate(self.a)):
            return self.norm2
        if self.inner > min(self.shape):
            return square_norm(self.dense())
        total = 0.0
        for i in range(0, self.inner, 256):
            left, right = self.b[:, i : i + 256].mT @ self.b, self.a[i : i + 256] @ self.a.mT
            total += float((left.to(torch.float64) * right).sum())
        return max(0.0, total)


class MixMap(Map):
    """The sum of a product of factors and a dense matrix."""

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
        import torch

        f = self.factors
        return torch.addmm(self.matrix.dense().to(self.dtype), f.b.to(self.dtype), f.a.to(self.dtype))

    @property
    def work(self) -> int:
        return self.factors.work + self.matrix.work

    def _norm2(self) -> float:
        import torch

        f = self.factors
        cross = float((self.matrix.times(f.a.mT.to(torch.float64)) * f.b).sum())
        return max(0.0, self.matrix.norm2 + f.norm2 + 2.0 * cross)


class _Transposed(Map):
    """The transpose of a map."""

    def __init__(self, of: Map) -> None:
        self.of = of
        self.shape = (of.shape[1], of.shape[0])
        self.dtype, self.device = of.dtype, of.device

    def times(self, y: torch.Tensor) -> torch.Tensor:
        return self.of.adjoint(y)

    def adjoint(self, y: torch.Tensor) -> torch.Tensor:
        return self.of.times(y)

    def dense(self) -> torch.Tensor:
        return self.of.dense().mT

    @property
    def work(self) -> int:
        return self.of.work

    def _norm2(self) -> float:
        return self.of.norm2


class Wide(Map):
    """A map whose products are float64, whatever it is stored in."""

    def __init__(self, of: Map) -> None:
        import torch

        self.of = of
        self.shape, self.device = of.shape, of.device
        self.dtype = torch.float64

    def times(self, y: torch.Tensor) -> torch.Tensor:
        return self.of.times(y)

    def adjoint(self, y: torch.Tensor) -> torch.Tensor:
        return self.of.adjoint(y)

    def dense(self) -> torch.Tensor:
        return self.of.dense().to(self.dtype)

    @property
    def work(self) -> int:
        return self.of.work

    def _norm2(self) -> float:
        return self.of.norm2


def scaled(x: Map, power: int) -> Map:
    """X times 2^power, exactly but for what leaves the range of numbers: a copy."""
    if isinstance(x, DenseMap):
        if isinstance(x.x, Sharded):
            return DenseMap(Sharded([p * 2.0**power for p in x.x.parts], x.x.dim))
        return DenseMap(x.x * 2.0**power)
    if isinstance(x, FactorMap):
        half = power // 2
        return FactorMap(x.b * 2.0**half, x.a * 2.0 ** (power - half))
    if isinstance(x, MixMap):
        factors, matrix = scaled(x.factors, power), scaled(x.matrix, power)
        assert isinstance(factors, FactorMap)
        assert isinstance(matrix, DenseMap)
        return MixMap(factors, matrix)
    assert isinstance(x, _Transposed)
    return _Transposed(scaled(x.of, power))


def transposed(x: Map) -> Map:
    """X^T: a view."""
    if isinstance(x, DenseMap):
        return DenseMap(x.x.mT)
    if isinstance(x, FactorMap):
        return FactorMap(x.a.mT, x.b.mT)
    return _Transposed(x)


def square_norm(x: torch.Tensor | Sharded) -> float:
    """Sum of squares in float64, the same bits however x is cut."""
    import torch

    total = 0.0
    for block in blocks(x, torch.float64, max(1, NORM_BLOCK // max(1, int(x.shape[1])))):
        flat = block.view(-1)
        total += float(torch.dot(flat, flat))
    return total


def _times(x: torch.Tensor | Sharded, y: torch.Tensor) -> torch.Tensor:
    """The product x @ y in y's dtype; shards send their small products to y's device."""
    import torch

    if not isinstance(x, Sharded):
        return _product(x, y)
    if x.dim == 0:
        return torch.cat([_product(p, y.to(p.device)).to(y.device) for p in x.parts])
    pieces = y.split(x.sizes)  # type: ignore[no-untyped-call]
    total = torch.zeros((x.shape[0], y.shape[1]), dtype=y.dtype, device=y.device)
    for p, piece in zip(x.parts, pieces, strict=True):
        total += _product(p, piece.to(p.device)).to(y.device)
    return total


def _adjoint(x: torch.Tensor | Sharded, y: torch.Tensor) -> torch.Tensor:
    return _times(x.mT, y)


def _product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The product x @ y in the dtype of y, stored by columns; a narrower x is widened in pieces: no wide copy of it.

    Products of few columns are 1.3 to 10 times as fast in MKL when written as y^T x^T.
    """
    import torch

    if x.dtype == y.dtype:
        return (y.mT @ x.mT).mT
    if x.numel() <= 4 * WIDE:
        return (y.mT @ x.mT.to(y.dtype)).mT
    if x.stride(0) < x.stride(1):  # stored by columns: add up over pieces of columns, which are contiguous
        total = torch.zeros((y.shape[1], x.shape[0]), dtype=y.dtype, device=y.device)
        step = max(1, WIDE // x.shape[0])
        for i in range(0, x.shape[1], step):
            total.addmm_(y[i : i + step].mT, x[:, i : i + step].mT.to(y.dtype))
        return total.mT
    step = max(1, WIDE // x.shape[1])
    return torch.cat([y.mT @ x[i : i + step].to(y.dtype).mT for i in range(0, x.shape[0], step)], 1).mT
