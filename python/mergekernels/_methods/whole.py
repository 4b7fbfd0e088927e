"""A method over matrices as the engine sees it: where whole tensors are needed, no rounds are run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from ..errors import ArgumentError
from ..ops.program import Program
from .matrix import MatrixMethod
from .modifiers import Modified
from .protocol import Coeffs, Method, Round, Spec, Stats

__all__ = ["Whole", "refuse_rounds", "whole_of"]


class Whole:
    """Describes a `MatrixMethod` to whoever resolves parameters and plans.

    The engine loads the tensors of such a method whole and calls `matrix`. `apply` tells only the scale of its result
    (`lambda`, and what modifiers make of it).
    """

    def __init__(self, matrix: MatrixMethod) -> None:
        self.matrix = matrix
        self.info = matrix.info

    def check(self, params: Mapping[str, Any], dialect: str, nan: str) -> list[str]:
        """What the method says; NaN cannot be let through a decomposition."""
        problems = self.matrix.check(params, dialect)
        if nan != "error":
            problems = [*problems, f"{self.info.name} decomposes matrices, which NaN and Inf forbid: nan must be error"]
        return problems

    def scope(self, params: Mapping[str, Any], dialect: str) -> Literal["tensor", "model"]:
        """Nothing is measured in rounds. What `matrix` measures over the model is the engine's to ask."""
        return "tensor"

    def start(self, spec: Spec) -> Round | Coeffs:
        """No rounds."""
        return Coeffs()

    def resolve(self, spec: Spec, round_: Round, stats: Stats, visited: int) -> Round | Coeffs:
        """Never called: there are no rounds."""
        return Coeffs()

    def apply(self, spec: Spec, coeffs: Coeffs) -> Program:
        """Base plus the scaled merged task vector, which stands for a model's and is not subtracted from."""
        scale = float(spec.params.get("lambda", 1.0))
        return Program((1.0,), (None,), base=spec.has_base, subtract=False, scale=scale)


def whole_of(method: Method) -> MatrixMethod | None:
    """The method over matrices behind `method` and its modifiers; None for a method of rounds and programs."""
    inner = method
    while isinstance(inner, Modified):
        inner = inner.method
    return inner.matrix if isinstance(inner, Whole) else None


def refuse_rounds(state: Round | Coeffs, spec: Spec, name: str) -> Coeffs:
    """The coefficients of a method over matrices.

    Raises
    ------
    ArgumentError : a modifier wants to measure what such a method makes, which takes whole matrices.
    """
    if isinstance(state, Coeffs):
        return state
    raise ArgumentError(
        f"the modifier measures the merged task vector over the whole model, which {name} cannot give in passes",
        code="modifier.scope",
        tensor=spec.name or None,
        expected="a modifier with parameters that need no data, as in lines: {alpha: 0.2}",
        got="one that measures",
    )
