"""What the methods over matrices of full models share: parameters, which tasks count, the core of factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..common import LAMBDA
from ..matrix import MatrixSpec, Merged
from ..permatrix import MANY
from ..protocol import Param

if TYPE_CHECKING:
    import torch

    from ...adapters.model import Delta, Factors

__all__ = [
    "CONV",
    "COUNT_ZERO",
    "DIMS",
    "EXCLUDE",
    "EXPERTS",
    "LAMBDA",
    "MANY",
    "MEAN_OVER",
    "RANK_TOL",
    "WEIGHT",
    "Core",
    "Tasks",
    "core_of",
    "cut_of",
    "full_svd",
    "nothing",
    "tasks_of",
]

WEIGHT = Param(
    "weight",
    "float",
    "factor of each task vector, before anything else",
    python="weights",
    per_model=True,
    default=1.0,
)
EXCLUDE = Param(
    "exclude",
    "str",
    "patterns of tensor names, separated by commas, that get the mean of their task vectors (*text_projection*)",
    default="",
)
CONV = Param(
    "conv",
    "str",
    "tensors of more than two dimensions: flattened to (dim 0, rest), or the mean of their task vectors",
    default="flatten",
    choices=("flatten", "mean"),
)
EXPERTS = Param(
    "experts",
    "str",
    "patterns of names of three-dimensional tensors that hold one matrix per expert",
    default="*.experts.*",
)
RANK_TOL = Param(
    "rank_tol",
    "float",
    "singular values up to this times the largest one do not count; by default the larger side times 1.2e-7, at most "
    "1e-5",
    default=None,
    low=0.0,
    high=0.5,
)
COUNT_ZERO = Param("count_zero", "bool", "task vectors that are zero count in T", default=True)
DIMS = Param(
    "dims",
    "str",
    "what sizes derive from: q, the smaller side of the matrix, or its numerical rank",
    default="q",
    choices=("q", "rank"),
)
MEAN_OVER = Param(
    "mean_over",
    "str",
    "by what the sum of the singular values is divided: q, the smaller side; the rank; or the size of the core that "
    "factors are reduced to",
    default="q",
    choices=("q", "rank", "core"),
)


@dataclass(frozen=True)
class Tasks:
    """The task vectors that are not zero, weights multiplied in.

    live : dense tensors or Factors, all of one kind and dtype. count : T of the formulas. factored : all are Factors.
    """

    live: tuple[Any, ...]
    count: int
    factored: bool

    @property
    def factors(self) -> list[Factors]:
        """They, where they are factors."""
        return list(self.live)

    @property
    def dense(self) -> list[torch.Tensor]:
        """They, multiplied out where they are factors."""
        return [x.dense() for x in self.live] if self.factored else list(self.live)

    def total(self) -> Any:
        """Their sum: factors as long as these have less columns than the matrix's smaller side, else dense."""
        from ...ops import stack

        if not self.factored:
            return _sum(self.live)
        stacked = stack(self.live)
        return stacked if stacked.rank < min(stacked.shape) else stacked.dense()


