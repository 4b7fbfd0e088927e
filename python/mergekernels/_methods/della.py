"""della and della_linear: random masks that favour the large entries of each row."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any, ClassVar

from ..ops.keep import KEEP_NOTHING, KeepRule, RankDraw, Rows
from .common import INT8_MASK, LAMBDA, weight
from .pipeline import DENSITY, SCOPE, ZERO_VOTE, Election, Pipeline, Points
from .protocol import MethodInfo, Param, Spec

__all__ = ["Della", "DellaLinear"]

_EPSILON = Param(
    "epsilon",
    "float",
    "half the range of the keep probability; density - epsilon > 0 and density + epsilon < 1 unless density is 0 or 1",
    per_model=True,
    default=0.15,
    low=0.0,
    high=0.5,
)
_RESCALE = Param(
    "rescale",
    "bool",
    "make up for what is dropped: by sum |d| / sum |kept d| of the tensor (1 if either is below 1e-7), in the paper's "
    "dialect by 1 / (probability that the entry is kept)",
    default=True,
)
_RANK_DIM = Param(
    "rank_dim",
    "int",
    "dimension along which entries are ranked, -1 for the last; tensors with fewer are ranked along their last",
    default=1,
    low=-1,
    high=63,
)
_FORMULA = (
    "row of length m, rank r = 1 (smallest |dt|) to m: keep if the element's random word is below "
    "floor((density - epsilon) 2^32) + ((r - 1) floor(2 epsilon 2^32)) div (m - 1); "
    "d~t = ft (kept dt) with ft = sum |dt| / sum |kept dt|; "
)
_SOURCE = (
    "Deep et al. 2024, DELLA-Merging, arXiv 2406.11617; mergekit sparsify.py; "
    "declare-lab/della mergekit/mergekit/sparsify.py"
)
_DIALECTS = {
    "default": "mergekit 0.1.5's rules in float32: L1 rescale",
    "paper": "the authors' code: a kept entry is divided by its own keep probability; epsilon is half of their window",
}
_DEVIATIONS = (
    "masks come from Philox by (seed, tensor, model, element), so they differ from every other tool's for the same "
    "seed",
    "ranks are integers; mergekit keeps them in the checkpoint's dtype, where 14,336 ranks collapse to 993 in bfloat16",
    "in a row of one entry the keep probability is density; mergekit fails there",
    "equal magnitudes rank by their random words; mergekit leaves them to an unstable sort",
)


class DellaLinear(Pipeline):
    """DELLA with a weighted sum."""

    elections: ClassVar[Mapping[str, Election]] = {"default": "none", "paper": "none"}
    info = MethodInfo(
        name="della_linear",
        purpose="Drop entries at random, small ones of each row more often, rescale the rest, add.",
        formula=_FORMULA + "y = x0 + lambda (w1 d~1 + ... + wT d~T) / v; v = 1, or with normalize the sum of the "
        "weights (1 if it is below 1e-8 in magnitude)",
        params=(
            weight("weight of each task vector"),
            DENSITY,
            _EPSILON,
            LAMBDA,
            Param("normalize", "bool", "divide by the sum of the weights", default=False),
            _RESCALE,
            _RANK_DIM,
            INT8_MASK,
        ),
        base="required",
        modifiable=True,
        tier="T1",
        passes="2 reads (rows that do not fit on chip are read more often), 1 write; dialect paper or without rescale "
        "1 read, 1 write",
        source=_SOURCE,
        dialects=_DIALECTS,
        deviations=_DEVIATIONS,
    )

    def check(self, params: Mapping[str, Any], dialect: str, nan: str) -> list[str]:
        """Keep probabilities lie strictly between 0 and 1."""
        problems = super().check(params, dialect, nan)
        for t, (density, epsilon) in enumerate(zip(params["density"], params["epsilon"], strict=True)):
            if 0.0 < density < 1.0 and not (density - epsilon > 0.0 and density + epsilon < 1.0):
                problems.append(
                    f"epsilon of model {t} is too large for its density; expected density - epsilon > 0 and "
                    f"density + epsilon < 1; got density {density!r} and epsilon {epsilon!r}"
                )
        return problems

    def searches(self, spec: Spec) -> tuple[tuple[int, int], ...]:
        """No points: ranks are taken where they are needed."""
        return ()

    def rules(self, spec: Spec, points: Points) -> tuple[KeepRule | None, ...]:
        """A rank-dependent draw per model."""
        divide = spec.dialect == "paper" and spec.params["rescale"]
        pairs = zip(spec.params["density"], spec.params["epsilon"], strict=True)
        return tuple(_draw(density, epsilon, divide) for density, epsilon in pairs)

    def wants_norms(self, spec: Spec) -> tuple[bool, ...]:
        """L1 norms in the default dialect only."""
        wanted = super().wants_norms(spec)
        return wanted if spec.dialect == "default" else (False,) * len(wanted)

    def rows(self, spec: Spec) -> Rows | None:
        """The rows along `rank_dim`."""
        shape = spec.shape or (max(1, spec.n),)
        dim = spec.params["rank_dim"]
        dim = len(shape) - 1 if dim < 0 else min(dim, len(shape) - 1)
        return Rows(max(1, shape[dim]), max(1, prod(shape[dim + 1 :])))


def _draw(density: float, epsilon: float, divide: bool) -> KeepRule | None:
    if density >= 1.0:
        return None
    if density <= 0.0:
        return KEEP_NOTHING
    unit = 2.0**32
    return RankDraw(int((density - epsilon) * unit), int(2.0 * epsilon * unit), int(density * unit), divide)


class Della(DellaLinear):
    """DELLA with the sign election of TIES."""

    elections: ClassVar[Mapping[str, Election]] = {"default": "weighted", "paper": "weighted"}
    info = MethodInfo(
        name="della",
        purpose="Drop entries at random, small ones of each row more often, rescale the rest, elect signs, average.",
        formula=_FORMULA + "s = +1 if w1 d~1 + ... + wT d~T >= 0, else -1; "
        "y = x0 + lambda (sum of the wt d~t of sign s) / (sum of their wt)",
        params=(
            weight("weight of each task vector, applied before the vote"),
            DENSITY,
            _EPSILON,
            LAMBDA,
            Param("normalize", "bool", "divide by the weights of the models that agree", default=True),
            _RESCALE,
            _RANK_DIM,
            SCOPE,
            ZERO_VOTE,
            INT8_MASK,
        ),
        base="required",
        modifiable=True,
        tier="T1",
        passes=DellaLinear.info.passes,
        source=_SOURCE,
        dialects=_DIALECTS,
        deviations=_DEVIATIONS,
    )
