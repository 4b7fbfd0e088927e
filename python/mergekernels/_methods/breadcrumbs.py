"""breadcrumbs and breadcrumbs_ties: drop the largest outliers and the small noise of each task vector."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from ..ops.keep import KEEP_NOTHING, Band, KeepRule, RankBand, Rows
from .common import INT8_MASK, LAMBDA, weight
from .pipeline import DENSITY, RESCALE, SCOPE, TIE_POLICY, ZERO_VOTE, Election, Pipeline, Points, measured
from .protocol import Coeffs, MethodInfo, Param, Round, Spec

__all__ = ["Breadcrumbs", "BreadcrumbsTies"]

_GAMMA = Param(
    "gamma",
    "float",
    "fraction of the largest entries that is dropped; it gives way where density leaves no room for it",
    per_model=True,
    default=0.01,
    low=0.0,
    high=1.0,
)
_SOURCE = (
    "Davari and Belilovsky 2023, Model breadcrumbs, arXiv 2312.06795; mergekit sparsify.py; "
    "rezazzr/breadcrumbs src/task_vectors.py"
)
_FORMULA = (
    "target = floor(density n), top = floor(gamma n), bottom = max(0, n - target - top); "
    "d~t = the entries at positions bottom to bottom + target - 1 of ascending |dt|, the others 0; "
)
_DEFAULT = "mergekit 0.1.5's rules in float32, per tensor"
_DEVIATIONS = (
    "mergekit leaves the survivors among equal magnitudes to an unstable sort; here tie_policy decides",
    "density 1 also switches off the cut of the largest entries, as in mergekit (not in the paper's dialect)",
    "floor(density n) = 0 keeps nothing, as in mergekit",
)


class Breadcrumbs(Pipeline):
    """Model breadcrumbs with a weighted sum."""

    elections: ClassVar[Mapping[str, Election]] = {"default": "none", "paper": "none"}
    info = MethodInfo(
        name="breadcrumbs",
        purpose="Drop the largest outliers and the small noise of each task vector, add the rest.",
        formula=_FORMULA + "y = x0 + lambda (w1 d~1 + ... + wT d~T) / v; v = 1, or with normalize the sum of the "
        "weights (1 if it is below 1e-8 in magnitude)",
        params=(
            weight("weight of each task vector", optional_in=("paper",)),
            DENSITY,
            _GAMMA,
            LAMBDA,
            Param("normalize", "bool", "divide by the sum of the weights", default=False),
            RESCALE,
            SCOPE,
            TIE_POLICY,
            Param(
                "remove_first",
                "bool",
                "dialect paper: drop the largest before the kept are counted; false counts them among the kept",
                default=True,
            ),
            INT8_MASK,
        ),
        base="required",
        modifiable=True,
        passes="2 reads (a third where ties overflow the candidates), 1 write; dialect paper 1 read, 1 write; rescale "
        "adds a read",
        source=_SOURCE,
        dialects={
            "default": _DEFAULT,
            "paper": "the authors' code, per row of the last dimension, length m: of each row the floor(gamma m) "
            "largest are dropped and the floor(density m) largest of the rest kept",
        },
        deviations=(
            *_DEVIATIONS,
            "paper: rows shorter than 1 / density become zero, as in the authors' code; a warning is logged",
        ),
    )

    def check(self, params: Mapping[str, Any], dialect: str, nan: str) -> list[str]:
        """Rows have neither scope nor tie policy; only they have an order."""
        problems = super().check(params, dialect, nan)
        if dialect == "paper":
            for name in ("scope", "tie_policy"):
                if params[name] is not None and (name, params[name]) != ("scope", "tensor"):
                    problems.append(f"the paper's dialect ranks each row by itself; expected no {name}")
        elif not params.get("remove_first", True):
            problems.append(f"remove_first: false is the paper's; expected dialect paper; got dialect {dialect}")
        return problems

    def scope(self, params: Mapping[str, Any], dialect: str) -> Literal["tensor", "model"]:
        """Rows belong to their tensor."""
        return "tensor" if dialect == "paper" else super().scope(params, dialect)

    def start(self, spec: Spec) -> Round | Coeffs:
        """The two cuts of each model."""
        if spec.dialect == "paper" and spec.n and spec.shape != ():
            length = self._row(spec)
            for t, density in enumerate(spec.params["density"]):
                if density > 0.0 and int(density * length) == 0:
                    logging.getLogger("mergekernels").warning(
                        "%s: density %g keeps no entry of rows of length %d, so nothing of model %d remains",
                        spec.name or "breadcrumbs",
                        density,
                        length,
                        t,
                    )
        return super().start(spec)

    def searches(self, spec: Spec) -> tuple[tuple[int, int], ...]:
        """The k of what passes the lower cut and of what the upper cut drops."""
        if spec.dialect == "paper":
            return ()
        n = measured(spec, self.scope(spec.params, spec.dialect)).n
        found: list[tuple[int, int]] = []
        for t, (wide, top) in enumerate(self._cuts(spec, n)):
            if wide > top:
                found += [(t, k) for k in (wide, top) if 0 < k < n]
        return tuple(found)

    def rules(self, spec: Spec, points: Points) -> tuple[KeepRule | None, ...]:
        """Bands per tensor, or per row."""
        if spec.dialect == "paper":
            return self._row_bands(spec)
        n = measured(spec, self.scope(spec.params, spec.dialect)).n
        rules: list[KeepRule | None] = []
        for t, (wide, top) in enumerate(self._cuts(spec, n)):
            if wide <= top:
                rules.append(KEEP_NOTHING)
            elif top == 0:
                rules.append(points.get((t, wide)))
            else:
                rules.append(Band(points.get((t, wide)), points[t, top]))
        return tuple(rules)

    def rows(self, spec: Spec) -> Rows | None:
        """Rows of the last dimension."""
        return Rows(self._row(spec))

    @staticmethod
    def _row(spec: Spec) -> int:
        return max(1, spec.shape[-1] if spec.shape else spec.n)

    @staticmethod
    def _cuts(spec: Spec, n: int) -> list[tuple[int, int]]:
        """Per model how many of the largest entries pass the lower cut, and how many of them the upper cut drops."""
        cuts = []
        for density, gamma in zip(spec.params["density"], spec.params["gamma"], strict=True):
            if density >= 1.0:
                cuts.append((n, 0))
                continue
            target, top = int(density * n), int(gamma * n)
            bottom = max(0, n - target - top)
            cuts.append((n - bottom, n - bottom - target) if target else (0, 0))
        return cuts

    def _row_bands(self, spec: Spec) -> tuple[KeepRule | None, ...]:
        length = self._row(spec)
        rules: list[KeepRule | None] = []
        for density, gamma in zip(spec.params["density"], spec.params["gamma"], strict=True):
            first, kept = int(length * gamma), int(length * density)
            last = min(length, first + kept) if spec.params["remove_first"] else max(first, kept)
            if spec.shape == ():  # a number has no rows: the authors' code leaves it alone
                rules.append(None)
            elif first == last:
                rules.append(KEEP_NOTHING)
            else:
                rules.append(None if first == 0 and last == length else RankBand(first, last))
        return tuple(rules)


class BreadcrumbsTies(Breadcrumbs):
    """Model breadcrumbs with the sign election of TIES."""

    elections: ClassVar[Mapping[str, Election]] = {"default": "weighted"}
    info = MethodInfo(
        name="breadcrumbs_ties",
        purpose="Drop the largest outliers and the small noise of each task vector, elect signs, add what agrees.",
        formula=_FORMULA + "s = +1 if w1 d~1 + ... + wT d~T >= 0, else -1; "
        "y = x0 + lambda (sum of the wt d~t of sign s), with normalize divided by the sum of their wt",
        params=(
            weight("weight of each task vector, applied before the vote"),
            DENSITY,
            _GAMMA,
            LAMBDA,
            Param("normalize", "bool", "divide by the weights of the models that agree", default=False),
            RESCALE,
            SCOPE,
            TIE_POLICY,
            ZERO_VOTE,
            INT8_MASK,
        ),
        base="required",
        modifiable=True,
        passes="2 reads (a third where ties overflow the candidates), 1 write; rescale adds a read",
        source=_SOURCE,
        dialects={"default": _DEFAULT},
        deviations=_DEVIATIONS,
    )
