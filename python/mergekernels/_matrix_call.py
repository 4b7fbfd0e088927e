"""What is the same for every tensor of a merge with a method over matrices, and the checks of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ._methods.arguments import bind_matrix
from ._methods.matrix import MatrixMethod, MatrixSpec, misfits
from ._methods.matrix_table import get_matrix
from ._methods.spectral.layout import Layout, layout_of
from .errors import ArgumentError, MergeError, PlanError
from .ops.arguments import check_integer
from .tensors import tensor_id

__all__ = ["MatrixCall", "check_layouts"]


@dataclass(frozen=True)
class MatrixCall:
    """What is the same for every tensor of a merge.

    params : complete, by recipe name. companions : what accompanies the models, [] if nothing does.
    """

    method: MatrixMethod
    params: Mapping[str, Any]
    num_models: int
    dialect: str
    seed: int
    shard_dim: int
    companions: tuple[Any, ...] = ()

    @staticmethod
    def of(
        method: str,
        arguments: Mapping[str, Any],
        weights: Any,
        num_models: int,
        has_base: bool,
        dialect: str,
        nan: str,
        seed: int,
        backend: str | None,
        shard_dim: int,
        then: Any,
    ) -> MatrixCall:
        """Check what does not depend on the tensors.

        Raises
        ------
        ArgumentError
        """
        chosen = get_matrix(method, "models")
        info = chosen.info
        _refuse_options(info.name, nan, backend, shard_dim, then)
        given = {k: _plain_value(v) for k, v in arguments.items() if k != info.companions}
        if weights is not None:
            given["weights"] = _plain_value(weights)
        companions = _companions(info.name, info.companions, arguments, num_models)
        if info.base == "required" and not has_base:
            raise ArgumentError(f"{info.name} needs a base", code="base.missing", expected="base=...", got="None")
        if info.base == "input" and has_base:
            raise ArgumentError(
                f"{info.name} subtracts no base",
                code="base.unused",
                hint="Leave base out, or list it among the models.",
            )
        params = bind_matrix(chosen, given, num_models, dialect)
        return MatrixCall(
            chosen, params, num_models, dialect, check_integer(seed, 0, 1 << 64, "seed"), shard_dim, companions
        )

    def layout(self, name: str, shape: Sequence[int]) -> Layout:
        """How the method sees a tensor; refuse one that it cannot merge.

        Raises
        ------
        ArgumentError
        """
        found = layout_of(self.params, name, shape)
        if not found.plain:
            problems = misfits(self.method, self.spec(name, found))
            if problems:
                raise ArgumentError(
                    f"{self.method.info.name}: {'; '.join(problems)}",
                    code="matrix.shape",
                    tensor=name or None,
                    got=f"a matrix ({found.m}, {found.n})",
                    hint=f"exclude='{name}' gives this tensor the mean." if name else None,
                )
        return found

    def spec(self, name: str, layout: Layout, matrix: int = 0) -> MatrixSpec:
        """The method's view of one matrix of a tensor."""
        full = f"{name}[{matrix}]" if layout.count > 1 else name
        return MatrixSpec(
            full,
            (layout.m, layout.n),
            self.num_models,
            self.params,
            self.dialect,
            self.seed,
            tensor_id(full),
            plain=layout.plain,
        )


def _refuse_options(method: str, nan: str, backend: str | None, shard_dim: Any, then: Any) -> None:
    if nan != "error":
        raise ArgumentError(
            f"{method} decomposes matrices, which NaN and Inf spoil as a whole",
            code="nan",
            expected="nan='error'",
            got=repr(nan),
        )
    if backend is not None:
        raise ArgumentError(
            f"{method} has no kernels of a backend: it runs through torch on the device of the tensors",
            code="backend.unused",
            expected="backend=None",
            got=repr(backend),
        )
    if not isinstance(shard_dim, int) or isinstance(shard_dim, bool) or shard_dim < 0:
        raise ArgumentError(
            "shard_dim is not usable", code="shard_dim", expected="a dimension, 0 or more", got=repr(shard_dim)
        )
    if then:
        raise ArgumentError(
            f"{method} takes no modifiers",
            code="modifier.method",
            expected="then=() for methods over matrices",
            got=repr(then)[:80],
        )


def _plain_value(value: Any) -> Any:
    """Numbers and lists out of arrays; patterns out of lists of strings."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        if value and all(isinstance(v, str) for v in value):
            return ",".join(value)
        return [v.tolist() if hasattr(v, "tolist") else v for v in value]
    return value


def _companions(method: str, name: str, arguments: Mapping[str, Any], num_models: int) -> tuple[Any, ...]:
    if not name:
        return ()
    values = arguments.get(name)
    if not isinstance(values, (list, tuple)):
        raise ArgumentError(
            f"{method} needs '{name}'",
            code="parameter.missing" if values is None else "parameter.value",
            expected="a list with one tensor (or mapping from names of tensors) per model",
            got="nothing" if values is None else type(values).__name__,
        )
    if len(values) != num_models:
        raise ArgumentError(
            f"{method}: '{name}' has the wrong number of values",
            code="parameter.count",
            expected=f"{num_models}, one per model",
            got=str(len(values)),
        )
    return tuple(values)


def check_layouts(call: MatrixCall, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse all tensors that the method cannot merge, before any is.

    Raises
    ------
    ArgumentError : one of them. PlanError : several.
    """
    problems: list[MergeError] = []
    for name, shape in shapes.items():
        try:
            call.layout(name, shape)
        except ArgumentError as error:
            problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise PlanError(problems)
