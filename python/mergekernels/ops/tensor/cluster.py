"""`cluster`: k-means of rank-1 units by their Gram matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import ArgumentError, DataError
from ..arguments import check_integer
from ..spectral.batching import in_single_threads, in_threads
from ..spectral.sharded import check_matrix

if TYPE_CHECKING:
    import torch

__all__ = ["Clusters", "cluster", "cluster_gram"]

_PURPOSE = 10
"""Purpose of the Philox words of k-means++ starts."""

_GRAM_ROWS = 8192
"""Points above which no Gram is formed."""

_BYTES = 64 << 20
"""Bytes of one (starts, points, clusters) array."""


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
    """k-means with k-means++ starts in float64, on the Gram of the points or, where that would be larger, on them.

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
    spaces: list[_Gram | _Vectors] = []
    for i, x in enumerate(items):
        what = "points" if single else f"points[{i}]"
        if not isinstance(x, torch.Tensor) or x.ndim != 2:
            raise ArgumentError("points are not a matrix", code="cluster.points", tensor=what, expected="(R, d)")
        wide = check_matrix(x if x.is_floating_point() else x.to(torch.float64), what)
        assert isinstance(wide, torch.Tensor)
        wide = wide.to(torch.float64)
        if sign == "none" and len(wide):
            wide = wide - wide.mean(0)  # distances stay, and no digits are lost to a common offset
        large = len(wide) > min(_GRAM_ROWS, 2 * wide.shape[1])
        spaces.append(_Vectors(wide) if large else _Gram(wide @ wide.mT))
    found = _clusters(spaces, k, n_starts, max_iter, seed, sign)
    return found[0] if single else found


def cluster_gram(
    grams: list[torch.Tensor], k: int, *, n_starts: int = 10, max_iter: int = 100, seed: int = 0, sign: str = "none"
) -> list[Clusters]:
    """`cluster` of points of which only the inner products are known: (R, R) float64 matrices, one per module."""
    import torch

    for i, gram in enumerate(grams):
        if not bool(torch.isfinite(gram).all()):
            raise DataError("the points hold NaN or Inf", code="data.nonfinite", tensor=f"points[{i}]")
    return _clusters([_Gram(gram) for gram in grams], k, n_starts, max_iter, seed, sign)


