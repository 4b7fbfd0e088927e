"""Several adapters of one base, module by module: which has what, and whether they fit together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from ..errors import ArgumentError, InputError, MergeError, PlanError, nearest
from .model import Adapter, Module, Site

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

__all__ = ["Aligned", "Place", "align", "listed", "raise_all"]


@dataclass(frozen=True)
class Place:
    """One module in all adapters. entries : one per adapter, None where it lacks the module."""

    site: Site
    entries: tuple[Module | None, ...]

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """Of the adapters that have the module."""
        return tuple(e.rank for e in self.entries if e is not None)

    @property
    def scales(self) -> tuple[float, ...]:
        """Alpha / r (or alpha / sqrt(r)) per adapter; 1 where one lacks the module."""
        return tuple(1.0 if e is None else e.scale for e in self.entries)


@dataclass(frozen=True)
class Aligned:
    """The modules of several adapters in name order, and what a report says about their coverage."""

    places: tuple[Place, ...]
    warnings: tuple[str, ...] = ()


def align(
    adapters: Sequence[Adapter], base: Mapping[str, tuple[int, ...]] | None = None, *, equal_ranks: bool = False
) -> Aligned:
    """The union of the adapters' modules.

    base : name -> shape of the base's tensors; every target must be among them. Without it, an adapter that shares no
    module with any other is refused, since its names are then most likely spelled another way.
    equal_ranks : the method takes adapters of one rank only.

    Raises
    ------
    InputError, ArgumentError, PlanError (several of them) : different bases, modules of different kinds or shapes,
        targets that the base lacks, no common module, an adapter without modules, replaced tensors of which two
        adapters hold different values, unequal ranks.
    """
    problems: list[MergeError] = []
    warnings = [note for adapter in adapters for note in adapter.notes]
    _check_bases(adapters, base is not None, problems, warnings)
    _check_extras(adapters, problems)
    names = sorted({name for adapter in adapters for name in adapter.modules})
    places = []
    for name in names:
        entries = tuple(adapter.modules.get(name) for adapter in adapters)
        place = Place(next(e.site for e in entries if e is not None), entries)
        _check_place(place, adapters, equal_ranks, problems)
        places.append(place)
    if base is not None:
        _check_targets(places, base, adapters, problems)
    _check_coverage(places, adapters, base is not None, problems, warnings)
    raise_all(problems)
    return Aligned(tuple(places), tuple(warnings))


def raise_all(problems: Sequence[MergeError]) -> None:
    """Raise the problem, or all of them as one."""
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise PlanError(list(problems))


def listed(names: Iterable[str], most: int = 5) -> str:
    """Names for a sentence, the first few of many."""
    given = list(names)
    shown = ", ".join(given[:most])
    return shown if len(given) <= most else f"{shown} and {len(given) - most} more"


def _check_bases(adapters: Sequence[Adapter], given: bool, problems: list[MergeError], warnings: list[str]) -> None:
    named = [a for a in adapters if a.base]
    others = [a for a in named[1:] if not _same_base(named[0], a)]
    if not others:
        return
    text = "; ".join(f"{a.label}: {_base_name(a)}" for a in [named[0], *others[:3]])
    if given:
        warnings.append(f"the adapters name different bases, all were checked against the one given ({text})")
        return
    problems.append(
        InputError(
            "the adapters belong to different bases",
            code="adapter.base",
            expected="one base_model_name_or_path",
            got=text,
            hint="If these are names of one base, give it as base: names and shapes are then checked against it.",
        )
    )


def _base_name(adapter: Adapter) -> str:
    revision = adapter.config.get("revision")
    return adapter.base + (f" at revision {revision}" if revision else "")


def _same_base(one: Adapter, two: Adapter) -> bool:
    """Equal names and revisions. A revision that is not named agrees with any; of a local path the last part counts."""
    first, second = one.base.rstrip("/"), two.base.rstrip("/")
    revisions = one.config.get("revision"), two.config.get("revision")
    if all(revisions) and revisions[0] != revisions[1]:
        return False
    local = any(n.startswith(("/", ".", "~")) or n.count("/") > 1 for n in (first, second))
    return first == second or (local and first.rpartition("/")[2] == second.rpartition("/")[2])


def _check_extras(adapters: Sequence[Adapter], problems: list[MergeError]) -> None:
    """Several adapters may hold a replaced tensor only with equal values: a copy of the base's, for example."""
    holders: dict[str, list[Adapter]] = {}
    for adapter in adapters:
        for name in adapter.extras:
            holders.setdefault(name, []).append(adapter)
    for name, held in holders.items():
        if any(not _equal(held[0].extras[name](), other.extras[name]()) for other in held[1:]):
            problems.append(
                InputError(
                    "several adapters replace this tensor (modules_to_save), and replaced tensors are not merged",
                    code="adapter.modules_to_save",
                    tensor=name,
                    expected="one adapter that replaces it, or equal values",
                    got=listed(a.label for a in held),
                )
            )


