"""`cluster`: k-means of rank-1 units by their Gram matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ...errors import ArgumentError, DataError
from ..arguments import check_integer
from ..spectral.batching import groups, in_single_threads, in_threads
from ..spectral.sharded import check_matrix
from ._kmeans import Gram, State, Vectors, lloyd, polish, seeds, words_of

if TYPE_CHECKING:
    import torch

__all__ = ["Clusters", "cluster", "cluster_gram"]

_GRAM_ROWS = 8192
"""Points above which no Gram is formed."""

_MOVED_ROWS = 8192
"""Points above which no single one is moved."""

_BYTES = 64 << 20
"""Bytes of one (starts, points, clusters) array."""

_TOGETHER = 4 << 20
"""Bytes of one (modules, starts, points, clusters) array."""

_POLISHED = (2, 16)
"""Least and largest number of the best starts that go on with moves of single points."""

_POLISHED_CELLS = 4096
"""Points times clusters of all of them, in between."""


@dataclass(frozen=True)
class Clusters:
    """labels : cluster of each point, (R,), int64, numbered in an order that only the points decide.

    signs : (R,), 1 or -1, by which a point enters its cluster. inertia : sum of squared distances of the points to
    their centroids, with their signs. history : the inertia after every step of the best start, and after the moves of
    single points. sizes : members per cluster, none of them 0. start : number of the best start. steps : that it took.
    converged : whether no label changed in the last.
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
    """k-means in float64, on the Gram of the points or, where that would be larger, on them.

    Greedy k-means++ starts, Lloyd's steps; of at most 8192 points the two best starts (of few points, more of them)
    then move single points between clusters while the inertia falls. Modules of one size and all starts run side by
    side.

    points : (R, d), or a list of such matrices, one per module. k : clusters, 1 to R. n_starts : the start of least
    inertia wins, the first of equal ones. max_iter : steps, 1 or more. seed : of the starts. sign : "none"; "adaptive"
    takes z and -z for the same point and chooses the sign that is nearer to the centroid.
    Returns Clusters, or a list of them. The same labels for the same Gram, whatever the device, the order of the points
    and the other modules.
    Errors: ArgumentError; DataError for NaN or Inf.
    Source: Lloyd 1982; Arthur and Vassilvitskii 2007; Hartigan and Wong 1979.
    """
    import torch

    single = isinstance(points, torch.Tensor)
    items = [points] if single else list(points)
    spaces: list[Gram | Vectors] = []
    for i, x in enumerate(items):
        what = "points" if single else f"points[{i}]"
        if not isinstance(x, torch.Tensor) or x.ndim != 2:
            raise ArgumentError("points are not a matrix", code="cluster.points", tensor=what, expected="(R, d)")
        wide = check_matrix(x if x.is_floating_point() else x.to(torch.float64), what)
        assert isinstance(wide, torch.Tensor)
        # About their mean, distances stay and no digits are lost to a common offset.
        spaces.append(_space(wide, centred=sign == "none" and len(wide) > 0))
    found = _clusters(spaces, k, n_starts, max_iter, seed, sign)
    return found[0] if single else found


def _space(x: torch.Tensor, centred: bool) -> Gram | Vectors:
    """Points in float64, by their Gram or, where that would be larger, themselves; `centred` about their mean."""
    import torch

    if len(x) > min(_GRAM_ROWS, 2 * x.shape[1]):
        wide = x.to(torch.float64)
        return Vectors((wide - wide.mean(0) if centred else wide)[None])
    gram = torch.zeros((len(x), len(x)), dtype=torch.float64, device=x.device)
    for columns in torch.split(x, 512, 1):  # small enough to stay in a cache
        wide = columns.to(torch.float64)
        if centred:
            wide = wide - wide.mean(0)
        gram.addmm_(wide, wide.mT)
    return Gram(gram[None])


def cluster_gram(
    grams: list[torch.Tensor], k: int, *, n_starts: int = 10, max_iter: int = 100, seed: int = 0, sign: str = "none"
) -> list[Clusters]:
    """`cluster` of points of which only the inner products are known: (R, R) float64 matrices, one per module."""
    import torch

    for i, gram in enumerate(grams):
        if not bool(torch.isfinite(gram).all()):
            raise DataError("the points hold NaN or Inf", code="data.nonfinite", tensor=f"points[{i}]")
    return _clusters([Gram(gram[None]) for gram in grams], k, n_starts, max_iter, seed, sign)


