"""Several adapters of one base, module by module: which has what, and whether they fit together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import ArgumentError, DataError, InputError, MergeError, PlanError
from ..formats.adapters.sites import Base, base_shapes
from .model import Adapter, Factors, Site

if TYPE_CHECKING:
    import torch

__all__ = ["Aligned", "align"]

_LISTED = 10


@dataclass(frozen=True)
class Aligned:
    """Adapters that fit together.

    adapters : in the order given. sites : union of their modules, module path -> site, in name order.
    base : name of the base model that they share, "" if none names one.
    missing : for each adapter, the modules of the union that it lacks; its delta there is zero.
    extras : tensor name in the base -> (label of the adapter, loader) of a full tensor that replaces the base's. Where
    it is the weight of a site, the deltas are added to this tensor.
    warnings : sentences for the user (partial coverage, base names that differ). notes : sentences for a report.
    """

    adapters: tuple[Adapter, ...]
    sites: Mapping[str, Site]
    base: str
    missing: tuple[tuple[str, ...], ...]
    extras: Mapping[str, tuple[str, Callable[[], torch.Tensor]]]
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def factors(self, module: str, *, fold_scale: bool = True) -> list[Factors]:
        """The factors of one module, one per adapter; rank 0 where an adapter lacks it.

        Parameters
        ----------
        module : a key of `sites`. fold_scale : False leaves alpha out, for parity with tools that ignore it.

        Returns
        -------
        All in float32, or all in float64 if one is stored so.

        Raises
        ------
        DataError : a factor has NaN or Inf; names the adapter and the module.
        """
        import torch

        m, n = self.sites[module].shape
        found: list[Factors | None] = []
        for adapter in self.adapters:
            here = adapter.modules.get(module)
            factors = None if here is None else here.factors(fold_scale=fold_scale)
            if factors is not None:
                _refuse_nonfinite(factors, adapter.label, module)
            found.append(factors)
        wide = any(f is not None and f.b.dtype == torch.float64 for f in found)
        dtype = torch.float64 if wide else torch.float32
        device = next(f.b.device for f in found if f is not None)
        return [
            Factors(torch.zeros(m, 0, dtype=dtype, device=device), torch.zeros(0, n, dtype=dtype, device=device))
            if f is None
            else Factors(f.b.to(dtype), f.a.to(dtype))
            for f in found
        ]

    @property
    def coverage(self) -> dict[str, int]:
        """Module -> number of adapters that have it."""
        return {m: sum(m in a.modules for a in self.adapters) for m in self.sites}


def align(
    adapters: Sequence[Adapter],
    base: Base | None = None,
    *,
    allow_disjoint: bool = False,
    allow_other_base: bool = False,
) -> Aligned:
    """Checks that adapters belong to one base and lists their modules.

    Parameters
    ----------
    adapters : one or more, as `read_adapter` gives them (with the same base, if there is one).
    base : path, open checkpoint or mapping; each module must then be one of its weights, in the same shape.
    allow_disjoint : accept an adapter that shares no module with any other. Otherwise this is an error, because the
        usual cause is that names are spelled differently, and the adapter would merge as nothing.
    allow_other_base : accept adapters whose configs name different base models, with a warning.

    Raises
    ------
    ArgumentError : no adapters.
    InputError : one of: different bases, no shared module, shapes that differ, a target that the base lacks, two
        adapters that replace one tensor (modules_to_save) by different values. PlanError : several.
    """
    if not adapters:
        raise ArgumentError("no adapters to merge", code="adapter.none")
    problems: list[MergeError] = []
    warnings: list[str] = []
    name = _one_base(adapters, allow_other_base, problems, warnings)
    sites = _union(adapters, problems)
    _check_base(adapters, base, problems)
    if len(adapters) > 1 and not allow_disjoint:
        _check_shared(adapters, problems)
    extras, notes = _one_extra(adapters, problems)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise PlanError(problems)
    missing = tuple(tuple(m for m in sites if m not in a.modules) for a in adapters)
    for adapter, lacks in zip(adapters, missing, strict=True):
        if lacks:
            warnings.append(
                f"{adapter.label} lacks {len(lacks)} of {len(sites)} modules, where its delta is zero: {_some(lacks)}"
            )
        notes += adapter.notes
    return Aligned(tuple(adapters), sites, name, missing, extras, tuple(warnings), tuple(notes))


def _refuse_nonfinite(factors: Factors, label: str, module: str) -> None:
    for part, tensor in (("A", factors.a), ("B", factors.b)):
        if not bool(tensor.isfinite().all()):
            raise DataError(
                f"factor {part} has NaN or Inf",
                code="data.nonfinite",
                tensor=module,
                file=label,
                hint="A diverged training leaves such factors; take an earlier checkpoint",
            )


def _identity(adapter: Adapter) -> tuple[str, str]:
    """(base name, revision), "" where the config says nothing."""
    return adapter.base.rstrip("/"), str(adapter.config.get("revision") or "")


def _same_base(one: tuple[str, str], two: tuple[str, str]) -> bool:
    """Equal names, or equal last parts where one is a local path. An unknown name or revision agrees with any."""
    if one[1] and two[1] and one[1] != two[1]:
        return False
    if not one[0] or not two[0] or one[0] == two[0]:
        return True
    local = any(n.startswith(("/", ".", "~")) or n.count("/") > 1 for n in (one[0], two[0]))
    return local and one[0].rpartition("/")[2] == two[0].rpartition("/")[2]


def _one_base(adapters: Sequence[Adapter], allowed: bool, problems: list[MergeError], warnings: list[str]) -> str:
    """The base's name: the first that is known."""
    known = [a for a in adapters if a.base]
    if not known:
        return ""
    first = known[0]
    for other in known[1:]:
        if _same_base(_identity(first), _identity(other)):
            continue
        names = [f"'{n}'" + (f" revision {r}" if r else "") for n, r in (_identity(first), _identity(other))]
        if allowed:
            warnings.append(f"{first.label} is for {names[0]}, {other.label} for {names[1]}")
            continue
        problems.append(
            InputError(
                "adapters of different base models",
                code="adapter.other-base",
                file=other.label,
                expected=f"{names[0]} as {first.label}",
                got=names[1],
                hint="If both names mean one model, make base_model_name_or_path in the configs equal",
            )
        )
    return first.base


