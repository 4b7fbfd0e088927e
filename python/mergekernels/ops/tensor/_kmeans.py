"""k-means of many modules and starts side by side, by inner products of the points.

With S_c the sum of a cluster's points and n_c their number, |z - S_c / n_c|^2 = |z|^2 - 2 <z, S_c> / n_c + <S_c, S_c> /
n_c^2: the inner products <z_i, S_c>, (clusters, points), are all that a step needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["Gram", "State", "Vectors", "lloyd", "polish", "seeds", "words_of"]

_PURPOSE = 10
"""Purpose of the Philox words of k-means++ starts."""

_GAIN = 1e-12
"""Least fall of the inertia, relative to the sum of squares, that counts as one."""


class Gram:
    """Points of N modules by their inner products, (N, R, R)."""

    def __init__(self, gram: torch.Tensor) -> None:
        self.gram, self.own = gram, gram.diagonal(dim1=-2, dim2=-1)

    def near(self, index: torch.Tensor) -> torch.Tensor:
        """Inner products of some points, (N, j), with all, (N, j, R)."""
        import torch

        found: torch.Tensor = self.gram[torch.arange(len(self.gram), device=index.device)[:, None], index]
        return found

    def sums(self, member: torch.Tensor) -> torch.Tensor:
        """Inner products of weighted sums of points, (N, j, R), with all points, (N, j, R)."""
        return member @ self.gram


class Vectors:
    """Points of N modules themselves, (N, R, d): 4 k d operations a step and point instead of 2 k R."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x, self.own = x, x.square().sum(-1)

    def near(self, index: torch.Tensor) -> torch.Tensor:
        """As `Gram.near`."""
        import torch

        rows: torch.Tensor = self.x[torch.arange(len(self.x), device=index.device)[:, None], index]
        return rows @ self.x.mT

    def sums(self, member: torch.Tensor) -> torch.Tensor:
        """As `Gram.sums`."""
        return (member @ self.x) @ self.x.mT


@dataclass
class State:
    """s starts of N modules. labels, signs : (N, s, R). inertia : (N, s). done : whether no label changed in the last
    step, (N, s). steps : (N, s). history : the inertia of every step, (N, s, steps); of a start, its own steps count.
    """

    labels: torch.Tensor
    signs: torch.Tensor
    inertia: torch.Tensor
    done: torch.Tensor
    steps: torch.Tensor
    history: torch.Tensor

    @staticmethod
    def beside(parts: list[State]) -> State:
        """Starts of several runs as one."""
        import torch

        longest = max(p.history.shape[-1] for p in parts)
        histories = [torch.nn.functional.pad(p.history, (0, longest - p.history.shape[-1])) for p in parts]
        fields = ("labels", "signs", "inertia", "done", "steps")
        joined = {name: torch.cat([getattr(p, name) for p in parts], 1) for name in fields}
        return State(history=torch.cat(histories, 1), **joined)

    def of(self, starts: torch.Tensor) -> State:
        """Of each module the starts (N, s') listed."""
        import torch

        rows = torch.arange(len(starts), device=starts.device)[:, None]
        fields = (self.labels, self.signs, self.inertia, self.done, self.steps, self.history)
        return State(*(x[rows, starts] for x in fields))


def words_of(k: int, numbers: range, seed: int) -> torch.Tensor:
    """Uniform numbers in [0, 1) for the k-means++ of each start, (s, 1 + (k - 1) trials)."""
    import torch

    from ..._backends.reference.common import philox

    width = 1 + (k - 1) * _trials(k)
    counter = torch.arange(numbers[0] * width, (numbers[-1] + 1) * width)
    return philox(seed, 0, _PURPOSE, counter).reshape(len(numbers), width).to(torch.float64) * 2.0**-32


def _trials(k: int) -> int:
    """Candidates of which each further centre is the best: scikit-learn's number."""
    return 2 + int(log(k))


