"""Where alternating least squares begins: (c, u, v) of each start, in the coordinates of the cores."""

from __future__ import annotations

from math import pi
from typing import TYPE_CHECKING

from ..._backends import cuda_small

if TYPE_CHECKING:
    import torch

    from ._sweeps import Batch

__all__ = ["gaussian", "gevd", "hosvd", "random_start"]

_PURPOSE = 9
"""Purpose of the Philox words of starts; the kernels' own are below 8."""

_EXACT = 512
"""Size up to which leading eigenvectors come from all of them."""


def gaussian(shape: tuple[int, ...], seed: int, module: int, start: int, mode: int) -> torch.Tensor:
    """Standard normal numbers in float64 that depend on these five alone (Box-Muller on Philox words)."""
    import torch

    from ..._backends.reference.common import philox_run

    count = 1
    for size in shape:
        count *= size
    pairs = -(-count // 2)
    words = philox_run(seed, module, 16 * (4 * start + mode) + _PURPOSE, 2 * pairs).to(torch.float64)
    first, second = (words[:pairs] + 1.0) * 2.0**-32, words[pairs:] * 2.0**-32
    radius = (-2.0 * first.log()).sqrt()
    flat = torch.cat([radius * (2.0 * pi * second).cos(), radius * (2.0 * pi * second).sin()])
    return flat[:count].reshape(shape)


def _leading(x: torch.Tensor, y: torch.Tensor, count: int, batch: Batch, seed: int) -> torch.Tensor:
    """Eigenvectors of the `count` largest eigenvalues of S = X blkdiag(y_t^T y_t) X^T, (N, p, count).

    A start needs them roughly: of a large S they come from rounds of S on a few more vectors than asked for.
    """
    import torch

    p = x.shape[-2]
    count = min(count, p)
    half = batch.tasks.within(x, y)
    if p <= max(_EXACT, 4 * count):
        return _eigenvectors(half @ x.mT)[..., :count]
    basis: torch.Tensor = gaussian((p, count + 8), seed, 0, 0, 3).to(x)
    for _ in range(3):
        basis = torch.linalg.qr(half @ (x.mT @ basis))[0]
    image = half @ (x.mT @ basis)
    return basis @ _eigenvectors(basis.mT @ image)[..., :count]


def _eigenvectors(g: torch.Tensor) -> torch.Tensor:
    """Of symmetric matrices (N, s, s), those of large values first; on an NVIDIA GPU small ones all at once."""
    import torch

    if g.is_cuda and cuda_small.why_not(g.device) is None and cuda_small.fits(g.shape[-1], g.shape[-1], _number(g)):
        return torch.stack([vectors for vectors, _, _ in cuda_small.small_eigh_batch(list(g))])
    found: torch.Tensor = torch.linalg.eigh(g)[1]
    return found.flip(-1)


def _number(x: torch.Tensor) -> int:
    return 0 if x.device.index is None else int(x.device.index)


def _bases(batch: Batch, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Leading eigenvectors of sum_t D_t D_t^T and of sum_t D_t^T D_t, at most `count` of each; kept."""
    if (count, seed) not in batch.bases:
        pair = _leading(batch.b, batch.a, count, batch, seed), _leading(batch.a, batch.b, count, batch, seed)
        batch.bases[count, seed] = pair
    return batch.bases[count, seed]


def _filled(u: torch.Tensor, count: int, seed: int, modules: list[int], start: int, mode: int) -> torch.Tensor:
    """U (N, p, k) with seeded Gaussian columns up to `count`."""
    import torch

    p, k = u.shape[1:]
    if k >= count:
        return u
    more = [gaussian((p, count - k), seed, module, start, mode) for module in modules]
    return torch.cat([u, torch.stack(more).to(u)], -1)


def hosvd(batch: Batch, rank: int, seed: int, modules: list[int], start: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(u, v): leading eigenvectors of both sides; missing columns are random."""
    u, v = _bases(batch, rank, seed)
    return _filled(u, rank, seed, modules, start, 1), _filled(v, rank, seed, modules, start, 2)


def random_start(
    batch: Batch, rank: int, seed: int, modules: list[int], start: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(u, v): Gaussian columns."""
    empty_u, empty_v = batch.b[..., :0], batch.a[..., :0]
    return _filled(empty_u, rank, seed, modules, start, 1), _filled(empty_v, rank, seed, modules, start, 2)


def gevd(batch: Batch, rank: int, seed: int, modules: list[int], start: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(u, v) from the eigenvectors of two mixtures of the slices, compressed to rank x rank.

    An exact stack of that rank is recovered. Where a mixture is singular, or there are fewer rows than components, the
    start is random.
    """
    import torch

    u, v = random_start(batch, rank, seed, modules, start)
    if rank > min(batch.b.shape[1], batch.a.shape[1]):
        return u, v
    left, right = _bases(batch, rank, seed)
    b, a = left.mT @ batch.b, right.mT @ batch.a
    mixtures = torch.stack([gaussian((2, len(batch.tasks)), seed, module, start, 0) for module in modules]).to(b)
    one, two = ((b * batch.tasks.spread(mixtures[:, k, None])) @ a.mT for k in (0, 1))
    sound = torch.linalg.cond(two) < 1e8
    if not bool(sound.any()):
        return u, v
    eye = torch.eye(rank, dtype=b.dtype, device=b.device)
    safe = torch.where(sound[:, None, None], two, eye)
    # Small and unsymmetric: LAPACK's, wherever the batch is.
    values, vectors = torch.linalg.eig(torch.linalg.solve(safe, one, left=False).cpu())
    w = _real(values, vectors).to(b.device)
    sound = sound & (torch.linalg.cond(w) < 1e8)
    w = torch.where(sound[:, None, None], w, eye)
    z = torch.linalg.solve(w, safe).mT
    z = z / torch.linalg.vector_norm(z, dim=-2, keepdim=True).clamp_min(1e-300)
    chosen = sound[:, None, None]
    return torch.where(chosen, left @ w, u), torch.where(chosen, right @ z, v)


def _real(values: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """Real columns that span what the eigenvectors span: of a complex pair the real and the imaginary part."""
    import torch

    return torch.where((values.imag < 0)[..., None, :], vectors.imag, vectors.real)
