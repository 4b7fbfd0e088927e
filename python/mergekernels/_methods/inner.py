"""An element-wise method inside another method's coordinates: its parameters, its program, and one tensor by itself.

The outer method writes every task vector in common coordinates and hands over the coordinate matrices; the base is zero
there. `inner_scope` runs the same over all modules at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError
from ..ops.program import Program
from ..ops.selection import Scope
from ..tensors import F32, F64, DType
from . import get, names
from .arguments import bind
from .pipeline import Pipeline
from .protocol import REQUIRED, Coeffs, Method, Param, Spec

if TYPE_CHECKING:
    import torch

__all__ = ["ELEMENTWISE", "Inner", "inner_params", "run_inner"]

_UNSUITED = ("nearswap", "arcee_fusion", "expo", "model_stock")
ELEMENTWISE = tuple(
    name
    for name in names()
    if get(name).info.base == "required" and not get(name).info.companions and name not in _UNSUITED
)
"""The methods of models that merge task vectors entry by entry."""

_PAPER = ("trim",)  # parameters of the paper's dialect alone
# The outer method has these itself, or they mean nothing in its coordinates.
_OUTER = ("weight", "lambda", "inner", "scope", "int8_mask")


def inner_params(allowed: Sequence[str]) -> tuple[Param, ...]:
    """The parameters of the allowed inner methods, each with default None: as the inner method says."""
    found: dict[str, tuple[Param, list[str]]] = {}
    for method in allowed:
        if method in names():
            for param in get(method).info.params:
                if param.name not in _OUTER:
                    found.setdefault(param.name, (param, []))[1].append(method)
    params = [
        Param(
            "inner_dialect",
            "str",
            "dialect of the inner method; paper for ties and dare_ties, default for the others",
            default=None,
            choices=("default", "paper", "peft"),
        )
    ]
    for name, (param, methods) in found.items():
        uses = [p for m in methods for p in get(m).info.params if p.name == name]
        meanings: dict[str, list[str]] = {}
        for method, use in zip(methods, uses, strict=True):
            if not use.help.startswith("no effect"):
                meanings.setdefault(use.help, []).append(method)
        uses = [p for p in uses if p.help in meanings] or uses
        lows, highs = [p.low for p in uses], [p.high for p in uses]
        said = [f"({', '.join(by)}): {text}" for text, by in meanings.items()] or [
            f"({', '.join(methods)}): {param.help}"
        ]
        params.append(
            Param(
                name,
                param.kind,
                f"of the inner method {'; '.join(said)}",
                per_model=any(p.per_model for p in uses),
                default=None,
                low=None if None in lows else min(low for low in lows if low is not None),
                high=None if None in highs else max(high for high in highs if high is not None),
                choices=param.choices,
            )
        )
    return tuple(params)


@dataclass(frozen=True)
class Inner:
    """An inner method with its parameters. after : weights that come after the election, None if the method weighs."""

    method: Method
    dialect: str
    num_models: int
    params: Mapping[str, Any]
    after: tuple[float, ...] | None

    @staticmethod
    def of(
        name: str, outer: Mapping[str, Any], weights: Sequence[float], scope: str, defaults: Mapping[str, Any]
    ) -> Inner:
        """The inner method `name` with the values that the outer method's parameters hold for it.

        scope : what thresholds and majorities count over. defaults : values of the outer method where none is given.

        Raises
        ------
        ArgumentError : a parameter that this inner method does not have, or a value that it refuses.
        """
        method = get(name)
        own = {p.name: p for p in method.info.params}
        dialect = outer["inner_dialect"] or ("paper" if name in ("ties", "dare_ties") else "default")
        arguments: dict[str, Any] = {}
        for param, value in outer.items():
            if param in _OUTER or param == "inner_dialect" or value is None:
                continue
            several = isinstance(value, tuple)
            if several and all(v is None for v in value):
                continue
            if param in own:
                arguments[own[param].keyword] = _per_model(own[param], value) if several else value
            elif param in _known():
                raise ArgumentError(
                    f"inner method {name} has no parameter '{param}'",
                    code="parameter.unknown",
                    expected="one of " + ", ".join(p for p in own if p not in _OUTER),
                    got=param,
                )
        for param, value in defaults.items():
            if own[param].keyword not in arguments and (dialect == "paper" or param not in _PAPER):
                arguments[own[param].keyword] = value
        if "scope" in own and "inner" not in own:
            arguments["scope"] = scope
        if "lambda" in own:
            arguments[own["lambda"].keyword] = 1.0  # the outer method's driver scales
        after = None
        if isinstance(method, Pipeline) and method.elections.get(dialect) == "paper":
            after = tuple(weights)
        elif "weight" in own:
            arguments["weights"] = list(weights)
        elif any(w != 1.0 for w in weights):
            raise ArgumentError(
                f"inner method {name} has no weights", code="parameter.combination", expected="weight 1"
            )
        if after is not None and own["weight"].default is REQUIRED:
            arguments["weights"] = 1.0
        params = bind(method, arguments, len(weights), dialect, "error")
        return Inner(method, dialect, len(weights), params, after)

    @property
    def text(self) -> str:
        """The method, its dialect and its share of kept entries, for a report."""
        shares = sorted({d for d in self.params.get("density", ()) if d is not None})
        if not shares:
            return f"{self.method.info.name} ({self.dialect})"
        return f"{self.method.info.name} ({self.dialect}), density {', '.join(f'{d:g}' for d in shares)}"

    def spec(self, name: str, shape: tuple[int, int], scope: Scope, offset: int, tensor: int, seed: int) -> Spec:
        """One coordinate matrix as the inner method sees it. tensor : its number in Philox."""
        return Spec(
            num_models=self.num_models,
            has_base=True,
            params=self.params,
            n=shape[0] * shape[1],
            scope=scope,
            compute=F64 if scope.compute == "F64" else F32,
            dialect=self.dialect,
            name=name,
            tensor=tensor,
            seed=seed,
            offset=offset,
            shape=shape,
        )

    def program(self, spec: Spec, coeffs: Coeffs) -> Program:
        """The inner method's pass. In the paper's dialect the election knows no weights: they follow it."""
        program = self.method.apply(spec, coeffs)
        if self.after is None:
            return program
        return replace(program, weights=self.after, vote="plain" if program.vote == "weighted" else program.vote)


def _known() -> set[str]:
    return {p.name for name in ELEMENTWISE for p in get(name).info.params}


def _per_model(param: Param, values: tuple[Any, ...]) -> Any:
    """Values for a parameter of an inner method; one number where it takes one."""
    if param.per_model:
        return list(values)
    if any(v != values[0] for v in values):
        raise ArgumentError(
            f"'{param.name}' of the inner method is one number",
            code="parameter.count",
            expected="one value",
            got=repr(list(values)),
        )
    return values[0]


def run_inner(inner: Inner, tensors: Sequence[torch.Tensor], name: str, seed: int) -> torch.Tensor:
    """The inner method on one matrix per model, thresholds over this matrix alone.

    tensors : of one shape, float32 or float64, at most 64. name, seed : for random words and errors.

    Raises
    ------
    ArgumentError, BackendError, DataError
    """
    import torch

    from .._backends.dispatch import pick, requested
    from .._rounds import resolve_scope
    from ..ops.inputs import gather, num_threads
    from ..ops.stream import run_program

    tensors = [t.contiguous() for t in tensors]
    first = tensors[0]
    if first.numel() == 0:
        return torch.zeros_like(first)
    inputs = gather(tensors, torch.zeros_like(first), name, 0)
    compute: DType = inputs.compute
    scope = Scope((0,), (inputs.tensor,), inputs.n, "F64" if compute is F64 else "F32")
    rows, columns = first.shape
    spec = inner.spec(name, (rows, columns), scope, 0, inputs.tensor, seed)
    _, backend = pick("stream", inputs.all_views, requested())
    threads = num_threads(None)
    coeffs = resolve_scope(inner.method, [spec], [inputs], backend, threads, "error")
    out = torch.empty_like(first)
    run_program(inner.program(spec, coeffs), inputs, [out], backend, threads, "error")
    return out