def seeds(space: Gram | Vectors, k: int, words: torch.Tensor, adaptive: bool) -> torch.Tensor:
    """Greedy k-means++, (N, s, k): candidates are drawn with probability proportional to the squared distance to the
    nearest centre so far, and the one that leaves the least sum of these is taken.
    """
    import torch

    own, trials = space.own, _trials(k)
    count, size, starts = len(own), own.shape[-1], len(words)
    words = words.to(own.device).expand(count, *words.shape)

    def distances(index: torch.Tensor) -> torch.Tensor:
        inner = space.near(index.flatten(1)).reshape(*index.shape, size)
        mine = own.gather(1, index.flatten(1)).reshape(index.shape)[..., None]
        found = own.reshape(count, *(1,) * (index.ndim - 1), size) + mine - 2.0 * (inner.abs() if adaptive else inner)
        return found.clamp_min(0.0).scatter(-1, index[..., None], 0.0)

    last = (words[..., 0] * size).long().clamp_max(size - 1)
    chosen, nearest = [last], distances(last)
    taken = torch.zeros((count, starts, size), dtype=torch.bool, device=own.device)
    for j in range(1, k):
        taken = taken.scatter(-1, last[..., None], True)
        total = nearest.cumsum(-1)
        target = words[..., 1 + (j - 1) * trials : 1 + j * trials] * total[..., -1:]
        drawn = torch.searchsorted(total, target.contiguous(), right=True).clamp_max(size - 1)
        reached = torch.minimum(nearest[..., None, :], distances(drawn))
        best = reached.sum(-1).argmin(-1, keepdim=True)
        last = drawn.gather(-1, best)[..., 0]
        nearest = reached.gather(2, best[..., None].expand(count, starts, 1, size))[:, :, 0]
        again = taken.gather(-1, last[..., None])
        if bool(again.any()):  # all points are centres, or equal to one: any that is not chosen will do
            free = (~taken).to(torch.int8).argmax(-1, keepdim=True)
            last = torch.where(again, free, last[..., None])[..., 0]
            nearest = torch.minimum(nearest, distances(last))
        chosen.append(last)
    return torch.stack(chosen, -1)


def lloyd(space: Gram | Vectors, centres: torch.Tensor, max_iter: int, adaptive: bool) -> State:
    """Steps from points as centres, (N, s, k), until no label changes."""
    sums = space.near(centres.flatten(1)).reshape(*centres.shape, -1)
    square = space.own.gather(1, centres.flatten(1)).reshape(centres.shape)
    return _steps(space, sums, square, square.new_ones(square.shape), max_iter, adaptive)


def _steps(
    space: Gram | Vectors,
    sums: torch.Tensor,
    square: torch.Tensor,
    counts: torch.Tensor,
    max_iter: int,
    adaptive: bool,
) -> State:
    import torch

    own = space.own[:, None, None, :]
    total, k = space.own.sum(-1)[:, None], sums.shape[-2]
    each = torch.arange(k, device=sums.device)[:, None]
    shape = (*sums.shape[:2], sums.shape[-1])
    labels = torch.full(shape, -1, dtype=torch.int64, device=sums.device)
    signs = torch.ones(shape, dtype=sums.dtype, device=sums.device)
    done = torch.zeros(shape[:2], dtype=torch.bool, device=sums.device)
    steps = torch.zeros(shape[:2], dtype=torch.int64, device=sums.device)
    history: list[torch.Tensor] = []
    inertia = sums.new_zeros(shape[:2])
    for _ in range(max_iter):
        near = sums / counts[..., None]
        distance = (square / counts.square())[..., None] - 2.0 * (near.abs() if adaptive else near)
        fresh = _first_least(distance)
        turned = signs
        if adaptive:
            turned = torch.where(near.gather(2, fresh[:, :, None])[:, :, 0] < 0, -1.0, 1.0).to(sums.dtype)
        member = fresh[:, :, None] == each
        counts = member.sum(-1).to(sums.dtype)
        if bool((counts == 0).any()):
            _fill(fresh, counts, distance + own)
            member = fresh[:, :, None] == each
        steps = steps + ~done
        done = (fresh == labels).all(-1) & (turned == signs).all(-1)
        labels, signs = fresh, turned
        weights = member.to(sums.dtype)
        weights = weights * signs[:, :, None] if adaptive else weights
        sums = space.sums(weights.flatten(1, 2)).reshape(sums.shape)
        square = (sums * weights).sum(-1)
        inertia = (total - (square / counts).sum(-1)).clamp_min(0.0)
        history.append(inertia)
        if bool(done.all()):
            break
    return State(labels, signs, inertia, done, steps, torch.stack(history, -1))


