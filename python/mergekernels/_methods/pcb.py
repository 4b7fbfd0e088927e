"""pcb: weights per entry from its size within its task vector and from its agreement with the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isfinite
from typing import TYPE_CHECKING, Any, Literal, cast

from ..ops.keep import Keep
from ..ops.program import Balance, Program
from ..ops.selection import Scope, Selection
from .common import check_factors, from_key, spoiled
from .pipeline import measured
from .protocol import Coeffs, MethodInfo, Param, Round, Spec, Stats

if TYPE_CHECKING:
    from .._cpu import SweepStats

__all__ = ["Pcb"]

_EPSILON = 1e-12


@dataclass(frozen=True)
class _Competition(Coeffs):
    """balance: how each model competes, its cut and top still 0 while they are searched. finite: all are numbers."""

    balance: tuple[Balance, ...] = ()
    finite: bool = True


class Pcb:
    """Parameter competition balancing."""

    info = MethodInfo(
        name="pcb",
        purpose="Average task vectors with weights per entry that favour large entries on which the tasks agree.",
        formula="per model, positions in ascending order over the scope of n entries: at = |dt| clipped to its values "
        "at floor(n clip) and floor(n (1 - clip) - 1); m = at scaled to [0, 1]; z = max(0, exp(T m^2) tanh(dt (d1 + "
        "... + dT))); ct = z raised to its value at floor(n (1 - ratio)), scaled to [0, 1]; "
        "y = x0 + lambda (sum of ct sgn(dt) at) / max(sum of ct, 1e-12)",
        params=(
            Param(
                "ratio", "float", "share of each task vector that competes; 0.05 to 0.1", default=0.1, low=0.0, high=1.0
            ),
            Param("lambda", "float", "scale of the merged task vector; 0.8 to 1.3", python="scale", default=1.2),
            Param(
                "clip",
                "float",
                "share of the smallest and of the largest magnitudes that are clipped",
                default=1e-4,
                low=0.0,
                high=0.5,
            ),
            Param(
                "scope",
                "str",
                "what the positions count over",
                default="model",
                choices=("tensor", "model"),
            ),
        ),
        base="required",
        modifiable=True,
        passes="scope model: 1 or 2 sweeps of the checkpoint for the clipping, 1 or 2 for the competition, 1 writing "
        "pass",
        source="Du et al. 2024, Parameter competition balancing for model merging, arXiv 2410.02396; "
        "duguodong7/pcb-merging pcb-merging.py",
        dialects={"default": "the authors' code (their vision script clips 1e-2)"},
        deviations=(
            "where all values are equal the authors' scaling to [0, 1] is 0/0; here it gives 0",
            "z is never negative: it matters only where fewer entries than ratio agree with the sum",
            "exp and tanh are the package's own, correct to about one unit in the last place, the same everywhere",
            "one lambda for all models; the authors can search one for each",
        ),
    )

    def check(self, params: Mapping[str, Any], dialect: str, nan: str) -> list[str]:
        """Every combination works."""
        return []

    def scope(self, params: Mapping[str, Any], dialect: str) -> Literal["tensor", "model"]:
        """The scope asked for."""
        return cast(Literal["tensor", "model"], params["scope"])

    def start(self, spec: Spec) -> Round | Coeffs:
        """The bounds of the magnitudes."""
        check_factors(spec, "lambda")
        total = self._measured(spec)
        if total.n == 0:
            return _Competition(balance=(Balance(0.0, 0.0, float(spec.num_models)),) * spec.num_models)
        return self._round(spec, _Competition(), self._bounds(spec, total.n))

    def resolve(self, spec: Spec, round_: Round, stats: Stats, visited: int) -> Round | Coeffs:
        """The bounds, then the competition's threshold and largest value."""
        coeffs = cast(_Competition, round_.coeffs)
        assert round_.selection is not None
        selection = round_.selection.advance(cast("SweepStats", stats), visited)
        if not selection.done:
            return replace(round_, selection=selection)
        values = [from_key(cast(Keep, p).tau, spec.compute) for p in selection.points]
        if not all(map(isfinite, values)):
            return replace(coeffs, finite=False)
        pairs = list(zip(values[::2], values[1::2], strict=True))
        if not coeffs.balance:
            balance = tuple(Balance(lo, hi, float(spec.num_models)) for lo, hi in pairs)
            return self._round(spec, replace(coeffs, balance=balance), self._shares(spec))
        balance = tuple(replace(b, cut=cut, top=top) for b, (cut, top) in zip(coeffs.balance, pairs, strict=True))
        return replace(coeffs, balance=balance)

    def apply(self, spec: Spec, coeffs: Coeffs) -> Program:
        """The weighted mean of the clipped task vectors."""
        check_factors(spec, "lambda")
        found = cast(_Competition, coeffs)
        if not found.finite:
            return spoiled(spec)
        count = spec.num_models
        return Program(
            (1.0,) * count,
            (None,) * count,
            merge="balance",
            balance=found.balance,
            epsilon=_EPSILON,
            scale=spec.params["lambda"],
        )

    def _measured(self, spec: Spec) -> Scope:
        return measured(spec, self.scope(spec.params, spec.dialect))

    def _round(self, spec: Spec, coeffs: _Competition, ks: tuple[int, int]) -> Round:
        """The search of two ranks for every model; equal keys need no order, since only the value counts."""
        ranks = tuple((t, k) for t in range(spec.num_models) for k in ks)
        selection = Selection.of(
            ranks,
            self._measured(spec),
            policy="all",
            seed=spec.seed,
            base=True,
            key="balance" if coeffs.balance else "delta",
            balance=coeffs.balance,
        )
        return Round("select", self.scope(spec.params, spec.dialect), selection=selection, coeffs=coeffs)

    @staticmethod
    def _bounds(spec: Spec, n: int) -> tuple[int, int]:
        """Ranks from the largest of the least and the greatest magnitude; the greatest is not below the least."""
        clip = spec.params["clip"]
        low = min(int(n * clip), n - 1)
        return n - low, n - max(low, int(n * (1.0 - clip) - 1.0))

    def _shares(self, spec: Spec) -> tuple[int, int]:
        """Ranks from the largest of the threshold and of the largest value."""
        n = self._measured(spec).n
        return n - min(int(n * (1.0 - spec.params["ratio"])), n - 1), 1