def _union(adapters: Sequence[Adapter], problems: list[MergeError]) -> dict[str, Site]:
    sites: dict[str, tuple[Site, str]] = {}
    for adapter in adapters:
        for path, module in adapter.modules.items():
            site, owner = sites.setdefault(path, (module.site, adapter.label))
            if site != module.site:
                problems.append(
                    InputError(
                        f"module '{path}' differs between adapters",
                        code="adapter.shape",
                        file=adapter.label,
                        tensor=site.weight,
                        expected=f"{site.kind} {list(site.weight_shape)} as in {owner}",
                        got=f"{module.site.kind} {list(module.site.weight_shape)}",
                        hint=None if site.shape != module.site.shape else "Name the base: its weight settles the form",
                    )
                )
    return {path: sites[path][0] for path in sorted(sites)}


def _check_base(adapters: Sequence[Adapter], base: Base | None, problems: list[MergeError]) -> None:
    shapes = base_shapes(base)
    if shapes is None:
        return
    for adapter in adapters:
        for module in adapter.modules.values():
            site = module.site
            got = shapes.get(site.weight)
            if got is None:
                problems.append(
                    InputError(
                        "the base has no such tensor, but the adapter changes it",
                        code="adapter.target-missing",
                        file=adapter.label,
                        tensor=site.weight,
                    )
                )
            elif got != site.weight_shape and site.weight not in adapter.extras:
                problems.append(
                    InputError(
                        "the adapter does not fit the base",
                        code="adapter.base-shape",
                        file=adapter.label,
                        tensor=site.weight,
                        expected=str(list(site.weight_shape)),
                        got=str(list(got)),
                    )
                )


def _check_shared(adapters: Sequence[Adapter], problems: list[MergeError]) -> None:
    for i, adapter in enumerate(adapters):
        others = [a for j, a in enumerate(adapters) if j != i]
        if any(path in other.modules for other in others for path in adapter.modules):
            continue
        theirs = next(iter(others[0].modules), "")
        problems.append(
            InputError(
                "the adapter shares no module with the others",
                code="adapter.coverage",
                file=adapter.label,
                expected=f"modules such as '{theirs}'",
                got=_some(tuple(adapter.modules)) or "no modules",
                hint="Were they trained on the same model class? A different prefix makes every name differ",
            )
        )


def _one_extra(
    adapters: Sequence[Adapter], problems: list[MergeError]
) -> tuple[dict[str, tuple[str, Callable[[], torch.Tensor]]], list[str]]:
    """Each replaced tensor from one adapter; several may hold it only with the same values."""
    extras: dict[str, tuple[str, Callable[[], torch.Tensor]]] = {}
    notes: list[str] = []
    for adapter in adapters:
        for name, load in adapter.extras.items():
            owner, first = extras.setdefault(name, (adapter.label, load))
            if first is load:
                notes.append(f"'{name}' is replaced by the full tensor of {adapter.label}")
            elif not _equal(first(), load()):
                problems.append(
                    InputError(
                        f"two adapters replace one tensor (modules_to_save); the other is {owner}",
                        code="adapter.modules-to-save",
                        file=adapter.label,
                        tensor=name,
                        hint="Merge full models for it, or remove it from all but one adapter",
                    )
                )
    return dict(sorted(extras.items())), notes


def _equal(one: torch.Tensor, two: torch.Tensor) -> bool:
    return one.dtype == two.dtype and one.shape == two.shape and bool((one == two).all())


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{n}'" for n in names[:_LISTED])
    return shown + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
