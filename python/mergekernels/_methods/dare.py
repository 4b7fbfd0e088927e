"""dare_linear and dare_ties: drop a random share of each task vector, rescale the rest, merge."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ..ops.keep import KEEP_NOTHING, Draw, Keep, KeepRule
from .common import INT8_MASK, LAMBDA, weight
from .pipeline import DENSITY, MAJORITY, SCOPE, ZERO_VOTE, Election, Pipeline, Points, measured, paper_count
from .protocol import MethodInfo, Param, Spec

__all__ = ["DareLinear", "DareTies"]

_RESCALE = Param(
    "rescale",
    "bool",
    "make up for what is dropped: by sum |d| / sum |kept d| of the tensor (1 if either is below 1e-7), in the dialects "
    "paper and peft by 1 / density",
    default=True,
)
_FORMULA = (
    "d~t = ft mt dt with mt = 1 where the element's random word is below floor(density 2^32), else 0; "
    "ft = sum |dt| / sum |mt dt|; "
)
_SOURCE = (
    "Yu et al. 2024, Language models are super Mario, arXiv 2311.03099; mergekit sparsify.py; "
    "yule-BUAA/MergeLM model_merging_methods/mask_weights_utils.py; peft utils/merge_utils.py"
)
_DEVIATIONS = (
    "masks come from Philox by (seed, tensor, model, element), so they differ from every other tool's for the same "
    "seed; mergekit draws from torch's global generator in the order of its schedule",
    "the keep probability is a multiple of 2^-32; mergekit rounds it to the checkpoint's dtype (0.53 to 0.53125 in "
    "bfloat16)",
    "with 1 / density a kept entry is multiplied by the rounded quotient; MergeLM and PEFT divide, which may differ "
    "in the last bit",
    "density 0 keeps nothing and divides by nothing; PEFT gives NaN",
    "MergeLM can mask linear layers only: in a recipe give density by filters",
)


class _Dare(Pipeline):
    """The random sparsifier."""

    def searches(self, spec: Spec) -> tuple[tuple[int, int], ...]:
        """No points: masks are drawn."""
        return ()

    def rules(self, spec: Spec, points: Points) -> tuple[KeepRule | None, ...]:
        """A draw per model."""
        return tuple(_draw(density) for density in spec.params["density"])

    def wants_norms(self, spec: Spec) -> tuple[bool, ...]:
        """L1 norms in the default dialect only."""
        wanted = super().wants_norms(spec)
        return wanted if spec.dialect == "default" else (False,) * len(wanted)

    def fixed_factors(self, spec: Spec) -> tuple[float, ...]:
        """1 / density in the other dialects."""
        if spec.dialect == "default" or not spec.params["rescale"]:
            return ()
        return tuple(1.0 / d if isinstance(_draw(d), Draw) else 1.0 for d in spec.params["density"])


def _draw(density: float) -> KeepRule | None:
    if density >= 1.0:
        return None
    threshold = int(density * 2.0**32)
    return Draw(threshold) if threshold > 0 else KEEP_NOTHING


class DareLinear(_Dare):
    """DARE with a weighted sum."""

    elections: ClassVar[Mapping[str, Election]] = {"default": "none", "paper": "none", "peft": "none"}
    info = MethodInfo(
        name="dare_linear",
        purpose="Drop a random share of each task vector, rescale the rest, add them.",
        formula=_FORMULA + "y = x0 + lambda (w1 d~1 + ... + wT d~T) / v; v = 1, or with normalize the sum of the "
        "weights (1 if it is below 1e-8 in magnitude)",
        params=(
            weight("weight of each task vector"),
            DENSITY,
            LAMBDA,
            Param("normalize", "bool", "divide by the sum of the weights", default=False),
            _RESCALE,
            INT8_MASK,
        ),
        base="required",
        modifiable=True,
        tier="T1",
        passes="2 reads, 1 write; with 1 / density or without rescale 1 read, 1 write",
        source=_SOURCE,
        dialects={
            "default": "mergekit 0.1.5's rules in float32: L1 rescale",
            "paper": "the paper's formula: kept entries times 1 / density (the authors' command line leaves that off)",
            "peft": "PEFT's adapter merging: kept entries times 1 / density",
        },
        deviations=_DEVIATIONS,
    )


class DareTies(_Dare):
    """DARE with the sign election of TIES, in the paper's dialect with its trim of what was drawn."""

    elections: ClassVar[Mapping[str, Election]] = {"default": "weighted", "paper": "paper", "peft": "peft"}
    normalizes = ("paper", "peft")
    info = MethodInfo(
        name="dare_ties",
        purpose="Drop a random share of each task vector, rescale the rest, elect signs and add what agrees.",
        formula=_FORMULA + "s = +1 if w1 d~1 + ... + wT d~T >= 0, else -1; "
        "y = x0 + lambda (sum of the wt d~t of sign s), with normalize divided by the sum of their wt",
        params=(
            weight("weight of each task vector, applied before the vote", optional_in=("paper",)),
            DENSITY,
            LAMBDA,
            Param(
                "normalize",
                "bool",
                "divide by the weights (paper and peft: the number) of the models that agree; false, in the dialects "
                "paper and peft true",
                default=None,
            ),
            _RESCALE,
            Param(
                "trim",
                "float",
                "dialect paper: share of the entries that the trim of TIES keeps of each masked task vector, all of "
                "equal magnitude at the cut among them; 0.2, and 1 does not trim",
                default=None,
                low=0.0,
                high=1.0,
            ),
            SCOPE,
            ZERO_VOTE,
            MAJORITY,
            INT8_MASK,
        ),
        base="required",
        modifiable=True,
        tier="T1",
        passes="2 reads, 1 write; with 1 / density or without rescale 1 read, 1 write; a majority adds a read, the "
        "paper's trim a sample and a read",
        source=_SOURCE,
        dialects={
            "default": "mergekit 0.1.5's rules in float32: L1 rescale, weighted vote, zero counts as +1, a sum",
            "paper": "MergeLM: kept entries times 1 / density, trimmed to the largest of the scope (zeros count as "
            "entries), then the unweighted vote of TIES, where zero takes the majority "
            "sign of the scope, divisor the number that agree; weights other than 1 are refused",
            "peft": "kept entries times 1 / density, unweighted vote by sum or by number of signs, zero counts as +1; "
            "weights after the vote, divisor the number that agree",
        },
        deviations=_DEVIATIONS,
    )

    def check(self, params: Mapping[str, Any], dialect: str, nan: str) -> list[str]:
        """The trim belongs to the paper's dialect."""
        problems = super().check(params, dialect, nan)
        if params["trim"] is not None and dialect != "paper":
            problems.append(f"trim is the paper's; expected dialect paper; got dialect {dialect}")
        return problems

    def searches(self, spec: Spec) -> tuple[tuple[int, int], ...]:
        """One point per model that is trimmed."""
        n, k = self._trimmed(spec)
        return tuple((t, k) for t, density in enumerate(spec.params["density"]) if density > 0.0 and 0 < k < n)

    def draws(self, spec: Spec) -> tuple[int, ...]:
        """The thresholds of `rules`."""
        return tuple(int(min(max(density, 0.0), 1.0) * 2.0**32) for density in spec.params["density"])

    def rules(self, spec: Spec, points: Points) -> tuple[KeepRule | None, ...]:
        """A draw per model, trimmed at its point."""
        drawn = super().rules(spec, points)
        _, k = self._trimmed(spec)
        if k == 0:
            return (KEEP_NOTHING,) * len(drawn)
        return tuple(_cut(rule, points.get((t, k))) for t, rule in enumerate(drawn))

    def _trimmed(self, spec: Spec) -> tuple[int, int]:
        """(entries of the scope, how many of a model the trim keeps)."""
        n = measured(spec, self.scope(spec.params, spec.dialect)).n
        if spec.dialect != "paper":
            return n, n
        trim = spec.params["trim"]
        return n, paper_count(0.2 if trim is None else trim, n)


def _cut(rule: KeepRule | None, point: Keep | None) -> KeepRule | None:
    if point is None:
        return rule
    return Draw(rule.threshold, point) if isinstance(rule, Draw) else point if rule is None else rule