def _first_least(distance: torch.Tensor) -> torch.Tensor:
    """Position of the least value along the last axis but one, the first of equal ones."""
    import torch

    k = distance.shape[-2]
    kind = torch.uint8 if k < 256 else torch.int32
    falling = torch.arange(k, 0, -1, device=distance.device).to(kind)[:, None]
    least = distance.amin(-2, keepdim=True)
    return k - ((distance == least) * falling).amax(-2).to(torch.int64)


def _fill(labels: torch.Tensor, counts: torch.Tensor, distance: torch.Tensor) -> None:
    """Gives each empty cluster the point that is farthest from its centre, of a cluster with several members."""
    for n, s, c in (counts == 0).nonzero().tolist():
        mine = distance[n, s].gather(0, labels[n, s][None])[0].clone()
        mine[counts[n, s][labels[n, s]] <= 1] = -1.0
        point = int(mine.argmax())
        counts[n, s, labels[n, s, point]] -= 1
        counts[n, s, c] += 1
        labels[n, s, point] = c


def polish(
    space: Gram | Vectors, state: State, k: int, max_moves: int, adaptive: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(labels, signs, inertia) after moves of single points, the best of each start at a time, while the inertia falls.

    Leaving cluster a saves n_a / (n_a - 1) d_a^2 and entering b costs n_b / (n_b + 1) d_b^2, so that what steps leave
    alone may still move (Hartigan and Wong 1979). Steps follow; signs may change in them.
    """
    import torch

    own = space.own
    labels, signs = state.labels.clone(), state.signs.clone()
    member = labels[:, :, None] == torch.arange(k, device=own.device)[:, None]
    counts = member.sum(-1).to(own.dtype)
    weights = member.to(own.dtype) * signs[:, :, None]
    sums = space.sums(weights.flatten(1, 2)).reshape(weights.shape)
    square = (sums * weights).sum(-1)
    least = _GAIN * own.sum(-1)[:, None]
    rows = torch.arange(len(own), device=own.device)[:, None]
    columns = torch.arange(labels.shape[1], device=own.device)[None]
    moved = torch.zeros_like(state.done)
    for _ in range(max_moves):
        near = sums / counts[..., None]
        distance = own[:, None, None] + (square / counts.square())[..., None]
        distance = (distance - 2.0 * (near.abs() if adaptive else near)).clamp_min(0.0)
        here = labels[:, :, None]
        held = counts.gather(-1, labels)
        saved = distance.gather(2, here)[:, :, 0] * torch.where(held > 1, held / (held - 1.0), torch.zeros_like(held))
        cost = (distance * (counts / (counts + 1.0))[..., None]).scatter(2, here, float("inf"))
        change = cost.amin(2) - saved
        gain, point = change.min(-1)
        active = (gain < -least) & state.done
        if not bool(active.any()):
            break
        moved |= active
        target = cost[rows, columns, :, point].argmin(-1)
        source = labels[rows, columns, point]
        inner = space.near(point)  # with all points, (N, s, R)
        before = signs[rows, columns, point]
        after = before
        if adaptive:
            after = torch.where(sums[rows, columns, target, point] < 0, -1.0, 1.0).to(before)
        size = own.gather(1, point)
        step = active.to(own.dtype)
        for cluster, sign, way in ((source, before, -1.0), (target, after, 1.0)):
            weight = way * sign * step
            square[rows, columns, cluster] += 2.0 * weight * sums[rows, columns, cluster, point] + step * size
            sums[rows, columns, cluster] += weight[..., None] * inner
            counts[rows, columns, cluster] += way * step
        labels[rows, columns, point] = torch.where(active, target, source)
        signs[rows, columns, point] = torch.where(active, after, before)
    if not bool(moved.any()):
        return state.labels, state.signs, state.inertia
    found = _steps(space, sums, square, counts, max_moves, adaptive)
    better = (found.inertia < state.inertia) & moved
    labels, signs = (
        torch.where(better[..., None], x, y) for x, y in ((found.labels, state.labels), (found.signs, state.signs))
    )
    return labels, signs, torch.where(better, found.inertia, state.inertia)