class _Gram:
    """Points by their inner products."""

    def __init__(self, gram: torch.Tensor) -> None:
        self.gram, self.own = gram, gram.diagonal()

    def near(self, index: torch.Tensor) -> torch.Tensor:
        """Inner products of some points with all, (..., R)."""
        return self.gram[index]

    def means(self, member: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(s, R, k), (s, k) -> inner products of the means with all points (s, k, R), and with themselves (s, k)."""
        near = (member.mT @ self.gram) / counts[..., None]
        return near, (near.mT * member).sum(1) / counts


class _Vectors:
    """Points themselves: 4 k d operations a step and point instead of 2 k R."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x, self.own = x, x.square().sum(1)

    def near(self, index: torch.Tensor) -> torch.Tensor:
        """As `_Gram.near`."""
        return self.x[index] @ self.x.mT

    def means(self, member: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `_Gram.means`."""
        centres = (member.mT @ self.x) / counts[..., None]
        return centres @ self.x.mT, centres.square().sum(-1)


def _clusters(
    spaces: Sequence[_Gram | _Vectors], k: int, n_starts: int, max_iter: int, seed: int, sign: str
) -> list[Clusters]:
    """The clusters of every module."""
    n_starts = check_integer(n_starts, 1, 1 << 16, "n_starts")
    max_iter = check_integer(max_iter, 1, 1 << 31, "max_iter")
    seed = check_integer(seed, 0, 1 << 63, "seed")
    k = check_integer(k, 1, 1 << 31, "k")
    if sign not in ("none", "adaptive"):
        raise ArgumentError("sign is not usable", code="cluster.sign", expected="none, adaptive", got=repr(sign))
    for i, space in enumerate(spaces):
        if k > len(space.own):
            raise ArgumentError(
                "more clusters than points",
                code="cluster.k",
                tensor=f"points[{i}]",
                expected=f"1 to {len(space.own)}",
                got=str(k),
            )

    def best(item: tuple[int, _Gram | _Vectors]) -> Clusters:
        module, space = item
        together = max(1, _BYTES // (8 * len(space.own) * k))
        found: Clusters | None = None
        for first in range(0, n_starts, together):
            starts = range(first, min(first + together, n_starts))
            again = _best(space, k, starts, max_iter, seed, module, sign == "adaptive")
            if found is None or again.inertia < found.inertia:
                found = again
        assert found is not None
        return found

    small = all(space.own.device.type == "cpu" and len(space.own) <= 1024 for space in spaces)
    return (in_single_threads if small else in_threads)(list(enumerate(spaces)), best)


def _best(
    space: _Gram | _Vectors, k: int, numbers: range, max_iter: int, seed: int, module: int, adaptive: bool
) -> Clusters:
    """The best of some starts, which run side by side."""
    import torch

    own, starts, size = space.own, len(numbers), len(space.own)
    centres = _seeds(space, k, numbers, seed, module, adaptive)
    labels = torch.zeros((starts, size), dtype=torch.int64, device=own.device)
    signs = torch.ones((starts, size), dtype=own.dtype, device=own.device)
    near = space.near(centres)  # (s, k, R): inner products with the centres
    square = own[centres]
    histories: list[list[float]] = [[] for _ in range(starts)]
    done = torch.zeros(starts, dtype=torch.bool, device=own.device)
    steps = [0] * starts
    first = True
    for _ in range(max_iter):
        distance = own + square[..., None] - 2.0 * (near.abs() if adaptive else near)
        fresh = distance.argmin(1)
        flips = near.gather(1, fresh[:, None])[:, 0]
        turned = torch.where(flips < 0, -1.0, 1.0).to(own.dtype) if adaptive else signs
        member = torch.nn.functional.one_hot(fresh, k).to(own.dtype)
        fresh, member = _filled(fresh, member, distance, k)
        same = torch.zeros_like(done) if first else (fresh == labels).all(1) & (turned == signs).all(1)
        first = False
        labels, signs = torch.where(done[:, None], labels, fresh), torch.where(done[:, None], signs, turned)
        member = torch.nn.functional.one_hot(labels, k).to(own.dtype) * signs[..., None]
        counts = member.abs().sum(1)
        near, square = space.means(member, counts)
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
        labels[best],
        signs[best],
        histories[best][-1],
        tuple(histories[best]),
        tuple(sizes),
        numbers[best],
        steps[best],
        bool(done[best]),
    )


def _seeds(space: _Gram | _Vectors, k: int, numbers: range, seed: int, module: int, adaptive: bool) -> torch.Tensor:
    """k-means++: each centre is drawn with probability proportional to the squared distance to the nearest so far."""
    import torch

    from ..._backends.reference.common import philox

    own, starts, size = space.own, len(numbers), len(space.own)
    counter = torch.arange(numbers[0] * k, (numbers[-1] + 1) * k)
    words = philox(seed, module, _PURPOSE, counter).reshape(starts, k).to(torch.float64) * 2.0**-32
    words = words.to(own.device)
    chosen = (words[:, 0] * size).long().clamp_max(size - 1)[:, None]
    nearest = torch.full((starts, size), float("inf"), dtype=own.dtype, device=own.device)
    for j in range(1, k + 1):
        last = chosen[:, -1]
        inner = space.near(last)
        distance = own + own[last][:, None] - 2.0 * (inner.abs() if adaptive else inner)
        nearest = torch.minimum(nearest, distance.clamp_min(0.0)).scatter(1, last[:, None], 0.0)
        if j == k:
            return chosen
        total = nearest.cumsum(1)
        target = words[:, j : j + 1] * total[:, -1:]
        found = torch.searchsorted(total, target, right=True).clamp_max(size - 1)
        # All points are centres already, or equal to one: any that is not chosen will do.
        taken = torch.zeros((starts, size), dtype=torch.bool, device=own.device).scatter(1, chosen, True)
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
