"""Modifiers of a merged task vector: what a recipe lists under `then:`.

A modified method is a method like any other: `modified(method, names)`. Its parameters are the method's and, behind
the modifier's name and a dot, the modifier's (`lines.alpha`), so that whoever binds and resolves parameters needs no
special case.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

from ..errors import ArgumentError, DataError, nearest
from ..ops.arguments import check_range
from ..ops.program import Program
from ..ops.sums import Reduce, Sums
from .blocks import number_blocks, pattern_problem
from .gram import exact_sum
from .protocol import ByTensor, Coeffs, Method, MethodInfo, Param, Round, Spec, Stats, alone

__all__ = ["LINES", "Modified", "Then", "blocks_of", "modified", "modifiers", "read_then"]

Then = Sequence[Any]
"""Modifiers of a library call: pairs (name, parameters), or mappings with one entry as in a recipe."""

LINES = MethodInfo(
    name="lines",
    purpose="Modifier (`then:`) of any method on task vectors: scale the merged task vector linearly with depth "
    "(LiNeS).",
    formula="y = x0 + s delta, s = alpha + beta l / (L - 1) in block l = 0 .. L - 1, s = alpha outside the blocks; L = "
    "1: s = alpha + beta. Single-task form: alpha given, beta = 1 - alpha. Multi-task form: beta given, alpha = "
    "(|d1 + ... + dT|_1 / |delta|_1) / T over the whole model. delta is the method's merged delta, lambda included",
    params=(
        Param("alpha", "float", "scale of the first block; without it the multi-task form", default=None),
        Param("beta", "float", "what is added until the last block; without it 1 - alpha", default=None),
        Param(
            "blocks",
            "str",
            "regular expression whose one group captures a tensor's block number; without it the layers of the "
            "architecture",
            default=None,
        ),
    ),
    base="required",
    passes="none of its own; the multi-task form one more read of the checkpoint, after what the method measures",
    source="Wang et al. 2024, LiNeS, arXiv 2410.17146; wang-kee/LiNeS src/eval/eval.py, src/eval/aggregation.py",
    dialects={"default": "the authors' rules"},
    deviations=(
        "the authors find blocks by substring, so that the number of an expert can pass for a layer; here the "
        "architecture or a pattern tells",
        "with one block the authors divide by zero; here s = alpha + beta",
        "the multi-task form beside a method in tensor scope measures all tensors, each by itself, before any is "
        "written; all are computed in float64 if one of them is",
    ),
    tier="T1",
)

_ALL = {LINES.name: LINES}


def modifiers() -> dict[str, MethodInfo]:
    """The modifiers by name."""
    return dict(_ALL)


def read_then(then: Then) -> list[tuple[str, Mapping[str, Any]]]:
    """The modifiers of a library call as pairs.

    Raises
    ------
    ArgumentError : of another form.
    """
    pairs: list[tuple[str, Mapping[str, Any]]] = []
    for entry in then if isinstance(then, (list, tuple)) else (then,):
        items = list(entry.items()) if isinstance(entry, Mapping) else [entry]
        pair = items[0] if len(items) == 1 else None
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not isinstance(pair[1], Mapping):
            raise ArgumentError(
                "then is not usable",
                code="then",
                expected="a list of pairs (modifier, parameters), as in [('lines', {'alpha': 0.2})]",
                got=repr(entry)[:80],
            )
        pairs.append((pair[0], pair[1]))
    return pairs


def blocks_of(params: Mapping[str, Any], names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """The layer blocks of a model's tensors for `Spec.block`: by the pattern of a modifier, else by their names.

    Raises
    ------
    ArgumentError : the pattern finds a block in none of the names.
    """
    names = list(names)
    pattern = params.get("lines.blocks")
    found = number_blocks(names, pattern)
    if pattern is not None and names and not found:
        raise ArgumentError(
            "lines: no tensor is in a block",
            code="modifier.blocks",
            expected="a pattern whose group captures the number of a block in the names of some tensors",
            got=f"{pattern!r}, which captures none, in names such as '{names[0]}'",
        )
    return found


def modified(method: Method, names: Sequence[str]) -> Method:
    """`method`, then the modifiers in order.

    Raises
    ------
    ArgumentError : unknown or repeated modifier, or a method whose result is no base with a task vector.
    """
    for i, name in enumerate(names):
        if name not in _ALL:
            raise ArgumentError(
                "unknown modifier",
                code="modifier.unknown",
                expected=" or ".join(_ALL),
                got=repr(name),
                hint=nearest(name, _ALL) if isinstance(name, str) else None,
            )
        if name in names[:i]:
            raise ArgumentError(f"the modifier '{name}' is there twice", code="modifier.twice", expected="once")
    if names and not method.info.modifiable:
        raise ArgumentError(
            f"{names[0]} scales a task vector, and {method.info.name} makes none",
            code="modifier.method",
            expected="a method whose result is the base and a task vector",
            got=method.info.name,
        )
    return Modified(method) if names else method


@dataclass(frozen=True)
class _Unscaled(Coeffs):
    """The method's coefficients: common to all tensors, or of each (`ByTensor`)."""

    inner: Coeffs = field(default_factory=Coeffs)