def _clusters(
    spaces: Sequence[Gram | Vectors], k: int, n_starts: int, max_iter: int, seed: int, sign: str
) -> list[Clusters]:
    """The clusters of every module."""
    n_starts = check_integer(n_starts, 1, 1 << 16, "n_starts")
    max_iter = check_integer(max_iter, 1, 1 << 31, "max_iter")
    seed = check_integer(seed, 0, 1 << 63, "seed")
    k = check_integer(k, 1, 1 << 31, "k")
    if sign not in ("none", "adaptive"):
        raise ArgumentError("sign is not usable", code="cluster.sign", expected="none, adaptive", got=repr(sign))
    for i, space in enumerate(spaces):
        if k > space.own.shape[1]:
            raise ArgumentError(
                "more clusters than points",
                code="cluster.k",
                tensor=f"points[{i}]",
                expected=f"1 to {space.own.shape[1]}",
                got=str(k),
            )

    found: list[Clusters | None] = [None] * len(spaces)
    work: list[list[int]] = []
    orders = [_own_order(space, sign == "adaptive") for space in spaces]
    spaces = [_ordered(space, order) for space, order in zip(spaces, orders, strict=True)]
    for members in groups([(type(space), space.own.shape[1], space.own.device) for space in spaces]):
        together = max(1, _TOGETHER // (8 * n_starts * k * spaces[members[0]].own.shape[1]))
        work += [members[i : i + together] for i in range(0, len(members), together)]

    def best(chunk: list[int]) -> list[Clusters]:
        return _best(_beside([spaces[i] for i in chunk]), k, n_starts, max_iter, seed, sign == "adaptive")

    small = all(space.own.device.type == "cpu" and space.own.shape[1] <= 1024 for space in spaces)
    for chunk, result in zip(work, (in_single_threads if small else in_threads)(work, best), strict=True):
        for i, clusters in zip(chunk, result, strict=True):
            back = orders[i].argsort()
            found[i] = replace(clusters, labels=clusters.labels[back], signs=clusters.signs[back])
    return [c for c in found if c is not None]


def _own_order(space: Gram | Vectors, adaptive: bool) -> torch.Tensor:
    """The points of one module in an order that depends on them alone, so that starts do not depend on the given one.

    By the sum of squares of a point's inner products with all, of many points by one fixed combination of coordinates.
    """
    import torch

    if isinstance(space, Gram):
        gram = space.gram[0]
        if not adaptive:  # of points about their mean
            gram = gram - gram.mean(0) - gram.mean(1, keepdim=True) + gram.mean()
        forms = gram.square().sum(1)
    elif space.x.shape[1] <= _MOVED_ROWS:
        x = space.x[0]
        forms = ((x @ (x.mT @ x)) * x).sum(1)
    else:
        x = space.x[0]
        forms = x @ torch.arange(1.0, x.shape[1] + 1.0).to(x).square().mul_(0.7548776662466927).cos_()
        forms = forms.abs() if adaptive else forms
    return forms.argsort(stable=True)


def _ordered(space: Gram | Vectors, order: torch.Tensor) -> Gram | Vectors:
    """The points of one module in another order."""
    return Gram(space.gram[:, order[:, None], order]) if isinstance(space, Gram) else Vectors(space.x[:, order])


def _beside(spaces: list[Gram | Vectors]) -> Gram | Vectors:
    """Modules of one size as one space."""
    import torch

    first = spaces[0]
    if len(spaces) == 1:
        return first
    if isinstance(first, Gram):
        return Gram(torch.cat([s.gram for s in spaces if isinstance(s, Gram)]))
    return Vectors(torch.cat([s.x for s in spaces if isinstance(s, Vectors)]))


def _best(space: Gram | Vectors, k: int, n_starts: int, max_iter: int, seed: int, adaptive: bool) -> list[Clusters]:
    """The best of all starts of each module: steps from every start, single moves from the best of them."""
    import torch

    together = max(1, _BYTES // (8 * space.own.numel() * k))
    parts = []
    for first in range(0, n_starts, together):
        numbers = range(first, min(first + together, n_starts))
        centres = seeds(space, k, words_of(k, numbers, seed), adaptive)
        parts.append(lloyd(space, centres, max_iter, adaptive))
    state = State.beside(parts)
    low, high = _POLISHED
    count = max(low, min(high, _POLISHED_CELLS // max(1, k * space.own.shape[1])))
    ends = state.inertia.sort(dim=1, stable=True)
    again = ends.values.diff(dim=1, prepend=ends.values.new_full((len(ends.values), 1), -1.0)) <= 1e-12 * ends.values
    different = again.to(torch.int8).argsort(dim=1, stable=True)  # a partition that is there already has no new moves
    kept = ends.indices.gather(1, different)[:, :count].sort(dim=1).values
    state = state.of(kept)
    labels, signs, inertia = state.labels, state.signs, state.inertia
    if space.own.shape[1] <= _MOVED_ROWS:
        labels, signs, inertia = polish(space, state, k, max(max_iter, space.own.shape[1]), adaptive)
    found = []
    for n, best in enumerate(inertia.argmin(1).tolist()):
        steps, final = int(state.steps[n, best]), float(inertia[n, best])
        history = state.history[n, best, :steps].tolist()
        mine = _numbered(labels[n, best], k)
        found.append(
            Clusters(
                mine,
                signs[n, best],
                final,
                tuple(history if final == history[-1] else [*history, final]),
                tuple(torch.bincount(mine, minlength=k).tolist()),
                int(kept[n, best]),
                steps,
                bool(state.done[n, best]),
            )
        )
    return found


def _numbered(labels: torch.Tensor, k: int) -> torch.Tensor:
    """Labels in the order in which clusters appear, so that one partition has one form; no cluster is empty."""
    import torch

    positions = torch.arange(len(labels), device=labels.device)
    first = torch.full((k,), len(labels), device=labels.device).scatter_reduce(0, labels, positions, "amin")
    numbered: torch.Tensor = first.argsort().argsort()[labels]
    return numbered
