"""What methods need to know of the two sides of a product of factors, from one float64 Gram of each.

Where the columns of b (and the rows of a), scaled to one norm, are independent enough, everything else happens in the
size of the rank, and orthonormal bases are b and a times something small: no QR decomposition, no second pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from .batching import groups
from .cuts import power_of_two
from .gram import gram, row_gram, short_gram

if TYPE_CHECKING:
    import torch

__all__ = ["Product", "Side", "both_sides", "departure", "product_of", "side_of", "triangles"]

DEPENDENT = 1e4
"""Bound of the condition above which a basis from a float64 Gram leaves more than 1e-7 of non-orthogonality."""

PLAIN = 6.0
"""The same, of a Gram in float32 with sums of at most 1024 products, wrong by about 1e-7."""

EVEN = 30.0
"""Condition up to which products with the factors in float32 lose no more than rounding of the result does."""

SQUARED = 3e3
"""Condition of a core up to which the eigenvalues of its square know every singular value to 1e-8 of itself."""

RANGE = 1e12
"""Norms of columns between 1 / RANGE and RANGE: scales and their products stay far inside of float32."""


@dataclass(frozen=True)
class Side:
    """b = (b / scale) scale, the columns of b / scale with norms in [1, 2), and r^T r their Gram.

    x : (d, c) float32; a's side is a^T, a view. gram : (c, c), of x / scale, float64. r : (c, c), its upper Cholesky
    factor. scale : (c,), powers of two. condition : an upper bound of that of r.
    """

    x: torch.Tensor
    gram: torch.Tensor
    r: torch.Tensor
    scale: torch.Tensor
    condition: float

    def times(self, small: torch.Tensor) -> torch.Tensor:
        """(x / scale) @ small in float32, (d, k); small : (c, k) float64.

        In float64 where the columns depend on each other so much that float32 would lose digits.
        """
        small = small / self.scale[:, None]
        if self.condition <= EVEN:
            return self.x @ small.to(self.x.dtype)
        return (self.x.to(small.dtype) @ small).to(self.x.dtype)

    def basis(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Orthonormal q (d, c), float32, and the coordinates of x in it, (c, c), float64."""
        import torch

        eye = torch.eye(len(self.r), dtype=self.r.dtype)
        return self.times(torch.linalg.solve_triangular(self.r, eye, upper=True)), self.r * self.scale

    def rows(self, small: torch.Tensor) -> torch.Tensor:
        """The transpose of `times`, (k, d), contiguous; for a's side, of which x^T is."""
        small = (small / self.scale[:, None]).mT
        if self.condition <= EVEN:
            return small.to(self.x.dtype) @ self.x.mT
        return (small @ self.x.mT.to(small.dtype)).to(self.x.dtype)


def side_of(x: torch.Tensor) -> Side | None:
    """The side whose columns are those of x (d, c), float32 on the CPU; None unless a Gram is good enough for it.

    Not good enough are dependent columns and zero ones, more columns than rows, NaN and Inf, and extreme norms.
    """
    import torch

    d, c = x.shape
    if x.dtype != torch.float32 or x.device.type != "cpu" or not 0 < c <= d:
        return None
    tall = x.stride(1) == 1
    near = _side(x, short_gram(x if tall else x.mT, rows=not tall), PLAIN)
    return near or _side(x, gram(x) if tall else row_gram(x.mT), DEPENDENT)


def _side(x: torch.Tensor, g: torch.Tensor, most: float) -> Side | None:
    """The side with Gram g, if the bound of its condition is at most `most`."""
    import torch

    norms = g.diagonal().sqrt()
    least, longest = torch.aminmax(norms)
    if not (float(least) > 1.0 / RANGE and float(longest) < RANGE):  # also where they are NaN
        return None
    scale = power_of_two(norms)
    g = g / scale / scale[:, None]
    # Of a symmetric matrix, the largest sum of a row bounds the largest eigenvalue.
    top = float(g.abs().sum(0).max())
    if top > 4.0 * most**2:  # the least eigenvalue is below 4
        return None
    r, info = torch.linalg.cholesky_ex(g, upper=True)
    if int(info):
        return None
    condition = (top * float(torch.cholesky_inverse(r, upper=True).abs().sum(0).max())) ** 0.5
    return Side(x, g, r, scale, condition) if condition <= most else None


@dataclass(frozen=True)
class Product:
    """Triplets of b a = u diag(s) v^T: u = b_side.times(left), v = a_side.times(right), s falling, float64."""

    left: torch.Tensor
    s: torch.Tensor
    right: torch.Tensor


def product_of(b: Side, a: Side) -> Product:
    """All singular triplets of b a, whose sides have equally many columns. Signs are as they come."""
    import torch

    weight = b.scale * a.scale
    spread = float(weight.max() / weight.min())
    if b.condition * a.condition * spread > SQUARED:
        u, s, vh = torch.linalg.svd((b.r * weight) @ a.r.mT, full_matrices=False)
        left = torch.linalg.solve_triangular(b.r, u, upper=True)
        return Product(left, s, torch.linalg.solve_triangular(a.r, vh.mT, upper=True))
    # X^T X in the basis of a's rows. U = X V / s and V = X^T U / s: no triangle is inverted.
    ra = weight[:, None] * a.r.mT
    half = b.gram @ ra
    values, w = torch.linalg.eigh(ra.mT @ half)
    s, w = values.clamp_min(0.0).sqrt().flip(0), w.flip(1)
    return Product((ra @ w) / s, s, weight[:, None] * (half @ w) / s**2)


def triangles(gram: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
    """The upper Cholesky factors of the blocks on the diagonal of a positive definite matrix, (size, size) each."""
    import torch

    ends = list(accumulate(sizes))
    blocks = [gram[end - size : end, end - size : end] for size, end in zip(sizes, ends, strict=True)]
    made: dict[int, torch.Tensor] = {}
    for group in groups(sizes):
        batch = torch.linalg.cholesky(torch.stack([blocks[i] for i in group]), upper=True)
        made.update(zip(group, batch, strict=True))
    return [made[i] for i in range(len(sizes))]


def departure(b: torch.Tensor, a: torch.Tensor) -> float:
    """||(b^T b)(a a^T) - I||_F, estimated with eight random vectors; of b (m, k) and a (k, n), k > 0."""
    import torch

    from .iterations import probes

    v = probes(b.shape[1], b.dtype, b.device).mT.contiguous()
    # As rows: products with few columns are several times slower.
    z = ((v @ b.mT) @ b @ a) @ a.mT
    return float(torch.linalg.vector_norm(z - v, dtype=torch.float64) / math.sqrt(v.shape[0]))


def both_sides(factors: Any) -> tuple[Side, Side] | None:
    """Those of Factors b, a."""
    b = side_of(factors.b)
    a = side_of(factors.a.mT) if b is not None else None
    return None if a is None or b is None else (b, a)
