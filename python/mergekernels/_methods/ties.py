"""ties: trim each task vector, elect one sign per coordinate, average what agrees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, cast

from ..ops.keep import KEEP_NOTHING, Keep
from ..ops.program import Program
from ..ops.selection import Scope, Selection, localise
from .common import INT8_MASK, LAMBDA, check_factors, weight
from .protocol import Coeffs, MethodInfo, Param, Round, Spec, Stats

if TYPE_CHECKING:
    from .._cpu import StreamStats, SweepStats

__all__ = ["Ties"]


class Ties:
    """TIES-merging in the default (mergekit) and the paper's dialect, trimming per tensor or over the model."""

    info = MethodInfo(
        name="ties",
        purpose="Keep the largest entries of each task vector, vote one sign per coordinate, average what agrees.",
        formula=(
            "d~t = the max(1, floor(density n)) entries of largest |dt|, the others 0; "
            "s = +1 if w1 d~1 + ... + wT d~T >= 0, else -1; "
            "y = x0 + lambda (sum of the wt d~t of sign s) / (sum of their wt)"
        ),
        params=(
            weight("weight of each task vector, applied before the vote", optional_in=("paper",)),
            Param(
                "density",
                "float",
                "fraction of each task vector that is kept",
                per_model=True,
                default=1.0,
                low=0.0,
                high=1.0,
            ),
            LAMBDA,
            Param(
                "normalize", "bool", "divide by the weights (paper: the number) of the models that agree", default=True
            ),
            Param(
                "scope",
                "str",
                "what density counts over; tensor, in the paper's dialect model",
                default=None,
                choices=("tensor", "model"),
            ),
            Param(
                "tie_policy",
                "str",
                "who survives among equal magnitudes; hash, in the paper's dialect all",
                default=None,
                choices=("hash", "index", "all"),
            ),
            Param(
                "zero_vote",
                "str",
                "sign where the vote is zero; positive, in the paper's dialect majority",
                default=None,
                choices=("positive", "majority", "zero"),
            ),
            Param("rescale", "bool", "L1 rescale after trimming; not available yet", default=False),
            INT8_MASK,
        ),
        base="required",
        modifiable=True,
        passes="scope tensor: 2 reads (a third where ties overflow the candidates), 1 write; scope model: 2 to 4 "
        "sweeps of the checkpoint and 1 writing pass",
        source="Yadav et al. 2023, TIES-Merging, arXiv 2306.01708; mergekit "
        "merge_methods/generalized_task_arithmetic.py; prateeky2806/ties-merging src/utils/merge_utils.py",
        dialects={
            "default": "mergekit 0.1.5's rules in float32: exactly max(1, floor(density n)) kept, weighted vote, "
            "zero counts as +1, divisor the weights that agree",
            "paper": "the authors' code: all |d| >= the floor(density n)+1-th largest kept, unweighted vote, "
            "zero takes the majority "
            "sign of the scope, divisor the number that agree; weights other than 1 are refused",
        },
        deviations=(
            "mergekit leaves the survivors among equal magnitudes to an unstable sort; here tie_policy decides",
            "mergekit works in the checkpoint's dtype; here deltas are float32 and the output is rounded once",
            "density outside [0, 1] is refused; mergekit takes the nearer end",
            "int8_mask has no effect on the result, as in mergekit up to the dtype of a comparison",
        ),
    )

    def check(self, params: Mapping[str, Any], dialect: str, nan: str) -> list[str]:
        """The paper has no weights; rescale is not available yet."""
        problems = []
        if dialect == "paper" and any(w not in (None, 1.0) for w in params["weight"]):
            problems.append(f"the paper's dialect has no weights; expected weight 1; got {list(params['weight'])}")
        if params["rescale"]:
            problems.append(
                "rescale: true is not available for ties in this version, it is planned with the reducing methods; "
                "expected false; got true"
            )
        return problems

    def scope(self, params: Mapping[str, Any], dialect: str) -> Literal["tensor", "model"]:
        """The scope asked for, else the dialect's."""
        asked = params["scope"]
        return cast(Literal["tensor", "model"], asked or ("model" if dialect == "paper" else "tensor"))

    def start(self, spec: Spec) -> Round | Coeffs:
        """The selection of the largest entries, unless every density is 0 or 1."""
        check_factors(spec, "weight", "lambda")
        scope = self.scope(spec.params, spec.dialect)
        n = spec.scope.n
        points: list[Keep | None] = []
        ks: list[int | None] = []
        for density in spec.params["density"]:
            k = self._count(density, n, spec.dialect)
            points.append(KEEP_NOTHING if k == 0 else None)
            ks.append(k if 0 < k < n else None)
        coeffs = Coeffs(tuple(points), self._fixed_vote(spec))
        if all(k is None for k in ks):
            return self._vote(spec, coeffs)
        selection = Selection.start(
            tuple(ks), _scope(spec, scope), policy=self._policy(spec), seed=spec.seed, base=True
        )
        return Round("select", scope, selection=selection, coeffs=coeffs)

    def resolve(self, spec: Spec, round_: Round, stats: Stats, visited: int) -> Round | Coeffs:
        """One more sweep, or the majority vote, or the coefficients."""
        assert round_.coeffs is not None
        if round_.op == "votes":
            positive, negative = cast("StreamStats", stats).votes()
            return replace(round_.coeffs, zero_vote=(positive > negative) - (positive < negative))
        assert round_.selection is not None
        selection = round_.selection.advance(cast("SweepStats", stats), visited)
        if not selection.done:
            return replace(round_, selection=selection)
        known = round_.coeffs.points
        points = tuple(p if p is not None else q for p, q in zip(selection.points, known, strict=True))
        return self._vote(spec, replace(round_.coeffs, points=points))

    def apply(self, spec: Spec, coeffs: Coeffs) -> Program:
        """Trim at the points, elect, average, add."""
        check_factors(spec, "weight", "lambda")
        paper = spec.dialect == "paper"
        normalize = spec.params["normalize"]
        return Program(
            weights=(1.0,) * spec.num_models if paper else spec.params["weight"],
            keep=tuple(localise(p, spec.offset, spec.n) for p in coeffs.points),
            vote="weighted",
            zero_vote=coeffs.zero_vote,
            divisor=("agreeing_count" if paper else "agreeing_weights") if normalize else "none",
            scale=spec.params["lambda"],
            seed=spec.seed,
            tensor=spec.tensor,
        )

    @staticmethod
    def _count(density: float, n: int, dialect: str) -> int:
        """How many entries are kept, at most n."""
        if density <= 0.0 or n == 0:
            return 0
        if density >= 1.0:
            return n
        kept = int(density * n)
        return min(n, kept + 1) if dialect == "paper" else max(1, kept)

    @staticmethod
    def _policy(spec: Spec) -> Literal["hash", "index", "all"]:
        return cast(
            Literal["hash", "index", "all"],
            spec.params["tie_policy"] or ("all" if spec.dialect == "paper" else "hash"),
        )

    @staticmethod
    def _wants_majority(spec: Spec) -> bool:
        return (spec.params["zero_vote"] or ("majority" if spec.dialect == "paper" else "positive")) == "majority"

    @staticmethod
    def _fixed_vote(spec: Spec) -> int:
        return 0 if spec.params["zero_vote"] == "zero" else 1

    def _vote(self, spec: Spec, coeffs: Coeffs) -> Round | Coeffs:
        """A round that counts the elected signs, where the dialect needs their majority."""
        if not self._wants_majority(spec):
            return coeffs
        return Round("votes", self.scope(spec.params, spec.dialect), coeffs=coeffs)


def _scope(spec: Spec, scope: Literal["tensor", "model"]) -> Scope:
    """The scope of the selection: the model, or this tensor by itself."""
    if scope == "model":
        return spec.scope
    return Scope((0,), (spec.tensor,), spec.n, spec.scope.compute)
