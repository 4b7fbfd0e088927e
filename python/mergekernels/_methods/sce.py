"""sce: weights from the energy of the task vectors where they differ most, and one sign per coordinate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isfinite
from typing import TYPE_CHECKING, Any, Literal, cast

from ..ops.keep import KEEP_NOTHING, Keep
from ..ops.program import Program
from ..ops.selection import Selection, localise
from ..ops.sums import Reduce, Sums
from .common import INT8_MASK, spoiled
from .gram import exact_sum
from .protocol import Coeffs, MethodInfo, Param, Round, Spec, Stats

if TYPE_CHECKING:
    from .._cpu import SweepStats

__all__ = ["Sce"]

_DIVISOR_FLOOR = 1e-6


@dataclass(frozen=True)
class _Energies(Coeffs):
    """points: the one point on the variance, (None,) without a mask. weights: of the models, () while they are not
    known, None where an energy is not finite.
    """

    weights: tuple[float, ...] | None = ()


class Sce:
    """Select, calculate, erase."""

    info = MethodInfo(
        name="sce",
        purpose="Weigh the models of each tensor by the energy of their task vectors where these differ most, elect "
        "signs, average what agrees.",
        formula="V = variance of d1 ... dT per position; M = the floor(select_topk #{V > 0}) positions of largest V; "
        "ct = mean of (M dt)^2, divided by the sum over t; dt = M dt; s = +1 if d1 + ... + dT >= 0, else -1; "
        "y = x0 + (sum of the ct dt of sign s) / max(sum of their ct, 1e-6)",
        params=(
            Param(
                "select_topk",
                "float",
                "share of the positions that vary which is selected; 1 selects everything, 0 nothing",
                default=1.0,
                low=0.0,
                high=1.0,
            ),
            Param(
                "energy_floor",
                "float",
                "the models weigh alike where the sum of the mean energies is below this (or 0); mergekit has 1e-6",
                default=0.0,
                low=0.0,
            ),
            Param(
                "tie_policy",
                "str",
                "which of equal variances are selected",
                default="hash",
                choices=("hash", "index", "all"),
            ),
            INT8_MASK,
        ),
        base="required",
        modifiable=True,
        tier="T1",
        passes="3 reads (count and select, energies, merge) and a sample, 1 write; with select_topk 1 two reads",
        source="Wan et al. 2024, FuseChat, arXiv 2408.07990; mergekit merge_methods/sce.py; fanqiwan/FuseAI "
        "FuseChat/mergekit/mergekit/merge_methods/sce_merging.py",
        dialects={
            "default": "mergekit 0.1.5's rules in float32: positions that are not selected stay at the base, divisor "
            "at least 1e-6",
            "paper": "the authors' code: the selection shapes the weights only, votes and sums take all positions; "
            "divisor 0 becomes 1",
        },
        deviations=(
            "models weigh alike only where all energies are 0; mergekit already below a total of 1e-6, which is "
            "normal for lightly tuned models: energy_floor: 1e-6 does the same",
            "mergekit leaves the choice among equal variances to torch.topk; here tie_policy decides",
            "select_topk outside [0, 1] is refused; mergekit takes the nearer end",
        ),
    )

    def check(self, params: Mapping[str, Any], dialect: str, nan: str) -> list[str]:
        """Every combination works."""
        return []

    def scope(self, params: Mapping[str, Any], dialect: str) -> Literal["tensor", "model"]:
        """Each tensor by itself."""
        return "tensor"

    def start(self, spec: Spec) -> Round | Coeffs:
        """Look at a sample of the variances (at all of a small tensor), or go straight to the energies."""
        topk = spec.params["select_topk"]
        if spec.n == 0 or topk <= 0.0:
            return self._alike(spec, KEEP_NOTHING)
        if topk >= 1.0:
            return self._energies(_Energies((None,)))
        return Round("select", "tensor", selection=self._selection(spec, 1), coeffs=_Energies())

    def resolve(self, spec: Spec, round_: Round, stats: Stats, visited: int) -> Round | Coeffs:
        """From the count to the selection, its point, the energies, the weights."""
        coeffs = cast(_Energies, round_.coeffs)
        if round_.op == "reduce":
            sums = cast(Sums, stats)
            return replace(coeffs, weights=_shares([sums.number(t) for t in range(spec.num_models)], spec))
        assert round_.selection is not None
        selection, found = round_.selection, cast("SweepStats", stats)
        if selection.sample < 1.0:
            return replace(round_, selection=self._bracket(spec, selection, found, visited))
        if coeffs.points == ():
            k = int(spec.params["select_topk"] * (found.before(0) + found.inside(0)))
            if k == 0:
                return self._alike(spec, KEEP_NOTHING)
            selection = selection.ranked(k)
            coeffs = replace(coeffs, points=(None,))
        selection = selection.advance(found, visited)
        if not selection.done:
            return replace(round_, selection=selection, coeffs=coeffs)
        return self._energies(replace(coeffs, points=selection.points[-1:]))

    def _bracket(self, spec: Spec, sample: Selection, found: SweepStats, visited: int) -> Selection:
        """One sweep that counts the positions that vary and looks for the point where the sample expects it.

        The rank follows from the count, so that the sample's share of positions that vary stands in for it.
        """
        share = found.inside(0) / visited if visited else 0.0
        k = int(spec.params["select_topk"] * share * spec.n)
        return sample.ranked(min(max(k, 1), spec.n)).advance(found, visited).counted()

    def apply(self, spec: Spec, coeffs: Coeffs) -> Program:
        """The vote over the selected (paper: over all) positions; while the weights are unknown, the selection."""
        found = cast(_Energies, coeffs)
        if found.weights is None:
            return spoiled(spec)
        keep = (None,) * spec.num_models
        joint = localise(found.points[0], spec.offset, spec.n)
        if not found.weights:
            return Program((1.0,) * spec.num_models, keep, joint=joint, seed=spec.seed, tensor=spec.tensor)
        paper = spec.dialect == "paper"
        return Program(
            found.weights,
            keep,
            joint=None if paper else joint,
            vote="plain",
            divisor="agreeing_weights",
            divisor_floor=0.0 if paper else _DIVISOR_FLOOR,
            seed=spec.seed,
            tensor=spec.tensor,
        )

    @staticmethod
    def _selection(spec: Spec, k: int) -> Selection:
        policy = cast(Literal["hash", "index", "all"], spec.params["tie_policy"])
        return Selection.of(((0, k),), spec.scope, policy=policy, seed=spec.seed, base=True, key="variance")

    @staticmethod
    def _energies(coeffs: _Energies) -> Round:
        return Round("reduce", "tensor", coeffs=coeffs, reduce=Reduce(("kept_squares",)))

    @staticmethod
    def _alike(spec: Spec, point: Keep) -> Coeffs:
        return _Energies((point,), weights=(1.0 / spec.num_models,) * spec.num_models)


def _shares(energies: list[float], spec: Spec) -> tuple[float, ...] | None:
    """The energies over their sum; alike where there is none; None where it is not finite."""
    total = exact_sum(energies)
    if not isfinite(total):
        return None
    if total == 0.0 or total / spec.n < spec.params["energy_floor"]:
        return (1.0 / len(energies),) * len(energies)
    return tuple(e / total for e in energies)
