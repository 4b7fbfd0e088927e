"""What a method over matrices is: its description, and functions over the task vectors of one module at a time.

Such methods need whole matrices (or factors) and run on torch. Their drivers are the library call, the engine and
`merge_adapters`; all three do the same::

    state = measured_state(method, params, dialect, measure)
    merged = method.merge(spec, deltas, state)      # for every module
    weight = base + lambda * merged.delta           # the driver's

`measured_state` measures all modules where the method asks for it, as often as it asks: `measure(state)` is the
driver's function that calls `method.measure(spec, deltas, state)` for every module.

A driver flattens tensors of three and more dimensions to (dim 0, rest), gives a one-dimensional tensor the mean of its
task vectors, folds an adapter's alpha into its factors, and refuses NaN and Inf before it calls a method. `folds_scale`
says whether the method wants alpha folded: it may have a parameter `fold_scale`.
Nothing here imports torch, so that descriptions can be listed without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from .protocol import MethodInfo

if TYPE_CHECKING:
    from ..adapters.model import Delta, Factors

__all__ = [
    "Again",
    "Asking",
    "MatrixMethod",
    "MatrixSpec",
    "Merged",
    "Separable",
    "Together",
    "Wants",
    "folds_scale",
    "measured_state",
    "misfits",
]


@dataclass(frozen=True)
class MatrixSpec:
    """One matrix as a method sees it.

    name : of the output tensor or module. shape : (m, n). params : recipe name -> value, every parameter present;
    per-model parameters are tuples of num_models values. tensor : 32-bit id of the name, for Philox. scales : of
    adapters, the scale of each in this module (alpha / r; 1 where it lacks the module), in b unless `Wants.raw`.
    plain : a tensor that is no matrix to the method, as one row (`spectral.layout`).
    """

    name: str
    shape: tuple[int, int]
    num_models: int
    params: Mapping[str, Any]
    dialect: str = "default"
    seed: int = 0
    tensor: int = 0
    scales: tuple[float, ...] = ()
    plain: bool = False


@dataclass(frozen=True)
class Merged:
    """The merged task vector of one module, without the final scale.

    delta : dense, or factors where the result has low rank. report : what the run report says about this module (rank
    used, residual, kept energy, route, iterations: name -> number or word). warnings : sentences. finish : applied to
    the factors b = U S, a = V^T of an adapter after the driver has truncated it.
    """

    delta: Delta
    report: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    finish: Callable[[Factors], Factors] | None = None


@dataclass(frozen=True)
class Wants:
    """What a method of adapters asks of its driver beyond the common.

    raw : factors arrive as the files hold them; the scale is in `MatrixSpec.scales` only. A method that can ignore
    alpha / r altogether (fold_scale: false) asks for this too. equal_ranks : modules whose adapters differ in rank are
    refused before data is read. rank : when the merged delta is truncated, by default to the largest rank among the
    adapters. "given": where the caller gives a rank or an energy, and where it is dense; "largest": always; "exact":
    only where the caller gives a rank or an energy.
    peft : one of PEFT's combination types, with what dialect "peft" makes of one adapter and of rsLoRA.
    """

    raw: bool = False
    equal_ranks: bool = False
    rank: Literal["given", "largest", "exact"] = "given"
    peft: bool = False


@runtime_checkable
class Asking(Protocol):
    """A method of adapters with wishes; those without are served as `Wants()`."""

    def wants(self, params: Mapping[str, Any], dialect: str) -> Wants:
        """What it asks of its driver with these parameters."""
        ...


@runtime_checkable
class Separable(Protocol):
    """A method of adapters whose weights act last: A = sum of sgn(w_t s_t) sqrt|w_t s_t| A_t, B = sum of sqrt|w_t s_t|
    B_t, Delta = B A, with A_t and B_t that do not depend on the weights.
    """

    def separate(self, spec: MatrixSpec, deltas: Sequence[Delta]) -> list[Factors] | None:
        """A_t and B_t of every adapter; None if the method cannot with its parameters."""
        ...


@runtime_checkable
class Together(Protocol):
    """A method that merges many modules faster together than one by one, with the same results."""

    def merge_together(self, specs: Sequence[MatrixSpec], deltas: Sequence[Sequence[Delta]]) -> list[Merged]:
        """`merge` of each; none of them is `plain`, and there is no state."""
        ...


@dataclass(frozen=True)
class Again:
    """A state with which every module is to be measured once more, before any is merged. Methods derive from it."""


class MatrixMethod(Protocol):
    """A method over matrices. Stateless; every function is pure.

    `info.takes` says whether it merges full models, adapters or both. Task vectors arrive in the order of the models,
    dense (float32 or float64) or as Factors, not weighted: `params["weight"]` holds the models' weights where the
    method has them, and each method puts them where its formula does. A module that a model does not change, or an
    adapter lacks, arrives as Factors of rank 0. A method with `info.base` "input" gets the models' own matrices, and
    with `info.companions` behind them what accompanies each; its result is the weight. Exactness: T2.

    Two functions are optional: `fits(spec) -> list[str]`, sentences about why no matrix of this shape can be merged,
    asked before work starts; and `merge_plain(spec, deltas, state)`, as `merge`, for tensors that are no matrices to
    the method, which otherwise get their mean. In scope "model" a method with `merge_plain` measures these too.
    """

    info: MethodInfo

    def check(self, params: Mapping[str, Any], dialect: str) -> list[str]:
        """Sentences about combinations of parameters that cannot work (types and ranges are checked before)."""
        ...

    def scope(self, params: Mapping[str, Any], dialect: str) -> Literal["tensor", "model"]:
        """Whether modules can be merged one by one, or all must be measured first."""
        ...

    def measure(self, spec: MatrixSpec, deltas: Sequence[Delta], state: Any = None) -> Any:
        """Scope "model": what `resolve` needs to know of this module; small.

        state : None the first time, then the `Again` that `resolve` returned.
        """
        ...

    def resolve(self, params: Mapping[str, Any], measured: Mapping[str, Any], state: Any = None) -> Any:
        """Scope "model": the state that `merge` of every module gets, from all measurements by name; or an `Again`.

        state : what `measure` got.
        """
        ...

    def merge(self, spec: MatrixSpec, deltas: Sequence[Delta], state: Any = None) -> Merged:
        """The merged task vector of one module."""
        ...


def measured_state(
    method: MatrixMethod, params: Mapping[str, Any], dialect: str, measure: Callable[[Any], Mapping[str, Any]]
) -> Any:
    """The state with which `method` merges every module; None in scope "tensor".

    measure : from a state to the measurements of all modules by name. Called as often as the method asks.
    """
    if method.scope(params, dialect) == "tensor":
        return None
    state = method.resolve(params, measure(None), None)
    while isinstance(state, Again):
        state = method.resolve(params, measure(state), state)
    return state


def folds_scale(params: Mapping[str, Any], dialect: str) -> bool:
    """Whether a driver folds alpha / r into the factors that it hands to the method.

    It does, unless a parameter `fold_scale` says no; without a value that means the dialect "code".
    """
    if "fold_scale" not in params:
        return True
    asked = params["fold_scale"]
    return dialect != "code" if asked is None else bool(asked)


def misfits(method: MatrixMethod, spec: MatrixSpec) -> list[str]:
    """Sentences about why `method` cannot merge a matrix of this shape with these parameters."""
    fits = getattr(method, "fits", None)
    return [] if fits is None else list(fits(spec))
