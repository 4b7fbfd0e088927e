"""Host side of `select`: from a rank to the exact point (tau, word, index), in as few sweeps as possible.

A selection of the k largest keys of a model runs: a *sample* of the elements gives an interval of keys that should
hold the k-th; one *sweep* counts what is ahead of the interval and collects what is inside; where the rank falls
outside, or the interval holds more entries than are kept, the interval is moved or narrowed and swept again. Ties at
the threshold are cut in the same way over Philox words or indices. The result never depends on the sample, on the
capacity or on the cut into pieces.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, floor, sqrt
from typing import TYPE_CHECKING, Literal

from .keep import MAX_KEY, Keep
from .program import Balance, Table
from .sweeps import Interval, Key, Sweep, bin_shift

if TYPE_CHECKING:
    from .._cpu import SweepStats

__all__ = ["SAMPLE_BLOCK", "Scope", "Search", "Selection", "localise"]

SAMPLE_BLOCK = 256
"""Consecutive elements in one block of a sample."""

_SMALL = 1 << 17
_MIN_SAMPLE, _MAX_SAMPLE = 1 << 14, 1 << 16
_WORD_MAX = 2**32 - 1


@dataclass(frozen=True)
class Scope:
    """The tensors over which a selection ranks, in name order: scope index = offset of the tensor + flat index.

    offsets, tensor_ids : one entry per tensor. n : elements in all. compute : name of the compute dtype.
    """

    offsets: tuple[int, ...]
    tensor_ids: tuple[int, ...]
    n: int
    compute: Literal["F32", "F64"]


@dataclass(frozen=True)
class Search:
    """What is known about one point. model : whose entries are ranked. rank counts from 1 within the current stage.
    counts : see `Selection.counted`.
    """

    k: int
    stage: Literal["key", "tie", "done"]
    lo: int
    hi: int
    rank: int
    tau: int = 0
    keep: Keep | None = None
    model: int = 0
    counts: bool = False


@dataclass(frozen=True)
class Selection:
    """The state of a selection between two sweeps. Immutable; `advance` gives the next state.

    searches : the points that are looked for, several for one model if need be; None for one that needs no data.
    policy : "hash", "index" or "all". sample : fraction of the elements that the next sweep visits, 1.0 for all.
    key, rows, balance, draws : what is ranked, see `Sweep`.
    """

    searches: tuple[Search | None, ...]
    policy: Literal["hash", "index", "all"]
    scope: Scope
    seed: int
    base: bool
    sample: float = 1.0
    key: Key = "delta"
    rows: Table | None = None
    balance: tuple[Balance, ...] = ()
    draws: tuple[int, ...] = ()

    @staticmethod
    def start(
        ks: tuple[int | None, ...],
        scope: Scope,
        *,
        policy: Literal["hash", "index", "all"],
        seed: int,
        base: bool,
    ) -> Selection:
        """Begin the selection of the ks[t] largest |delta| of each model t (1 <= k <= n), None leaves a model alone."""
        ranks = tuple(None if k is None else (m, k) for m, k in enumerate(ks))
        return Selection.of(ranks, scope, policy=policy, seed=seed, base=base)

    @staticmethod
    def of(
        ranks: tuple[tuple[int, int] | None, ...],
        scope: Scope,
        *,
        policy: Literal["hash", "index", "all"],
        seed: int,
        base: bool,
        key: Key = "delta",
        rows: Table | None = None,
        balance: tuple[Balance, ...] = (),
        draws: tuple[int, ...] = (),
    ) -> Selection:
        """Begin the search of several points: (model, k) for the k largest keys of a model, 1 <= k <= n."""
        hi = MAX_KEY[scope.compute]
        # A larger sample narrows the interval by its square root only; beyond these sizes it costs more than it saves.
        size = max(min(max(scope.n // 64, _MIN_SAMPLE), _MAX_SAMPLE), scope.n // 512)
        sample = 1.0 if scope.n <= _SMALL else size / scope.n
        return Selection(
            tuple(None if r is None else Search(r[1], "key", 1, hi, r[1], model=r[0]) for r in ranks),
            policy,
            scope,
            seed,
            base,
            sample,
            key,
            rows,
            balance,
            draws,
        )

    @property
    def done(self) -> bool:
        """True when every point is known."""
        return all(s is None or s.stage == "done" for s in self.searches)

    @property
    def points(self) -> tuple[Keep | None, ...]:
        """The points, their index in scope coordinates; see `localise`."""
        return tuple(None if s is None else s.keep for s in self.searches)

    @property
    def sweep(self) -> Sweep:
        """The pass to run next."""
        intervals = tuple(
            None if s is None or s.stage == "done" else Interval(s.stage, s.lo, s.hi, s.tau, s.model)
            for s in self.searches
        )
        order: Literal["hash", "index"] = "index" if self.policy == "index" else "hash"
        return Sweep(intervals, order, self.base, self.seed, self.key, self.rows, self.balance, self.draws)

    def ranked(self, k: int) -> Selection:
        """This selection with another rank for every point whose stage is still its first, 1 <= k <= n."""
        return replace(
            self,
            searches=tuple(s if s is None or s.stage != "key" else replace(s, k=k, rank=k) for s in self.searches),
        )

    def counted(self) -> Selection:
        """This selection with a search before the others that only counts: its `before` and `inside` in the next sweep
        add up to the keys above 0. It is done after that sweep.
        """
        first = self.searches[0]
        assert first is not None
        return replace(self, searches=(replace(first, lo=1, hi=1, counts=True), *self.searches))

    def advance(self, stats: SweepStats, visited: int) -> Selection:
        """The state after the pass `self.sweep`; `visited` is the number of elements it saw (fewer than n in a
        sample).
        """
        searches = list(self.searches)
        for m, search in enumerate(searches):
            if search is None or search.stage == "done":
                continue
            if search.counts:
                searches[m] = replace(search, stage="done")
            elif self.sample < 1.0:
                searches[m] = self._bracket(search, stats, m, visited)
            elif search.stage == "key":
                searches[m] = self._key(search, stats, m)
            else:
                searches[m] = self._tie(search, stats, m)
        return replace(self, searches=tuple(searches), sample=1.0)

    def _bracket(self, s: Search, stats: SweepStats, m: int, visited: int) -> Search:
        """An interval of keys that holds the k-th with near certainty, from the order statistics of the sample."""
        if visited == 0 or stats.overflowed(m):
            return s
        p = s.k / self.scope.n
        centre = p * visited
        # Five standard deviations of the sample rank, and some more because elements of a block are not independent.
        spread = 5.0 * sqrt(max(p * (1.0 - p) * visited, 1.0)) + 4.0
        nonzero = stats.inside(m)
        first, last = floor(centre - spread), ceil(centre + spread)
        if first > nonzero:
            return s  # the threshold is among the zeros, or the sample is odd: one sweep over all keys decides
        found = stats.order_statistics(m, [r for r in (first, last) if 1 <= r <= nonzero])
        lo = found[-1] if last <= nonzero else 1
        hi = found[0] if first >= 1 else MAX_KEY[self.scope.compute]
        return replace(s, lo=lo, hi=hi)

    def _key(self, s: Search, stats: SweepStats, m: int) -> Search:
        before, inside = stats.before(m), stats.inside(m)
        rank = s.k - before
        if rank < 1:  # the k-th is ahead of the interval
            return replace(s, lo=s.hi + 1, hi=MAX_KEY[self.scope.compute])
        if rank > inside:
            if s.lo <= 1:  # everything that is not zero is kept, and zeros add nothing
                return replace(s, stage="done", keep=Keep(0, "none"))
            return replace(s, lo=1, hi=s.lo - 1)
        if not stats.overflowed(m):
            tau = stats.order_statistics(m, [rank])[0]
            ahead, equal = stats.count_ordinal(m, tau)
            quota = rank - ahead
            if self.policy == "all" or quota == equal:
                return replace(s, stage="done", keep=Keep(tau, "all"))
            word, index = self._point(stats, m, quota, tau)
            return replace(s, stage="done", keep=Keep(tau, self.policy, word, index))
        lo, hi, ahead, count = _narrow(stats.histogram(m), s.lo, s.hi, rank, descending=True)
        if lo < hi:
            return replace(s, lo=lo, hi=hi)
        quota = rank - ahead
        if self.policy == "all" or quota == count:
            return replace(s, stage="done", keep=Keep(lo, "all"))
        first, last = self._tie_bracket(quota, count)
        return replace(s, stage="tie", lo=first, hi=last, rank=quota, tau=lo)

    def _tie_bracket(self, quota: int, count: int) -> tuple[int, int]:
        """Where the quota-th smallest of `count` tie ordinals should be: words are uniform, indices are taken whole."""
        if self.policy == "index":
            return 0, self.scope.n - 1
        f = quota / count
        half = 8.0 * sqrt(max(f * (1.0 - f), 1.0 / count) / count) * 2.0**32
        centre = f * 2.0**32
        return max(0, floor(centre - half)), min(_WORD_MAX, ceil(centre + half))

    def _tie(self, s: Search, stats: SweepStats, m: int) -> Search:
        rank = s.rank - stats.before(m)
        top = self.scope.n - 1 if self.policy == "index" else _WORD_MAX
        if rank < 1:
            return replace(s, lo=0, hi=s.lo - 1)
        if rank > stats.inside(m):
            return replace(s, lo=s.hi + 1, hi=top)
        if not stats.overflowed(m):
            word, index = self._point(stats, m, rank, s.tau)
            return replace(s, stage="done", keep=Keep(s.tau, self._ties, word, index))
        lo, hi, _, _ = _narrow(stats.histogram(m), s.lo, s.hi, rank, descending=False)
        return replace(s, lo=lo, hi=hi)

    @property
    def _ties(self) -> Literal["hash", "index"]:
        return "index" if self.policy == "index" else "hash"

    def _point(self, stats: SweepStats, m: int, rank: int, tau: int) -> tuple[int, int]:
        order = 1 if self.policy == "index" else 0
        return stats.tie_point(m, rank, tau, order, self.seed, list(self.scope.offsets), list(self.scope.tensor_ids))


def _narrow(histogram: list[int], lo: int, hi: int, rank: int, *, descending: bool) -> tuple[int, int, int, int]:
    """The bin that holds the rank-th entry: (its lowest ordinal, its highest, entries ahead of it, entries in it)."""
    shift = bin_shift(lo, hi)
    bins = range(len(histogram) - 1, -1, -1) if descending else range(len(histogram))
    ahead = 0
    for b in bins:
        count = histogram[b]
        if ahead + count >= rank:
            return lo + (b << shift), min(hi, lo + ((b + 1) << shift) - 1), ahead, count
        ahead += count
    raise AssertionError("a histogram holds fewer entries than its sweep counted")


def localise(keep: Keep | None, offset: int, n: int) -> Keep | None:
    """A point of a scope as seen by the tensor that occupies scope indices offset .. offset + n - 1."""
    if keep is None or keep.ties not in ("hash", "index"):
        return keep
    return replace(keep, index=max(-1, min(keep.index - offset, n - 1)))