@dataclass(frozen=True)
class _Scaled(_Unscaled):
    """Those, and the scale of the first block."""

    alpha: float = 1.0


class Modified:
    """A method whose merged task vector LiNeS scales."""

    def __init__(self, method: Method) -> None:
        self.method = method
        inner = method.info
        params = tuple(replace(p, name=f"lines.{p.name}", python=f"lines.{p.name}") for p in LINES.params)
        self.info = replace(
            inner,
            name=f"{inner.name} + lines",
            params=inner.params + params,
            formula=f"{inner.formula}; then {LINES.formula}",
            passes=f"{inner.passes}; lines: {LINES.passes}",
            source=f"{inner.source}; {LINES.source}",
            deviations=inner.deviations + LINES.deviations,
        )

    def check(self, params: Mapping[str, Any], dialect: str, nan: str) -> list[str]:
        """What the method says, and whether a form of LiNeS is chosen."""
        problems = self.method.check(params, dialect, nan)
        if params["lines.alpha"] is None and params["lines.beta"] is None:
            problems = [
                *problems,
                "lines needs alpha (single-task form, beta = 1 - alpha) or beta (multi-task form, alpha from the "
                "norms); got neither",
            ]
        pattern = params["lines.blocks"]
        wrong = None if pattern is None else pattern_problem(pattern)
        return [*problems, f"lines: blocks is not usable; expected {wrong}"] if wrong else problems

    def scope(self, params: Mapping[str, Any], dialect: str) -> Literal["tensor", "model"]:
        """The model where alpha comes from its norms, else the method's scope."""
        return "model" if params["lines.alpha"] is None else self.method.scope(params, dialect)

    def measures_after(self, params: Mapping[str, Any], state: Round | Coeffs) -> bool:
        """Whether all tensors are read, merged and measured between what `state` asks for and the writing pass."""
        return params["lines.alpha"] is None and not (isinstance(state, Round) and isinstance(state.coeffs, _Unscaled))

    def start(self, spec: Spec) -> Round | Coeffs:
        """The method's first round; where it sees each tensor by itself and alpha comes from the model, all of them."""
        if not spec.has_base:
            raise ArgumentError(
                "lines scales a task vector, and without a base there is none",
                code="base.missing",
                tensor=spec.name or None,
                expected="a base",
                got="none",
            )
        if spec.params["lines.alpha"] is None and self.method.scope(spec.params, spec.dialect) == "tensor":
            return Round("each", "model", each=self.method)
        return self._go_on(spec, self.method.start(spec))

    def resolve(self, spec: Spec, round_: Round, stats: Stats, visited: int) -> Round | Coeffs:
        """The method's next round; after its last one the norms of LiNeS."""
        if round_.op == "each":
            return self._go_on(spec, cast(ByTensor, stats))
        if isinstance(round_.coeffs, _Unscaled):
            return _Scaled(inner=round_.coeffs.inner, alpha=_ratio(spec, cast(Sums, stats)))
        return self._go_on(spec, self.method.resolve(spec, round_, stats, visited))

    def apply(self, spec: Spec, coeffs: Coeffs) -> Program:
        """The method's program, its scale times that of the tensor's block once alpha is known."""
        if not isinstance(coeffs, _Unscaled):
            return self.method.apply(spec, coeffs)
        inner = coeffs.inner
        if isinstance(inner, ByTensor):
            program = self.method.apply(alone(spec), inner.of[spec.name])
        else:
            program = self.method.apply(spec, inner)
        if not isinstance(coeffs, _Scaled):
            return program
        scale = program.scale * _scale(spec, coeffs.alpha)
        check_range((scale,), spec.compute, "the scale of lines", spec.name)
        return replace(program, scale=scale)

    def _go_on(self, spec: Spec, state: Round | Coeffs) -> Round | Coeffs:
        if isinstance(state, Round):
            return state
        alpha = spec.params["lines.alpha"]
        if alpha is not None:
            return _Scaled(inner=state, alpha=alpha)
        return Round("reduce", "model", coeffs=_Unscaled(inner=state), reduce=Reduce(("total_abs", "merged_abs")))


def _ratio(spec: Spec, sums: Sums) -> float:
    """(|d1 + ... + dT|_1 / |delta|_1) / T over all tensors; a delta of zero stays zero at any scale."""
    tensors = range(len(sums.values))
    total = exact_sum([sums.number(0, i) for i in tensors])
    merged = exact_sum([sums.number(1, i) for i in tensors])
    if merged == 0.0:
        return 0.0
    alpha = total / merged / spec.num_models
    if not math.isfinite(alpha):
        raise DataError(
            "lines: the ratio of the norms is not finite, because a model holds NaN or Inf",
            code="lines.ratio",
            expected="finite tensors",
            hint="Give lines an alpha beside beta.",
        )
    return alpha


def _scale(spec: Spec, alpha: float) -> float:
    """The scale of the tensor's block."""
    beta = spec.params["lines.beta"]
    beta = 1.0 - alpha if beta is None else beta
    if spec.block is None:
        return alpha
    number, count = spec.block
    return float(alpha + (beta if count == 1 else beta * (number / (count - 1))))
