"""What a counting pass of a selection looks for: keys, intervals, histograms."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from .program import Balance, Table

__all__ = ["NUM_BINS", "Interval", "Key", "Sweep", "bin_shift"]

Key = Literal["delta", "variance", "importance", "balance", "drawn"]
"""What a sweep ranks, see `Sweep`."""

NUM_BINS = 4096
"""Bins of the histogram that a sweep keeps where its interval holds more entries than its capacity."""


@dataclass(frozen=True)
class Interval:
    """What one search looks for in a sweep.

    stage "key": the ordinal is the key of every element; larger is ahead.
    stage "tie": only elements whose key equals `tau` count; the ordinal is the Philox word (order "hash", purpose 2)
        or the scope index (order "index"); smaller is ahead.
    lo, hi : inclusive bounds of the ordinals of interest, 1 <= lo <= hi for keys.
    model : the model that is searched, and whose Philox stream orders its ties; several searches may share one; -1
        stands for the search's own number. A search reports the non-finite values of its model; where the key is joint,
        the elements at which any model is not finite.
    """

    stage: Literal["key", "tie"]
    lo: int
    hi: int
    tau: int = 0
    model: int = -1


@dataclass(frozen=True)
class Sweep:
    """One counting pass of a selection, for all searches at once; a None interval leaves its search out.

    For each search the pass yields: `before`, the number of elements ahead of the interval; `inside`, the number in it;
    the entries (ordinal, scope index) inside as long as there are at most `capacity`, else a histogram of NUM_BINS
    bins, bin = (ordinal - lo) >> bin_shift(lo, hi). The models of the call are the tensors of the merge, all of them;
    search s looks at models[intervals[s].model].

    key : what is ranked, as bits of a non-negative number of the compute dtype C, NaN above infinity.
        "delta": |dt|.
        "variance": one search over all models; with s = +0 + d1 + ... + dT and mean = s / C(T), the key is
            (+0 + (d1 - mean)^2 + ... + (dT - mean)^2) / C(T), every operation rounded to C.
        "importance": |dt| * C(rows of the element's row), one product; see Table, with one value per row.
        "drawn": |dt| where the element's Philox word (purpose 0 of the model) is below draws[t], else 0.
        "balance": the number z of `Balance` (program.py), which is never negative.
    base : deltas are taken from a base. order : the tie order. seed : Philox seed.
    rows : for "importance". balance : for "balance", draws : for "drawn", thresholds to 2^32; one per model.
    """

    intervals: tuple[Interval | None, ...]
    order: Literal["hash", "index"] = "hash"
    base: bool = True
    seed: int = 0
    key: Key = "delta"
    rows: Table | None = None
    balance: tuple[Balance, ...] = ()
    draws: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        numbered = tuple(
            replace(i, model=s) if i is not None and i.model < 0 else i for s, i in enumerate(self.intervals)
        )
        object.__setattr__(self, "intervals", numbered)

    @property
    def features(self) -> frozenset[str]:
        """What the sweep needs of a backend beyond the key "delta"."""
        return frozenset() if self.key == "delta" else frozenset({f"key:{self.key}"})

    @property
    def joint(self) -> bool:
        """True if a key depends on all models, so that all must be there."""
        return self.key in ("variance", "balance")


def bin_shift(lo: int, hi: int) -> int:
    """The smallest shift for which (hi - lo) >> shift is below NUM_BINS."""
    return max(0, (hi - lo).bit_length() - NUM_BINS.bit_length() + 1)
