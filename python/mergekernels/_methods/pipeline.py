"""Sparsify, rescale, weigh, elect, combine: the pipeline that ties, dare, della and breadcrumbs share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isfinite, isnan
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from ..ops.arguments import in_compute
from ..ops.keep import Keep, KeepRule, RankBand, RankDraw, Rows
from ..ops.program import Program
from ..ops.selection import Scope, Selection, localise
from ..ops.sums import Reduce, Sums
from .common import check_factors, safe_sum, spoiled
from .protocol import Coeffs, MethodInfo, Param, Round, Spec, Stats

if TYPE_CHECKING:
    from .._cpu import StreamStats, SweepStats

__all__ = [
    "DENSITY",
    "MAJORITY",
    "RESCALE",
    "SCOPE",
    "TIE_POLICY",
    "ZERO_VOTE",
    "Election",
    "Pipeline",
    "Points",
    "Resolved",
    "measured",
    "place",
]

DENSITY = Param(
    "density",
    "float",
    "fraction of each task vector that is kept; 1 keeps everything, 0 nothing",
    per_model=True,
    default=1.0,
    low=0.0,
    high=1.0,
)
RESCALE = Param(
    "rescale",
    "bool",
    "multiply each trimmed task vector by sum |d| / sum |trimmed d| of its tensor (1 if either is below 1e-7)",
    default=False,
)
SCOPE = Param(
    "scope",
    "str",
    "what density and a majority count over; tensor, in dialect paper of ties and dare_ties model",
    default=None,
    choices=("tensor", "model"),
)
TIE_POLICY = Param(
    "tie_policy",
    "str",
    "who survives among equal magnitudes; hash, in the paper's dialect all",
    default=None,
    choices=("hash", "index", "all"),
)
ZERO_VOTE = Param(
    "zero_vote",
    "str",
    "sign where the vote is zero; positive, in the paper's dialect majority",
    default=None,
    choices=("positive", "majority", "zero"),
)
MAJORITY = Param(
    "majority_sign_method",
    "str",
    "what elects a sign: the sum of the task vectors, or the number of signs (dialect peft)",
    default="total",
    choices=("total", "frequency"),
)

Election = Literal["none", "weighted", "paper", "peft"]
Points = Mapping[tuple[int, int], Keep]
"""(model, k) -> the point that the k largest entries of that model pass."""

_TINY_NORM = 1e-7


@dataclass(frozen=True)
class Resolved(Coeffs):
    """points: in the order of `Pipeline.searches`. factors: for each tensor of the scope, one number per model; () if
    they do not depend on data.
    """

    factors: tuple[tuple[float, ...], ...] = ()


def measured(spec: Spec, scope: Literal["tensor", "model"]) -> Scope:
    """The scope of a selection: the model, or this tensor by itself."""
    if scope == "model":
        return spec.scope
    return Scope((0,), (spec.tensor,), spec.n, spec.scope.compute)


def paper_count(share: float, n: int) -> int:
    """How many of n entries the trim of the TIES paper keeps: all |d| from the floor(share n)+1-th largest on."""
    return 0 if share <= 0.0 or n == 0 else n if share >= 1.0 else min(n, int(share * n) + 1)


def place(spec: Spec) -> int:
    """The number of this tensor in its scope."""
    return max(0, bisect_right(spec.scope.offsets, spec.offset) - 1)


class Pipeline(ABC):
    """y = x0 + lambda (combination of the w_t f_t sparsified d_t), see `Program`.

    A subclass says which points it searches and which rule they make; the rounds, the L1 rescale and the election are
    here. elections : dialect -> how signs are elected and what divides: "none"; "weighted" (mergekit: the weighted sum
    votes, zero is +1, divisor the weights that agree); "paper" (unweighted, zero takes the majority, divisor the number
    that agree); "peft" (unweighted vote, weights afterwards, zero is +1, divisor the number that agree).
    normalizes : dialects in which `normalize` defaults to true.
    """

    info: MethodInfo
    elections: ClassVar[Mapping[str, Election]]
    normalizes: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def searches(self, spec: Spec) -> tuple[tuple[int, int], ...]:
        """The (model, k) whose points the rules need, 1 <= k <= n."""

    @abstractmethod
    def rules(self, spec: Spec, points: Points) -> tuple[KeepRule | None, ...]:
        """What each model keeps; None keeps everything."""

    def draws(self, spec: Spec) -> tuple[int, ...]:
        """Thresholds of the draws, one per model, if only drawn entries are ranked."""
        return ()

    def fixed_factors(self, spec: Spec) -> tuple[float, ...]:
        """Factors of the sparsified task vectors that need no data."""
        return ()

    def wants_norms(self, spec: Spec) -> tuple[bool, ...]:
        """The models whose sparsified task vectors are rescaled to their L1 norm."""
        return tuple(spec.params["rescale"] and 0.0 < d < 1.0 for d in spec.params["density"])

    def rows(self, spec: Spec) -> Rows | None:
        """The rows of rules that rank."""
        return None

    def check(self, params: Mapping[str, Any], dialect: str, nan: str) -> list[str]:
        """Votes without weights take none, and a majority needs the weighted vote or none."""
        problems = []
        election = self.elections[dialect]
        if election == "paper" and any(w not in (None, 1.0) for w in params["weight"]):
            problems.append(f"the paper's dialect has no weights; expected weight 1; got {list(params['weight'])}")
        if election != "peft" and params.get("majority_sign_method", "total") != "total":
            problems.append("majority_sign_method: frequency is a vote of PEFT; expected dialect peft")
        if election == "peft" and params.get("zero_vote") == "majority":
            problems.append("zero_vote: majority is not available in dialect peft; expected positive or zero")
        return problems

    def scope(self, params: Mapping[str, Any], dialect: str) -> Literal["tensor", "model"]:
        """The scope asked for, else the dialect's."""
        asked = params.get("scope")
        return cast(Literal["tensor", "model"], asked or ("model" if self.elections[dialect] == "paper" else "tensor"))

    def start(self, spec: Spec) -> Round | Coeffs:
        """The selection, if points are needed."""
        check_factors(spec, "weight", "lambda")
        coeffs = Resolved((), 0 if spec.params.get("zero_vote") == "zero" else 1)
        scope = self.scope(spec.params, spec.dialect)
        searches = self.searches(spec)
        if not searches:
            return self._norms(spec, coeffs)
        draws = self.draws(spec)
        selection = Selection.of(
            searches,
            measured(spec, scope),
            policy=self.tie_policy(spec),
            seed=spec.seed,
            base=True,
            key="drawn" if draws else "delta",
            draws=draws,
        )
        return Round("select", scope, selection=selection, coeffs=coeffs)

    def resolve(self, spec: Spec, round_: Round, stats: Stats, visited: int) -> Round | Coeffs:
        """One more sweep, or the norms, or the majority vote, or the coefficients."""
        coeffs = cast(Resolved, round_.coeffs)
        if round_.op == "votes":
            positive, negative = cast("StreamStats", stats).votes()
            return replace(coeffs, zero_vote=(positive > negative) - (positive < negative))
        if round_.op == "reduce":
            sums = cast(Sums, stats)
            wanted = self.wants_norms(spec)
            factors = tuple(_ratios(sums, i, wanted) for i in range(len(sums.values)))
            return self._vote(spec, replace(coeffs, factors=factors))
        assert round_.selection is not None
        selection = round_.selection.advance(cast("SweepStats", stats), visited)
        if not selection.done:
            return replace(round_, selection=selection)
        return self._norms(spec, replace(coeffs, points=selection.points))

    def apply(self, spec: Spec, coeffs: Coeffs) -> Program:
        """Sparsify, rescale, elect, combine, add."""
        check_factors(spec, "weight", "lambda")
        found = cast(Resolved, coeffs)
        points = {}
        for search, point in zip(self.searches(spec), found.points, strict=True):
            points[search] = cast(Keep, localise(point, spec.offset, spec.n))
        keep = self.rules(spec, points)
        factors = found.factors[place(spec)] if found.factors else self.fixed_factors(spec)
        if not all(isfinite(in_compute(f, spec.compute)) for f in factors):
            return spoiled(spec)
        ranked = any(isinstance(rule, (RankDraw, RankBand)) for rule in keep)
        program = Program(
            spec.params["weight"],
            keep,
            scale=spec.params["lambda"],
            seed=spec.seed,
            tensor=spec.tensor,
            factors=factors if any(f != 1.0 for f in factors) else (),
            rows=self.rows(spec) if ranked else None,
        )
        return self._elect(spec, program, found.zero_vote)

    def tie_policy(self, spec: Spec) -> Literal["hash", "index", "all"]:
        """Who survives among equal magnitudes."""
        asked = spec.params.get("tie_policy")
        paper = self.elections[spec.dialect] == "paper"
        return cast(Literal["hash", "index", "all"], asked or ("all" if paper else "hash"))

    def _elect(self, spec: Spec, program: Program, zero_vote: int) -> Program:
        """The program with its vote and divisor."""
        election = self.elections[spec.dialect]
        normalize = spec.params["normalize"]
        if normalize is None:
            normalize = spec.dialect in self.normalizes
        if election == "none":
            if not normalize:
                return program
            return replace(program, divisor="value", divisor_value=safe_sum(spec, spec.params["weight"]))
        if election == "peft":
            frequency = spec.params["majority_sign_method"] == "frequency"
            program = replace(program, vote="count" if frequency else "plain", zero_vote=zero_vote)
        else:
            weights = (1.0,) * spec.num_models if election == "paper" else program.weights
            program = replace(program, weights=weights, vote="weighted", zero_vote=zero_vote)
        if not normalize:
            return program
        return replace(program, divisor="agreeing_weights" if election == "weighted" else "agreeing_count")

    def _norms(self, spec: Spec, coeffs: Resolved) -> Round | Coeffs:
        """A round that sums what the L1 rescale needs."""
        if not any(self.wants_norms(spec)):
            return self._vote(spec, coeffs)
        scope = self.scope(spec.params, spec.dialect)
        return Round("reduce", scope, coeffs=coeffs, reduce=Reduce(("abs", "kept_abs")))

    def _vote(self, spec: Spec, coeffs: Resolved) -> Round | Coeffs:
        """A round that counts the elected signs, where their majority is needed."""
        election = self.elections[spec.dialect]
        default = "majority" if election == "paper" else "positive"
        if election == "none" or (spec.params["zero_vote"] or default) != "majority":
            return coeffs
        return Round("votes", self.scope(spec.params, spec.dialect), coeffs=coeffs)


def _ratios(sums: Sums, tensor: int, wanted: tuple[bool, ...]) -> tuple[float, ...]:
    """The ratio sum |d| / sum |kept d| for each model that wants it; NaN where a sum is not finite."""
    ratios = []
    for t, want in enumerate(wanted):
        before, after = sums.number(t, tensor), sums.number(len(wanted) + t, tensor)
        if not want or before < _TINY_NORM or after < _TINY_NORM:
            ratios.append(1.0)
        else:
            ratios.append(before / after if isfinite(after) and not isnan(before) else float("nan"))
    return tuple(ratios)
