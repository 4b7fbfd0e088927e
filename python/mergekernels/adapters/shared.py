"""Adapters as shared rank-1 terms with a weight per adapter: `factorise_adapters`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .._methods.adapters.tc_lora import joint_fits, sharing
from .._methods.arguments import bind_matrix
from .._methods.matrix import Merged
from ..errors import ArgumentError
from .align import Place
from .cutting import Limits, cut_waiting
from .job import Job, batches, plain
from .merged import MergedAdapter
from .model import Factors
from .opening import AdapterInput, open_job
from .result import asked_dtype, assemble, common_dtype
from .truncate import Cut, check_cut

if TYPE_CHECKING:
    import torch

    from ..formats.adapters import Base
    from ..ops import CP
    from ..tensors import DType

__all__ = ["SharedAdapters", "factorise_adapters"]


class SharedAdapters:
    """What `factorise_adapters` found. Memory: rank (m + n + T) numbers per module.

    terms : module -> CP, with factors C (adapters, rank), U (m, rank), V (n, rank): U and V are shared, row t of C is
    adapter t's own part. sharing : module -> the sharing index of each term, 1 for equal use by all adapters, 1 / T for
    one. labels : the adapters, in order.
    """

    def __init__(self, job: Job, limits: Limits, stored: DType, terms: Sequence[tuple[Place, CP]]) -> None:
        self._job = job
        self._limits = limits
        self._stored = stored
        self._places = tuple(terms)
        self.terms = {place.site.module: cp for place, cp in terms}
        self.sharing = {name: sharing(cp.factors[0]) for name, cp in self.terms.items()}
        self.labels = tuple(a.label for a in job.adapters)

    @property
    def fit(self) -> dict[str, float]:
        """Module -> 1 - err / norm of the joint fit."""
        return {name: cp.fit for name, cp in self.terms.items()}

    def merge(
        self, weights: Any = None, *, shared_min: float = 0.0, rank: int | None = None, energy: float | None = None
    ) -> MergedAdapter:
        """What `merge_adapters(adapters, "tc_lora", weights=..., shared_min=...)` gives, without another fit.

        weights : one number, or one per adapter; default 1 / T. shared_min : leave out terms of smaller sharing.
        rank, energy : truncate the result.

        Raises
        ------
        ArgumentError : unusable values.
        """
        started = time.perf_counter()
        limits = self._limits
        if rank is not None or energy is not None:
            check_cut(rank, energy, limits.spread)
            limits = replace(limits, rank=rank, energy=energy)
        known = {p.name: p for p in self._job.method.info.params}
        given = {known[name].keyword: value for name, value in self._job.params.items() if name != "weight"}
        given["shared_min"] = shared_min
        if weights is not None:
            given["weights"] = plain(weights)
        params = bind_matrix(self._job.method, given, len(self._job.adapters), self._job.dialect)
        job = replace(self._job, params=params)
        return assemble(job, limits, self._stored, self._items(job, limits), started)

    def task(self, which: int | str) -> MergedAdapter:
        """One adapter as the terms say it, by number or label.

        Raises
        ------
        ArgumentError : there is no such adapter.
        """
        count = len(self.labels)
        index = self.labels.index(which) if which in self.labels else which
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < count:
            raise ArgumentError(
                "no such adapter",
                code="shared.task",
                expected=f"0 to {count - 1}, or one of {', '.join(self.labels)}",
                got=repr(which),
            )
        return self.merge([float(t == index) for t in range(count)])

    def _items(self, job: Job, limits: Limits) -> Iterator[tuple[Place, Merged, Cut]]:
        import torch

        count = len(job.adapters)
        weights = [1.0 / count if w is None else w for w in job.params["weight"]]
        least = job.params["shared_min"]
        waiting = []
        for place, cp in self._places:
            c, u, v = cp.factors
            shares = self.sharing[place.site.module]
            kept = torch.tensor([s >= least for s in shares], dtype=torch.bool)
            coefficients = torch.tensor(weights, dtype=torch.float64) @ c.double() * job.scale
            delta = Factors((u.double() * coefficients)[:, kept].to(u.dtype), v[:, kept].mT)
            report = {"fit": cp.fit, "cp_rank": cp.diagnostics["rank"], "terms": int(kept.sum())}
            waiting.append((place, Merged(delta, report, cp.diagnostics["warnings"])))
        yield from cut_waiting(waiting, job, limits)


def factorise_adapters(
    adapters: Iterable[AdapterInput],
    rank: int | None = None,
    *,
    base: Base | None = None,
    seed: int = 0,
    out_dtype: str | torch.dtype | None = None,
    device: torch.device | str = "cpu",
    **params: Any,
) -> SharedAdapters:
    """Factorise the updates of all adapters jointly into shared rank-1 terms, once, for many merges.

    adapters, base, out_dtype, device : as for `merge_adapters`. rank : terms per module, at most the sum of the ranks;
    default the largest rank among the adapters. seed : of random starts. params : the other parameters of tc_lora
    (normalize, n_starts, max_iter, tol, strict, scale, fold_scale) but weights and shared_min, which `merge` takes;
    scale multiplies every merge and every task. Modules of equal shape are factorised together.

    Raises
    ------
    ArgumentError, DataError, and what `merge_adapters` raises.
    """
    later = [name for name in ("weights", "shared_min") if name in params]
    if later:
        raise ArgumentError(
            f"{' and '.join(later)}: the factorisation does not depend on it",
            code="shared.params",
            expected="an argument of merge",
            got="an argument of factorise_adapters",
        )
    if rank is not None:
        if "cp_rank" in params:
            raise ArgumentError(
                "rank and cp_rank are both given", code="shared.rank", expected="one of them", got="both"
            )
        params["cp_rank"] = rank
    asked = asked_dtype(out_dtype)
    job, limits = open_job(adapters, "tc_lora", None, None, None, base, "default", seed, "b", device, params)
    found: dict[str, CP] = {}
    places = sorted(job.aligned.places, key=lambda p: (p.site.shape, sum(p.ranks)))
    for batch in batches(places):
        fitted = joint_fits([job.spec(place) for place in batch], [list(job.deltas(place)) for place in batch])
        found |= {place.site.module: cp for place, cp in zip(batch, fitted, strict=True)}
    ordered = [(place, found[place.site.module]) for place in job.aligned.places]
    return SharedAdapters(job, limits, asked or common_dtype(job.adapters), ordered)
