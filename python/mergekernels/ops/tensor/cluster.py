"""`cluster`: k-means of rank-1 units by their Gram matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import ArgumentError, DataError
from ..arguments import check_integer
from ..spectral.batching import in_threads

if TYPE_CHECKING:
    import torch

__all__ = ["Clusters", "cluster", "cluster_gram"]

_PURPOSE = 10
"""Purpose of the Philox words of k-means++ starts."""


@dataclass(frozen=True)
class Clusters:
    """labels : cluster of each point, (R,), int64. signs : (R,), 1 or -1, by which a point enters its cluster.

    inertia : sum of squared distances of the points to their centroids, with their signs. history : the inertia after
    every step of the best start. sizes : members per cluster, none of them 0. start : number of the best start.
    steps : that it took. converged : whether no label changed in the last.
    """

    labels: torch.Tensor
    signs: torch.Tensor
    inertia: float
    history: tuple[float, ...]
    sizes: tuple[int, ...]
    start: int
    steps: int
    converged: bool


def cluster(points: Any, k: int, *, n_starts: int = 10, max_iter: int = 100, seed: int = 0, sign: str = "none") -> Any:
    """k-means with k-means++ starts, computed on the float64 Gram of the points.

    points : (R, d), or a list of such matrices, one per module. k : clusters, 1 to R. n_starts : the start of least
    inertia wins, the first of equal ones. max_iter : steps, 1 or more. seed : of the starts. sign : "none"; "adaptive"
    takes z and -z for the same point and chooses the sign that is nearer to the centroid.
    Returns Clusters, or a list of them. The same labels for the same Gram, whatever the device.
    Errors: ArgumentError; DataError for NaN or Inf.
    Source: Lloyd 1982; Arthur and Vassilvitskii 2007.
    """
    import torch

    single = isinstance(points, torch.Tensor)
    items = [points] if single else list(points)
    grams = []
    for i, x in enumerate(items):
        what = "points" if single else f"points[{i}]"
        if not isinstance(x, torch.Tensor) or x.ndim != 2:
            raise ArgumentError("points are not a matrix", code="cluster.points", tensor=what, expected="(R, d)")
        wide = x.to(torch.float64)
        grams.append(wide @ wide.mT)
    found = cluster_gram(grams, k, n_starts=n_starts, max_iter=max_iter, seed=seed, sign=sign)
    return found[0] if single else found


def cluster_gram(
    grams: list[torch.Tensor], k: int, *, n_starts: int = 10, max_iter: int = 100, seed: int = 0, sign: str = "none"
) -> list[Clusters]:
    """`cluster` of points of which only the inner products are known: (R, R) float64 matrices, one per module."""
    import torch

    n_starts = check_integer(n_starts, 1, 1 << 16, "n_starts")
    max_iter = check_integer(max_iter, 1, 1 << 31, "max_iter")
    k = check_integer(k, 1, 1 << 31, "k")
    if sign not in ("none", "adaptive"):
        raise ArgumentError("sign is not usable", code="cluster.sign", expected="none, adaptive", got=repr(sign))
    for i, gram in enumerate(grams):
        if not bool(torch.isfinite(gram).all()):
            raise DataError("the points hold NaN or Inf", code="data.nonfinite", tensor=f"points[{i}]")
        if k > gram.shape[0]:
            raise ArgumentError(
                "more clusters than points", code="cluster.k", tensor=f"points[{i}]",
                expected=f"1 to {gram.shape[0]}", got=str(k),
            )  # fmt: skip
    numbered = list(enumerate(grams))
    return in_threads(numbered, lambda item: _best(item[1], k, n_starts, max_iter, seed, item[0], sign == "adaptive"))


def _best(gram: torch.Tensor, k: int, starts: int, max_iter: int, seed: int, module: int, adaptive: bool) -> Clusters:
    """All starts of one module side by side."""
    import torch

    size = gram.shape[0]
    own = gram.diagonal()
    centres = _seeds(gram, k, starts, seed, module, adaptive)
    labels = torch.zeros((starts, size), dtype=torch.int64, device=gram.device)
    signs = torch.ones((starts, size), dtype=gram.dtype, device=gram.device)
    near = gram[centres]  # (s, k, R): inner products with the centres
    square = own[centres]
    histories: list[list[float]] = [[] for _ in range(starts)]
    done = torch.zeros(starts, dtype=torch.bool, device=gram.device)
    steps = [0] * starts
    for _ in range(max_iter):
        distance = own + square[..., None] - 2.0 * (near.abs() if adaptive else near)
        fresh = distance.argmin(1)
        flips = near.gather(1, fresh[:, None])[:, 0]
        turned = torch.where(flips < 0, -1.0, 1.0).to(gram.dtype) if adaptive else signs
        member = torch.nn.functional.one_hot(fresh, k).to(gram.dtype)
        fresh, member = _filled(fresh, member, distance, k)
        same = (fresh == labels).all(1) & (turned == signs).all(1) & torch.tensor([s > 0 for s in steps])
        labels, signs = torch.where(done[:, None], labels, fresh), torch.where(done[:, None], signs, turned)
        member = torch.nn.functional.one_hot(labels, k).to(gram.dtype) * signs[..., None]
        counts = member.abs().sum(1)
        near = (member.mT @ gram) / counts[..., None]
        square = (near.mT * member).sum(1) / counts
        inertia = (own.sum() - (square * counts).sum(1)).clamp_min(0.0).tolist()
        for s in range(starts):
            if not bool(done[s]):
                histories[s].append(inertia[s])
                steps[s] += 1
        done = done | same
        if bool(done.all()):
            break
    best = min(range(starts), key=lambda s: (histories[s][-1], s))
    sizes = torch.bincount(labels[best], minlength=k).tolist()
    return Clusters(
        labels[best], signs[best], histories[best][-1], tuple(histories[best]), tuple(sizes), best, steps[best],
        bool(done[best]),
    )  # fmt: skip


def _seeds(gram: torch.Tensor, k: int, starts: int, seed: int, module: int, adaptive: bool) -> torch.Tensor:
    """k-means++: each centre is drawn with probability proportional to the squared distance to the nearest so far."""
    import torch

    from ..._backends.reference.common import philox

    size = gram.shape[0]
    own = gram.diagonal()
    words = philox(seed, module, _PURPOSE, torch.arange(starts * k)).reshape(starts, k).to(torch.float64) * 2.0**-32
    words = words.to(gram.device)
    chosen = (words[:, 0] * size).long().clamp_max(size - 1)[:, None]
    nearest = torch.full((starts, size), float("inf"), dtype=gram.dtype, device=gram.device)
    for j in range(1, k + 1):
        last = chosen[:, -1]
        inner = gram[last]
        distance = own + own[last][:, None] - 2.0 * (inner.abs() if adaptive else inner)
        nearest = torch.minimum(nearest, distance.clamp_min(0.0)).scatter(1, last[:, None], 0.0)
        if j == k:
            return chosen
        total = nearest.cumsum(1)
        target = words[:, j : j + 1] * total[:, -1:]
        found = torch.searchsorted(total, target, right=True).clamp_max(size - 1)
        # All points are centres already, or equal to one: any that is not chosen will do.
        taken = torch.zeros((starts, size), dtype=torch.bool, device=gram.device).scatter(1, chosen, True)
        empty = taken.gather(1, found)
        free = (~taken).to(torch.int8).argmax(1, keepdim=True)
        chosen = torch.cat([chosen, torch.where(empty, free, found)], 1)
    return chosen


def _filled(
    labels: torch.Tensor, member: torch.Tensor, distance: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gives each empty cluster the point that is farthest from its centre, of a cluster with several members."""
    counts = member.sum(1)
    for s, c in (counts == 0).nonzero().tolist():
        mine = distance[s].gather(0, labels[s][None])[0].clone()
        mine[counts[s][labels[s]] <= 1] = -1.0
        point = int(mine.argmax())
        counts[s, labels[s, point]] -= 1
        counts[s, c] += 1
        labels[s, point] = c
    return labels, member
