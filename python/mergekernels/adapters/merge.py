"""Merging adapters of one base: `merge_adapters`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

from .._methods.matrix import Merged
from .._native import torch_dtype
from ..errors import ArgumentError, DataError
from ..ops.arguments import check_integer
from ..tensors import F32, DType, dtype_of
from .align import Place, align
from .job import Job, bind_job
from .merged import MergedAdapter
from .model import Adapter, Factors, Site
from .opening import AdapterInput, open_adapters
from .peft_dialect import rslora_factor
from .report import InputReport, MergeReport, ModuleReport
from .saving import check_target
from .truncate import Cut, check_cut, exact_factors, truncated

if TYPE_CHECKING:
    import torch

    from ..formats.adapters import Base

__all__ = ["merge_adapters"]

_BATCH_BYTES = 128 << 20
"""Merged task vectors that wait for one batched truncation."""


def merge_adapters(
    adapters: Iterable[AdapterInput],
    method: str,
    *,
    weights: Any = None,
    rank: int | None = None,
    energy: float | None = None,
    base: Base | None = None,
    out: str | PathLike[str] | None = None,
    dialect: str = "default",
    seed: int = 0,
    spread: Literal["b", "sqrt", "a"] = "b",
    out_dtype: str | torch.dtype | None = None,
    device: torch.device | str = "cpu",
    **params: Any,
) -> MergedAdapter:
    """Merge LoRA adapters of one base into one adapter.

    Modules are merged one by one: memory is bounded by one module of the adapters (of a chunk of them where the method
    sums), some modules that are truncated together, and the result.

    Parameters
    ----------
    adapters : one or more: PEFT folders, kohya and diffusers files, mappings of tensors, pairs (mapping, config), or
        results of a merge. Ranks, alphas, rsLoRA and patterns may differ; a module that one lacks counts as a zero
        delta. Inputs are not changed.
    method : a name from `mergekernels.methods("adapters")`: "svd", "cat", "linear", "ties_svd", ...
    weights : one number, or one per adapter; negative ones and 0 are allowed. Default 1.
    rank : most rows of lora_A per module, 1 or more; a module whose merged delta or weight has less gets less.
    energy : instead of a rank, the least rank that keeps this share of each merged delta's sum of squares, in (0, 1].
        Without both, the method decides: svd and all methods with dense results take the largest rank among the
        adapters, the others keep what they give.
    base : checkpoint folder or file, or a mapping from name to tensor or shape: names and shapes of all targets are
        checked against it. No tensor data is read.
    out : folder to write the result to, as PEFT does; it must not exist.
    dialect : variant of the method. seed : of everything random, 64 bits.
    spread : where a truncation puts the singular values: "b" (lora_B, as PEFT), "sqrt" (both) or "a".
    out_dtype : of the factors: "float32", "bfloat16", "float16", "float64" or torch's; default the adapters' common
        dtype, float32 if they differ. Everything is computed in float32 (float64 for such inputs) and rounded once.
    device : where to compute; the result comes back to the CPU.
    params : the method's own parameters (density=0.2, scale=0.5), one value, or one per adapter where it says so.

    Returns
    -------
    The adapter, alpha = rank and scale 1, with a report: per module rank, kept energy, route, warnings.

    Raises
    ------
    ArgumentError, InputError, FormatError, PlanError : before any factor is read.
    DataError : NaN or Inf in a factor, naming adapter and module, or a result beyond `out_dtype`.
    OutputError : `out` exists, or writing failed.
    """
    started = time.perf_counter()
    check_cut(rank, energy, spread)
    seed = check_integer(seed, 0, 1 << 64, "seed")
    asked = _asked_dtype(out_dtype)
    if out is not None:
        check_target(out)
    from ..formats.adapters import base_shapes

    shapes = base_shapes(base)
    opened = open_adapters(adapters, shapes)
    job = bind_job(method, params, weights, opened, dialect, seed, device)
    job = replace(job, aligned=align(opened, shapes, equal_ranks=job.wants.equal_ranks))
    job, largest = _peft(job, method, rank)
    stored = asked or _common_dtype(opened)
    modules: dict[str, tuple[Site, Factors]] = {}
    reports: dict[str, ModuleReport] = {}
    alone = method != job.method.info.name
    for place, merged, cut in _cut_all(job, None if alone else rank, None if alone else energy, largest, spread):
        factors, reports[place.site.module] = _finished(place, merged, cut, stored)
        modules[place.site.module] = place.site, factors
    result = MergedAdapter(
        modules={name: modules[name] for name in sorted(modules)},
        report=_report(job, rank, energy, reports, time.perf_counter() - started),
        dtype=stored.name,
        base=next((a.base for a in opened if a.base), ""),
        extras={name: load for a in opened for name, load in a.extras.items()},
        inherited=_inherited(opened),
        sources=tuple(opened),
    )
    if out is not None:
        result.save(out)
    return result


def _peft(job: Job, method: str, rank: int | None) -> tuple[Job, int]:
    """The job with what its dialect makes of rsLoRA, and the default rank of truncations."""
    largest = max(max(place.ranks) for place in job.aligned.places)
    if not (job.wants.peft and job.dialect == "peft"):
        return job, largest
    factor, largest = rslora_factor(job.adapters, job.wants, rank, largest)
    if factor == 1.0:
        return job, largest
    note = f"dialect peft: the first adapter uses rsLoRA, so the result is multiplied by {factor:g}"
    return replace(job, factor=factor, notes=(*job.notes, note)), largest


def _cut_all(
    job: Job, rank: int | None, energy: float | None, largest: int, spread: Literal["b", "sqrt", "a"]
) -> Iterator[tuple[Place, Merged, Cut]]:
    """All modules with their factors, truncated in batches."""
    waiting: list[tuple[Place, Merged]] = []
    size = 0
    asked = rank is not None or energy is not None
    wanted = rank if asked else largest
    for place, merged in job.merged():
        delta = merged.delta
        if isinstance(delta, Factors) and delta.rank == 0:
            yield place, merged, Cut(delta, 1.0, "zero")
        elif not asked and (job.wants.rank == "exact" or (job.wants.rank == "given" and isinstance(delta, Factors))):
            yield place, merged, exact_factors(delta)
        else:
            waiting.append((place, merged))
            size += _bytes(merged)
        if size >= _BATCH_BYTES:
            yield from _cut_batch(waiting, wanted, energy, spread)
            waiting, size = [], 0
    yield from _cut_batch(waiting, wanted, energy, spread)


def _cut_batch(
    waiting: list[tuple[Place, Merged]], rank: int | None, energy: float | None, spread: Literal["b", "sqrt", "a"]
) -> Iterator[tuple[Place, Merged, Cut]]:
    if not waiting:
        return
    cuts = truncated([merged.delta for _, merged in waiting], rank, energy, spread)
    for (place, merged), cut in zip(waiting, cuts, strict=True):
        if merged.finish is not None:
            cut = replace(cut, factors=merged.finish(cut.factors))
        yield place, merged, cut


def _bytes(merged: Merged) -> int:
    delta = merged.delta
    tensors = (delta.b, delta.a) if isinstance(delta, Factors) else (delta,)
    return sum(t.numel() * t.element_size() for t in tensors)


def _finished(place: Place, merged: Merged, cut: Cut, stored: DType) -> tuple[Factors, ModuleReport]:
    """The factors as they are stored, and their report."""
    import torch

    warnings = list(merged.warnings)
    b, a = cut.factors.b, cut.factors.a
    if cut.factors.rank == 0:
        warnings.append("the merged delta is zero: written as rank 1 of zeros")
        b, a = b.new_zeros((b.shape[0], 1)), a.new_zeros((1, a.shape[1]))
    dtype = torch_dtype(stored)
    b, a = b.to("cpu", dtype).contiguous(), a.to("cpu", dtype).contiguous()
    if not (bool(torch.isfinite(b).all()) and bool(torch.isfinite(a).all())):
        raise DataError(
            f"the merged factors are beyond the range of {stored}",
            code="overflow",
            tensor=place.site.module,
            hint="spread='sqrt' balances the factors; out_dtype='float32' or 'bfloat16' have a larger range.",
        )
    details = dict(merged.report)
    route = str(details.pop("route", "")) or cut.route
    report = ModuleReport(
        shape=place.site.shape,
        ranks=place.ranks,
        adapters=len(place.ranks),
        rank=int(b.shape[1]),
        kept_energy=cut.kept_energy,
        route=route if route == cut.route else f"{route}; {cut.route}",
        details=details,
        warnings=tuple(warnings),
    )
    return Factors(b, a), report


def _report(
    job: Job, rank: int | None, energy: float | None, modules: Mapping[str, ModuleReport], seconds: float
) -> MergeReport:
    inputs = tuple(InputReport(a.label, a.form, a.base, len(a.modules)) for a in job.adapters)
    notes = [note for a in job.adapters for note in a.notes]
    extras = [
        f"{a.label} replaces {name} (modules_to_save): taken as it is, without weight"
        for a in job.adapters
        for name in a.extras
    ]
    ordered = {name: modules[name] for name in sorted(modules)}
    about = [f"{name}: {warning}" for name, report in ordered.items() for warning in report.warnings]
    return MergeReport(
        method=job.method.info.name,
        dialect=job.dialect,
        params=dict(job.params),
        seed=job.seed,
        rank=rank,
        energy=energy,
        inputs=inputs,
        modules=ordered,
        warnings=(*job.notes, *job.aligned.warnings, *notes, *extras, *about),
        seconds=seconds,
    )


def _common_dtype(adapters: list[Adapter]) -> DType:
    names = {module.dtype for adapter in adapters for module in adapter.modules.values()}
    found = dtype_of(next(iter(names))) if len(names) == 1 else None
    return found or F32


def _asked_dtype(asked: Any) -> DType | None:
    if asked is None:
        return None
    found = dtype_of(str(asked).removeprefix("torch."))
    if found is None or not found.is_float:
        raise ArgumentError(
            "out_dtype is not usable",
            code="out_dtype",
            expected="float32, bfloat16, float16 or float64",
            got=repr(asked),
        )
    return found


def _inherited(adapters: list[Adapter]) -> dict[str, Any]:
    """Fields of the configs in which all agree."""
    first = adapters[0].config
    return {key: value for key, value in first.items() if all(a.config.get(key) == value for a in adapters[1:])}
