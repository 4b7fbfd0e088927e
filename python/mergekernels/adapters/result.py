"""The factors of a merge and its reports, put together."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .._methods.matrix import Merged
from .._native import torch_dtype
from ..errors import ArgumentError, DataError
from ..tensors import F32, DType, dtype_of
from .align import Place, listed
from .cutting import Limits
from .job import Job
from .merged import MergedAdapter
from .model import Adapter, Factors, Site
from .report import InputReport, MergeReport, ModuleReport
from .truncate import Cut

__all__ = ["agreed", "asked_dtype", "assemble", "common_dtype"]

_LISTED = 5

_TELL = 0.99
"""Share of the squares below which a truncation that nobody asked for is told."""


def assemble(
    job: Job, limits: Limits, stored: DType, items: Iterable[tuple[Place, Merged, Cut]], started: float
) -> MergedAdapter:
    """The adapter of all modules, in dtype `stored`. started : `time.perf_counter` when the merge began.

    Raises
    ------
    DataError : factors beyond the range of `stored`.
    """
    modules: dict[str, tuple[Site, Factors]] = {}
    reports: dict[str, ModuleReport] = {}
    unasked: list[str] = []  # modules that lose something to a rank that nobody gave, and that are of no type of PEFT
    for place, merged, cut in items:
        name = place.site.module
        factors, reports[name] = _finished(place, merged, cut, stored)
        modules[name] = place.site, factors
        if not limits.asked and not job.wants.peft and cut.kept_energy < _TELL:
            unasked.append(name)
    adapters = job.adapters
    return MergedAdapter(
        modules={name: modules[name] for name in sorted(modules)},
        report=_report(job, limits, reports, unasked, time.perf_counter() - started),
        dtype=stored.name,
        base=next((a.base for a in adapters if a.base), ""),
        extras={name: load for a in reversed(adapters) for name, load in a.extras.items()},
        inherited=agreed(adapters),
        sources=tuple(adapters),
        shapes=job.shapes,
    )


def _finished(place: Place, merged: Merged, cut: Cut, stored: DType) -> tuple[Factors, ModuleReport]:
    """The factors as they are stored, and their report."""
    import torch

    warnings = list(merged.warnings)
    dtype = torch_dtype(stored)
    b, a = (t.to("cpu", dtype).contiguous() for t in (cut.factors.b, cut.factors.a))
    if not (bool(b.any()) and bool(a.any())):
        zero = not (bool(cut.factors.b.any()) and bool(cut.factors.a.any()))
        what = "the merged delta is zero" if zero else f"the merged factors are below the range of {stored}"
        warnings.append(f"{what}: written as rank 1 of zeros")
        b, a = b.new_zeros((b.shape[0], 1)), a.new_zeros((1, a.shape[1]))
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
        scales=tuple(e.scale for e in place.entries if e is not None),
        adapters=len(place.ranks),
        rank=int(b.shape[1]),
        kept_energy=cut.kept_energy,
        route=route if route == cut.route else f"{route}; {cut.route}",
        details=details,
        warnings=tuple(warnings),
    )
    return Factors(b, a), report


def _report(
    job: Job, limits: Limits, modules: Mapping[str, ModuleReport], unasked: Sequence[str], seconds: float
) -> MergeReport:
    inputs = tuple(InputReport(a.label, a.form, a.base, len(a.modules)) for a in job.adapters)
    extras = [
        f"{a.label} replaces {name} (modules_to_save): taken as it is, without weight"
        for a in job.adapters
        for name in a.extras
    ]
    ordered = {name: modules[name] for name in sorted(modules)}
    about = _about(ordered)
    if unasked:
        worst = min(unasked, key=lambda name: modules[name].kept_energy)
        about.append(
            f"{job.method.info.name} gives dense matrices in {len(unasked)} of {len(modules)} modules, cut to the "
            f"adapters' largest rank, {limits.largest}: {worst} keeps {modules[worst].kept_energy:.1%} of its sum of "
            "squares; rank or energy keep more"
        )
    return MergeReport(
        method=job.method.info.name,
        dialect=job.dialect,
        params=dict(job.params),
        seed=job.seed,
        rank=limits.rank,
        energy=limits.energy,
        inputs=inputs,
        modules=ordered,
        warnings=(*job.notes, *job.aligned.warnings, *extras, *about),
        seconds=seconds,
    )


def _about(modules: Mapping[str, ModuleReport]) -> list[str]:
    """The modules' warnings, each with its module; what is said of many modules is said once."""
    holders: dict[str, list[str]] = {}
    for name, report in modules.items():
        for warning in report.warnings:
            holders.setdefault(warning, []).append(name)
    return [
        f"{name}: {warning}"
        for warning, names in holders.items()
        for name in (names if len(names) <= _LISTED else (listed(names, _LISTED),))
    ]


def common_dtype(adapters: Sequence[Adapter]) -> DType:
    """The dtype that all stored factors have, float32 if they differ."""
    names = {module.dtype for adapter in adapters for module in adapter.modules.values()}
    found = dtype_of(next(iter(names))) if len(names) == 1 else None
    return found or F32


def asked_dtype(asked: Any) -> DType | None:
    """The dtype that a caller names; None for None.

    Raises
    ------
    ArgumentError : it is no float dtype.
    """
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


def agreed(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """Fields of the configs in which all agree."""
    first = adapters[0].config
    return {key: value for key, value in first.items() if all(a.config.get(key) == value for a in adapters[1:])}