def _equal(one: torch.Tensor, two: torch.Tensor) -> bool:
    return one.dtype == two.dtype and one.shape == two.shape and bool((one == two).all())


def _check_place(place: Place, adapters: Sequence[Adapter], equal_ranks: bool, problems: list[MergeError]) -> None:
    seen = [(a.label, e) for a, e in zip(adapters, place.entries, strict=True) if e is not None]
    label, first = seen[0]
    for other, entry in seen[1:]:
        if (entry.site.kind, entry.site.weight_shape) != (first.site.kind, first.site.weight_shape):
            problems.append(
                InputError(
                    "the adapters were made for different weights here",
                    code="adapter.shape",
                    tensor=place.site.module,
                    expected=f"{first.site.kind} {first.site.weight_shape} as in {label}",
                    got=f"{entry.site.kind} {entry.site.weight_shape} in {other}",
                )
            )
            return
    if equal_ranks and len({entry.rank for _, entry in seen}) > 1:
        problems.append(
            ArgumentError(
                "this method combines factors row by row and needs adapters of one rank",
                code="adapter.ranks",
                tensor=place.site.module,
                expected="equal ranks",
                got=listed(f"{entry.rank} in {name}" for name, entry in seen),
                hint="Types svd, cat and those that end in _svd take any ranks.",
            )
        )


def _check_targets(
    places: Sequence[Place],
    base: Mapping[str, tuple[int, ...]],
    adapters: Sequence[Adapter],
    problems: list[MergeError],
) -> None:
    for place in places:
        site = place.site
        if any(site.weight in adapter.extras for adapter in adapters):
            continue  # the weight comes from an adapter, perhaps with another vocabulary
        holders = listed(a.label for a, e in zip(adapters, place.entries, strict=True) if e is not None)
        shape = base.get(site.weight)
        if shape is None:
            problems.append(
                InputError(
                    f"the base has no such tensor, which {holders} adapts",
                    code="adapter.target",
                    tensor=site.weight,
                    hint=nearest(site.weight, base),
                )
            )
        elif tuple(shape) != tuple(site.weight_shape):
            problems.append(
                InputError(
                    f"the base's tensor does not fit {holders}",
                    code="adapter.target",
                    tensor=site.weight,
                    expected=str(tuple(site.weight_shape)),
                    got=str(tuple(shape)),
                )
            )


def _check_coverage(
    places: Sequence[Place], adapters: Sequence[Adapter], given: bool, problems: list[MergeError], warnings: list[str]
) -> None:
    alone = []
    for index, adapter in enumerate(adapters):
        if not adapter.modules:
            problems.append(InputError(f"{adapter.label} adapts no module", code="adapter.empty"))
            continue
        mine = [place for place in places if place.entries[index] is not None]
        if len(adapters) > 1 and all(len(place.ranks) == 1 for place in mine):
            alone.append(adapter)
        missing = [place.site.module for place in places if place.entries[index] is None]
        if missing:
            warnings.append(
                f"{adapter.label} lacks {len(missing)} of {len(places)} modules, which count as zero: {listed(missing)}"
            )
    if alone and not given:
        problems.append(
            InputError(
                f"no module of {listed(a.label for a in alone)} is in any other adapter",
                code="adapter.coverage",
                expected="common module names",
                got="; ".join(f"{a.label}: {next(iter(a.modules))}" for a in adapters[:3] if a.modules),
                hint="If they do adapt different modules of one base, give it as base.",
            )
        )
