"""The new factors of many layers, computed together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ...errors import DataError
from ...ops.spectral.batching import groups

if TYPE_CHECKING:
    import torch

    from ...adapters.model import Factors, Module

__all__ = ["Request", "combined"]


@dataclass(frozen=True)
class Request:
    """One layer of a combination.

    kind, density, vote : PEFT's combination_type, density and majority_sign_method. name : path of the module.
    adapters, weights, modules : one each; None where an adapter lacks the layer. rank : of the truncation, None for
    types of factors. device, dtype : of the new factors.
    """

    kind: str
    density: float | None
    vote: str
    name: str
    adapters: tuple[str, ...]
    weights: tuple[float, ...]
    modules: tuple[Module | None, ...]
    rank: int | None
    device: torch.device
    dtype: torch.dtype


def combined(requests: Sequence[Request], seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(A, B) of every layer, A (r, n) and B (m, r), in the order of the requests.

    Raises
    ------
    MergeError : unusable weights or densities, NaN and Inf; names the module.
    """
    done: dict[int, Factors] = {}
    if requests and requests[0].kind == "svd":
        try:
            done = _sums(requests)
        except DataError:  # the other way knows whose value it is
            done = {}
    if requests and requests[0].kind == "linear":
        done = _linear(requests)
    rest = [i for i in range(len(requests)) if i not in done]
    keys = [(str(r.device), r.kind, r.density, r.vote, r.adapters, r.weights, r.rank) for r in requests]
    for positions in groups([keys[i] for i in rest]):
        some = [rest[p] for p in positions]
        done |= zip(some, _merged([requests[i] for i in some], seed), strict=True)
    return [_finished(requests[i], done[i]) for i in range(len(requests))]


def _sums(requests: Sequence[Request]) -> dict[int, Factors]:
    """Type svd where the ranks add up to less than a side: factors side by side, truncated together."""
    from ...adapters.model import Factors
    from ...ops.spectral.lowrank import lowrank
    from ...ops.spectral.mix import Mix

    whole: dict[int, Mix] = {}
    sizes: list[int] = []
    for i, request in enumerate(requests):
        terms = [(w * m.scale, m) for w, m in zip(request.weights, request.modules, strict=True) if m is not None]
        m, n = terms[0][1].site.shape
        if sum(t.rank for _, t in terms) >= min(m, n):
            continue
        whole[i] = Mix([(factor, Factors(*t.load())) for factor, t in terms])
        sizes.append(min(request.rank or 0, m, n))
    cuts = lowrank(list(whole.values()), sizes)
    return {i: cut.factors for i, cut in zip(whole, cuts, strict=True)}


def _linear(requests: Sequence[Request]) -> dict[int, Factors]:
    """Type linear without what the other types need around it; a layer that holds NaN or Inf is left out."""
    import torch

    from ..._methods.matrix import MatrixSpec
    from ..._methods.matrix_table import get_matrix
    from ...adapters.model import Factors

    method = get_matrix("linear", "adapters")
    found: dict[int, Factors] = {}
    for i, request in enumerate(requests):
        terms = [(w, m) for w, m in zip(request.weights, request.modules, strict=True) if m is not None]
        wide = torch.float64 if any(m.dtype == "F64" for _, m in terms) else torch.float32
        deltas = [Factors(*(t.to(wide) for t in m.load())) for _, m in terms]
        params = {"weight": tuple(w for w, _ in terms)}
        scales = tuple(m.scale for _, m in terms)
        spec = MatrixSpec(request.name, terms[0][1].site.shape, len(terms), params, "default", 0, 0, scales=scales)
        delta = method.merge(spec, deltas).delta
        if isinstance(delta, Factors) and bool(torch.isfinite(delta.a.sum() + delta.b.sum())):
            found[i] = delta
    return found


def _merged(requests: Sequence[Request], seed: int) -> list[Factors]:
    """Layers of one device, by the methods of `merge_adapters`."""
    from ...adapters.align import Aligned, Place
    from ...adapters.cutting import Limits, cut_all
    from ...adapters.job import bind_job
    from ...adapters.model import Adapter
    from ...adapters.opening import check_numbers

    first = requests[0]
    params: dict[str, Any] = {}
    if first.kind not in ("svd", "linear"):
        density = first.density
        params["density"] = min(density, 1.0) if isinstance(density, (int, float)) else density
    if "ties" in first.kind:
        params["majority_sign_method"] = first.vote
    adapters = [
        Adapter(label, {r.name: m for r in requests if (m := r.modules[t]) is not None})
        for t, label in enumerate(first.adapters)
    ]
    job = bind_job(first.kind, params, list(first.weights), adapters, "default", seed, first.device)
    places = [Place(next(m.site for m in r.modules if m is not None), r.modules) for r in requests]
    job = replace(job, aligned=Aligned(tuple(places)))
    check_numbers(job)
    found = {place.site.module: cut.factors for place, _, cut in cut_all(job, Limits(first.rank, None, 1, "b"))}
    return [found[r.name] for r in requests]


def _finished(request: Request, factors: Factors) -> tuple[torch.Tensor, torch.Tensor]:
    """In the dtype of the layer, and with as many rows as PEFT makes."""
    import torch

    a, b = factors.a.to(request.dtype), factors.b.to(request.dtype)
    if request.rank is not None:
        lacking = min(request.rank, *factors.shape) - factors.rank
        if lacking > 0:  # singular values of zero
            a = torch.cat([a, a.new_zeros(lacking, a.shape[1])], 0)
            b = torch.cat([b, b.new_zeros(b.shape[0], lacking)], 1)
    if a.dtype != factors.a.dtype and not (bool(torch.isfinite(a).all()) and bool(torch.isfinite(b).all())):
        raise DataError(
            f"the combined factors are beyond the range of {a.dtype}",
            code="overflow",
            tensor=request.name,
            hint="Use smaller weights, or float32 adapters.",
        )
    return a.contiguous(), b.contiguous()
