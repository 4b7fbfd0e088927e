"""What a merging method is: its description, and four pure functions over numbers.

A driver (the in-memory call, the sharded call, the engine) runs the same loop::

    state = method.start(spec)
    while isinstance(state, Round):
        state = method.resolve(spec, state, statistics of the round, elements visited)
    program = method.apply(spec, state)          # one fused pass per tensor

In scope "tensor" this happens for each tensor; in scope "model" the statistics of a round are merged over all tensors
of the scope before `resolve`, and every tensor gets its own program from the common coefficients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ..ops.keep import Keep
from ..ops.program import Program
from ..ops.selection import Scope, Selection
from ..ops.sums import Gram, Reduce, Sums
from ..tensors import DType

if TYPE_CHECKING:
    from .._cpu import StreamStats, SweepStats

__all__ = ["REQUIRED", "ByTensor", "Coeffs", "Method", "MethodInfo", "Param", "Round", "Spec", "Stats", "alone"]


class _Required:
    def __repr__(self) -> str:
        return "required"


REQUIRED = _Required()
"""Default of a parameter that has none."""


@dataclass(frozen=True)
class Param:
    """One parameter of a method.

    name : name in a recipe. python : keyword of the library call (differs for `lambda`, which is `scale`).
    kind : type of its values. per_model : one value per non-base model (a scalar serves all) instead of one in all.
    default : REQUIRED, or a value, or None for "as the dialect says". low, high : inclusive range.
    choices : allowed strings. optional_in : dialects in which a required parameter may be absent (its value is then 1).
    help : one sentence.
    """

    name: str
    kind: Literal["float", "bool", "int", "str"]
    help: str
    python: str = ""
    per_model: bool = False
    default: Any = REQUIRED
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    optional_in: tuple[str, ...] = ()

    @property
    def keyword(self) -> str:
        """The name in Python."""
        return self.python or self.name


@dataclass(frozen=True)
class MethodInfo:
    """The description of a method; `mergekernels methods NAME` prints it.

    base : "required"; "optional"; "input" (a base, if listed, is one more input and never subtracted); "first" (a base
    is required and becomes the first input; nothing is subtracted).
    companions : name of the parameter that names, for each model, a second model of weights for its entries ("" for
    none). modifiable : its result is base plus a task vector, which modifiers (`then:`) may scale.
    min_models, max_models : number of non-base models (of inputs for base = "input").
    tier : exactness, "T0", "T1" or "T2". takes : what it merges; methods of adapters are a name space of their own.
    """

    name: str
    purpose: str
    formula: str
    params: tuple[Param, ...]
    base: Literal["required", "optional", "input", "first"]
    passes: str
    source: str
    min_models: int = 1
    max_models: int = 64
    dialects: Mapping[str, str] = field(default_factory=lambda: {"default": "mergekit 0.1.5's rules in float32"})
    deviations: tuple[str, ...] = ()
    tier: str = "T0"
    companions: str = ""
    modifiable: bool = False
    takes: tuple[Literal["models", "adapters"], ...] = ("models",)


@dataclass(frozen=True)
class Spec:
    """One tensor as a method sees it.

    params : recipe name -> value, every parameter present; per-model parameters are tuples of num_models values.
    n : elements of the tensor. offset : scope index of its first element (0 in tensor scope).
    scope : the tensors of the model scope; in tensor scope the tensor alone.
    compute : F32 or F64. name : the output tensor's name. tensor : its 32-bit id. shape : of the tensor.
    block : (number of its layer block, number of blocks), None outside the blocks.
    """

    num_models: int
    has_base: bool
    params: Mapping[str, Any]
    n: int
    scope: Scope
    compute: DType
    dialect: str = "default"
    name: str = ""
    tensor: int = 0
    seed: int = 0
    offset: int = 0
    nan: Literal["error", "propagate"] = "error"
    shape: tuple[int, ...] = ()
    block: tuple[int, int] | None = None


@dataclass(frozen=True)
class Coeffs:
    """What a method has resolved: points of the selection (scope coordinates), and the sign for a zero vote.

    Methods that resolve something else have a subclass with their own fields.
    """

    points: tuple[Keep | None, ...] = ()
    zero_vote: int = 1


def alone(spec: Spec) -> Spec:
    """A tensor of a model's scope as a method in tensor scope sees it: the only one, in the model's compute dtype."""
    return replace(spec, scope=Scope((0,), (spec.tensor,), spec.n, spec.scope.compute), offset=0)


@dataclass(frozen=True)
class ByTensor(Coeffs):
    """Name of a tensor -> what a method in tensor scope has resolved for it.

    Without a part in `repr`, which names what a run leaves on disk: it follows from the plan.
    """

    of: Mapping[str, Coeffs] = field(default_factory=dict, repr=False)


if TYPE_CHECKING:
    Stats = SweepStats | StreamStats | Sums | ByTensor
else:
    Stats = object
"""What a round yields: SweepStats for "select", StreamStats for "votes", ByTensor for "each", Sums for the others."""


@dataclass(frozen=True)
class Round:
    """A pass of measurement that a method needs before it can go on.

    op "select": run `selection.sweep` and hand over its SweepStats.
    op "votes": run `method.apply(spec, coeffs)` without output and hand over its StreamStats.
    op "reduce": the sums `reduce` of that program; Sums, one entry per tensor of the scope.
    op "gram": the dot products `gram`; Sums, likewise.
    op "divergence": the divergence of each row of `row_length` elements (scope tensor, one model and a base); Sums with
    one slot and one number per row.
    op "each": take every tensor of the scope, `alone`, through all rounds of the method `each`; ByTensor.
    """

    op: Literal["select", "votes", "reduce", "gram", "divergence", "each"]
    scope: Literal["tensor", "model"]
    selection: Selection | None = None
    coeffs: Coeffs | None = None
    reduce: Reduce | None = None
    gram: Gram | None = None
    row_length: int = 0
    each: Method | None = None


class Method(Protocol):
    """A merging method. Stateless; every function is pure."""

    info: MethodInfo

    def check(self, params: Mapping[str, Any], dialect: str, nan: str) -> list[str]:
        """Sentences about combinations of parameters that cannot work (types and ranges are checked before).

        params : complete, per-model ones as tuples, as in `Spec`.
        """
        ...

    def scope(self, params: Mapping[str, Any], dialect: str) -> Literal["tensor", "model"]:
        """Over what the method measures with these parameters."""
        ...

    def start(self, spec: Spec) -> Round | Coeffs:
        """The first round, or the coefficients if no data is needed."""
        ...

    def resolve(self, spec: Spec, round_: Round, stats: Stats, visited: int) -> Round | Coeffs:
        """The next round, or the coefficients, after the statistics of `round_`.

        visited : elements of the scope that the round looked at; fewer than all of them if it was a sample.
        """
        ...

    def apply(self, spec: Spec, coeffs: Coeffs) -> Program:
        """The fused pass for this tensor."""
        ...
