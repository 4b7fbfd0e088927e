"""What a method over matrices is: its description, and functions over the task vectors of one module at a time.

Such methods need whole matrices (or factors) and run on torch. Their drivers are the library call, the engine and
`merge_adapters`; all three do the same::

    state = None
    if method.scope(params, dialect) == "model":
        state = method.resolve(params, {name: method.measure(spec, deltas) for every module})
    merged = method.merge(spec, deltas, state)      # for every module
    weight = base + lambda * merged.delta           # the driver's

A driver flattens tensors of three and more dimensions to (dim 0, rest), gives a one-dimensional tensor the mean of its
task vectors, folds an adapter's alpha into its factors, and refuses NaN and Inf before it calls a method.
Nothing here imports torch, so that descriptions can be listed without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from .protocol import MethodInfo

if TYPE_CHECKING:
    from ..adapters.model import Delta

__all__ = ["MatrixMethod", "MatrixSpec", "Merged"]


@dataclass(frozen=True)
class MatrixSpec:
    """One matrix as a method sees it.

    name : of the output tensor or module. shape : (m, n). params : recipe name -> value, every parameter present;
    per-model parameters are tuples of num_models values. tensor : 32-bit id of the name, for Philox.
    """

    name: str
    shape: tuple[int, int]
    num_models: int
    params: Mapping[str, Any]
    dialect: str = "default"
    seed: int = 0
    tensor: int = 0


@dataclass(frozen=True)
class Merged:
    """The merged task vector of one module, without the final scale.

    delta : dense, or factors where the result has low rank. report : what the run report says about this module (rank
    used, residual, kept energy, route, iterations: name -> number or word). warnings : sentences.
    """

    delta: Delta
    report: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


class MatrixMethod(Protocol):
    """A method over matrices. Stateless; every function is pure.

    `info.takes` says whether it merges full models, adapters or both. Task vectors arrive in the order of the models,
    dense (float32 or float64) or as Factors, not weighted: `params["weight"]` holds the models' weights where the
    method has them, and each method puts them where its formula does. A module that a model does not change, or an
    adapter lacks, arrives as Factors of rank 0. Exactness: T2.
    """

    info: MethodInfo

    def check(self, params: Mapping[str, Any], dialect: str) -> list[str]:
        """Sentences about combinations of parameters that cannot work (types and ranges are checked before)."""
        ...

    def scope(self, params: Mapping[str, Any], dialect: str) -> Literal["tensor", "model"]:
        """Whether modules can be merged one by one, or all must be measured first."""
        ...

    def measure(self, spec: MatrixSpec, deltas: Sequence[Delta]) -> Any:
        """Scope "model": what `resolve` needs to know of this module; small."""
        ...

    def resolve(self, params: Mapping[str, Any], measured: Mapping[str, Any]) -> Any:
        """Scope "model": the state that `merge` of every module gets, from all measurements by name."""
        ...

    def merge(self, spec: MatrixSpec, deltas: Sequence[Delta], state: Any = None) -> Merged:
        """The merged task vector of one module."""
        ...