def _sum(matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    """In their order; a lone one is returned itself."""
    if len(matrices) == 1:
        return matrices[0]
    total = matrices[0] + matrices[1]
    for x in matrices[2:]:
        total += x
    return total


def tasks_of(spec: MatrixSpec, deltas: Sequence[Delta]) -> Tasks:
    """The tasks of a merge: weighted, without zeros; multiplied out if only some are factors."""
    import torch

    from ...adapters.model import Factors

    weights = spec.params.get("weight", (1.0,) * len(deltas))
    live: list[Delta] = []
    for delta, weight in zip(deltas, weights, strict=True):
        if weight == 0.0 or (isinstance(delta, Factors) and delta.rank == 0):
            continue
        if weight != 1.0:
            delta = replace(delta, b=delta.b * weight) if isinstance(delta, Factors) else delta * weight
        if not all(map(_nonzero, (delta.b, delta.a) if isinstance(delta, Factors) else (delta,))):
            continue
        live.append(delta)
    factored = all(isinstance(d, Factors) for d in live)
    wide = torch.float32
    for d in live:
        dtypes = (d.b.dtype, d.a.dtype) if isinstance(d, Factors) else (d.dtype,)
        wide = torch.float64 if torch.float64 in dtypes else wide
    same: list[Delta] = []
    for d in live:
        if isinstance(d, Factors) and factored:
            same.append(Factors(d.b.to(wide), d.a.to(wide)))
        else:
            same.append((d.dense() if isinstance(d, Factors) else d).to(wide))
    count = len(deltas) if spec.params.get("count_zero", True) else len(live)
    return Tasks(tuple(same), count, factored)


def _nonzero(x: torch.Tensor) -> bool:
    """Whether any entry is not zero; most often the first row tells."""
    return bool(x[:1].any()) or bool(x.any())


def nothing(spec: MatrixSpec, deltas: Sequence[Delta]) -> Merged:
    """The merge of task vectors that are all zero."""
    import torch

    from ...adapters.model import Factors

    first = deltas[0]
    like = first.b if isinstance(first, Factors) else first
    b = torch.zeros(spec.shape[0], 0, dtype=like.dtype, device=like.device)
    a = torch.zeros(0, spec.shape[1], dtype=like.dtype, device=like.device)
    return Merged(Factors(b, a), {"rank": 0, "route": "zero"})


def cut_of(params: Mapping[str, Any], shape: Sequence[int]) -> float:
    """The relative cut on singular values of a matrix of this shape."""
    asked = params.get("rank_tol")
    return float(asked) if asked is not None else min(1e-5, max(shape) * 1.2e-7)


@dataclass(frozen=True)
class Core:
    """Task vectors in common orthonormal bases: D_t = qb matrices[t] qa^T.

    qb : (m, p), qa : (n, s), in the factors' dtype. matrices : (p, s) each, float64.
    """

    qb: torch.Tensor
    qa: torch.Tensor
    matrices: list[torch.Tensor]

    def expand(self, matrix: torch.Tensor) -> Factors:
        """Qb matrix qa^T as factors of the smaller inner size."""
        from ...adapters.model import Factors

        wide = self.qb.dtype
        if matrix.shape[0] < matrix.shape[1]:
            right = matrix @ self.qa.to(matrix.dtype).T
            return Factors(self.qb, right.to(wide))
        left = self.qb.to(matrix.dtype) @ matrix
        return Factors(left.to(wide), self.qa.T.contiguous())


def core_of(factors: Sequence[Factors]) -> Core:
    """The cores of products of factors. Rules that turn with the bases may be applied to them instead."""
    from ...ops import balance, stack, tall_qr
    from ...ops.spectral.factor_sides import both_sides

    whole = stack(factors)
    sides = both_sides(whole)
    if sides is not None:
        (qb, left), (qa, right) = (side.basis() for side in sides)
    else:
        level_b, level_a = balance(whole.b, whole.a)
        (qb, left), (qa, right) = ((x.q, x.r) for x in tall_qr([level_b, level_a.T.contiguous()]))
    parts = [x.split([f.rank for f in factors], 1) for x in (left, right)]  # type: ignore[no-untyped-call]
    return Core(qb, qa, [b @ a.T for b, a in zip(*parts, strict=True)])


def full_svd(x: torch.Tensor, tol: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U (m, r), s (r,) float64 falling, v (n, r) of x on its support, sigma > tol sigma_1; u and v in x's dtype.

    float32: through the float64 Gram of the smaller side, half the work of a decomposition of x. float64: LAPACK.
    """
    import torch

    if x.dtype == torch.float64:
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
        keep = s > tol * s[:1]
        return u[:, keep], s[keep], vh[keep].T
    if x.shape[0] < x.shape[1]:
        v, s, u = full_svd(x.T, tol)
        return u, s, v
    from ...ops import small_eigh
    from ...ops.spectral.gram import gram, times

    found = small_eigh(gram(x.contiguous()))
    s = found.values.clamp_min(0.0).sqrt()
    keep = s > tol * s[:1]
    s, v = s[keep], found.vectors[:, keep]
    u = times(x.contiguous(), v / s, x.dtype)
    assert isinstance(u, torch.Tensor)  # as x is
    return u, s, v.to(x.dtype)
