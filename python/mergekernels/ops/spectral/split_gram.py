"""The polar factor of a square matrix on the CPU from eigenvectors of its float32 Gram.

A float32 Gram knows the strong directions and loses the weak ones. These, few where the spectrum is flat, are taken
from the matrix itself in float64, in a thin block; one Newton-Schulz step then restores orthogonality. All else is
products, so that it costs about two thirds of a singular value decomposition. Where the spectrum is even (for noise
from an aspect of about 4) that step, too, is done in the size of the Gram, and the matrix is multiplied once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .gram import plain_gram
from .sharded import moderate

if TYPE_CHECKING:
    import torch

__all__ = ["split_polar"]

WEAK = 1e-2  # sigma^2 / sigma_1^2 below which a direction is taken in float64
EVEN = 16.0  # sigma_1^2 / sigma_n^2, and
LEVEL = 1.8  # mean of sigma^2 times mean of 1 / sigma^2, up to which a float32 Gram alone is good enough
MOST = 6  # at most 1 / MOST of the directions may be weak
FLAT = 0.3  # least participation ratio (sum sigma^2)^2 / (n sum sigma^4) for which it is tried; 0.5 for Gaussian noise
NEAR = 0.05  # ||P^T P - I||_F / sqrt(n) before the last step above which the result is not trusted


def split_polar(x: torch.Tensor, cut: float) -> torch.Tensor | None:
    """U V^T of a float32 matrix (m, n), m >= n, of full rank and flat spectrum; None for any other.

    cut : relative; a singular value at or below cut * sigma_1 makes it None.
    """
    import torch

    n = x.shape[1]
    if not moderate(x):
        return None
    g = plain_gram([x])
    trace = float(g.diagonal().sum(dtype=torch.float64))
    square = float(torch.linalg.vector_norm(g, dtype=torch.float64)) ** 2
    if not trace > 0.0 or trace * trace < FLAT * n * square:
        return None
    values, vectors = torch.linalg.eigh(g)
    top = float(values[-1])
    weak = int((values < WEAK * top).sum())
    if weak * MOST > n:
        return None
    strong, lengths = vectors[:, weak:], values[weak:]
    root: torch.Tensor = (strong * lengths.rsqrt()) @ strong.mT
    if top <= EVEN * float(values[0]) and float(values.mean() * values.reciprocal().mean()) <= LEVEL:
        return x @ _corrected(root, g)
    p: torch.Tensor = x @ root
    if weak:
        block = _weak(x, vectors[:, :weak], strong, lengths, cut * top**0.5)
        if block is None:
            return None
        p.addmm_(*block)
    again = plain_gram([p])
    again.diagonal().sub_(1.0)
    if float(torch.linalg.vector_norm(again)) > NEAR * n**0.5:
        return None
    return p.addmm_(p.clone(), again, alpha=-0.5)


def _corrected(root: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """The inverse square root of g nearer than rounding of its eigenvectors left it; both float32 and symmetric.

    One step of Newton's iteration. What is missing to root g root = I is a few times the rounding of such products.
    """
    off = _short_sums(root, _short_sums(g, root))
    off.diagonal().sub_(1.0)
    return root.addmm(root, off, alpha=-0.5)


def _short_sums(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A B by sums of 64 products that are then added: a little less rounding for a little more time."""
    total = a[:, :64] @ b[:64]
    for k in range(64, a.shape[1], 64):
        total.addmm_(a[:, k : k + 64], b[k : k + 64])
    return total


def _weak(
    x: torch.Tensor, weak: torch.Tensor, strong: torch.Tensor, lengths: torch.Tensor, floor: float
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Factors of the part of U V^T in the weak directions; None if a singular value there is at most `floor`.

    What rounding has mixed into them of the strong ones, as large as they are in X v, is subtracted first.
    """
    import torch

    wide, v = x.to(torch.float64), weak.to(torch.float64)
    image = wide.mT @ (wide @ v)
    own = (v * image).sum(0)
    mixed = (strong.to(torch.float64).mT @ image) / (lengths.to(torch.float64)[:, None] - own)
    v = v - strong.to(torch.float64) @ mixed
    v = torch.linalg.solve_triangular(torch.linalg.cholesky(v.mT @ v, upper=True), v, upper=True, left=False)
    y = wide @ v
    squares, turn = torch.linalg.eigh(y.mT @ y)
    sigma = squares.clamp_min(0.0).sqrt()
    if not float(sigma[0]) > floor:
        return None
    return (y @ (turn / sigma)).to(x.dtype), (v @ turn).to(x.dtype).mT
