"""Merging with methods over matrices in memory: the driver of `_methods.matrix`, for one tensor and for state dicts.

The methods run on torch, on the device of the tensors. Shards are put together first: their results lie within the
bound of the whole tensor's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ._checks import check_tensor, nonfinite
from ._methods.arguments import bind_matrix
from ._methods.matrix import MatrixMethod, MatrixSpec, Merged, measured_state, misfits
from ._methods.matrix_table import get_matrix, matrix_names
from ._methods.spectral.layout import Layout, layout_of, merge_plain
from .errors import ArgumentError, DataError, MergeError, PlanError
from .ops.arguments import check_integer
from .ops.inputs import Inputs, gather
from .ops.selection import Scope
from .tensors import F64, tensor_id

if TYPE_CHECKING:
    import torch

    from .adapters.model import Delta

__all__ = ["MatrixCall", "Task", "check_layouts", "is_matrix_method", "resolved", "using_threads"]

_log = logging.getLogger("mergekernels")


def is_matrix_method(method: Any) -> bool:
    """Whether `method` names a method over matrices of models."""
    return isinstance(method, str) and method in matrix_names("models")


@contextmanager
def using_threads(threads: int | None) -> Iterator[None]:
    """Torch's thread count set to `threads` for a while."""
    import torch

    if threads is None:
        yield
        return
    if not isinstance(threads, int) or isinstance(threads, bool) or not 1 <= threads <= 1024:
        raise ArgumentError(
            "threads must be at least 1", code="threads", expected="an integer from 1 to 1024", got=repr(threads)
        )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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

    def task(self, models: Sequence[Any], base: Any, companions: Sequence[Any], name: str) -> Task:
        """One tensor of all models, checked, as task vectors (as weights, where the method subtracts no base)."""
        inputs = gather(models, base, name, self.shard_dim)
        layout = self.layout(name, inputs.shape)
        if self.method.info.companions and any(c is None for c in companions):
            layout = Layout(1, 1, inputs.n, plain=True)
        return Task.of(self, inputs, layout, companions)


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


@dataclass(frozen=True)
class Task:
    """One tensor of a merge: what the method gets of it, and how its result becomes the merged tensor.

    wholes : of the models, put together and in the compute dtype; task vectors unless the method subtracts no base.
    """

    call: MatrixCall
    inputs: Inputs
    layout: Layout
    wholes: list[torch.Tensor]
    base: torch.Tensor | None
    companions: list[torch.Tensor] = field(default_factory=list)

    @staticmethod
    def of(call: MatrixCall, inputs: Inputs, layout: Layout, companions: Sequence[Any]) -> Task:
        """Put shards together, subtract the base, look for NaN and Inf.

        Raises
        ------
        DataError, ArgumentError
        """
        import torch

        wide = torch.float64 if inputs.compute is F64 else torch.float32
        columns = [_whole(inputs, i, call.shard_dim) for i in range(len(inputs.tensors[0]))]
        base = columns.pop().to(wide) if inputs.has_base else None
        wholes = []
        for i, column in enumerate(columns):
            delta = column.to(wide) if base is None else column.to(wide) - base
            if not _all_finite(delta):
                raise _nonfinite(inputs, i, column, base, delta)
            wholes.append(delta)
        extra = []
        if not layout.plain:
            for i, c in enumerate(companions):
                label = f"{call.method.info.companions} {i}"
                checked = check_tensor(c, label, inputs.name).to(wide)
                if checked.ndim != 2:
                    raise ArgumentError(
                        f"{label} is not a matrix",
                        code="tensor.shape",
                        tensor=inputs.name or None,
                        expected="two dimensions",
                        got=str(tuple(checked.shape)),
                    )
                if not bool(torch.isfinite(checked).all()):
                    first = int((~torch.isfinite(checked)).flatten().to(torch.int8).argmax())
                    count = int((~torch.isfinite(checked)).sum())
                    raise nonfinite(label, first, count, _scope(inputs), [inputs.name])
                extra.append(checked)
        return Task(call, inputs, layout, wholes, base, extra)

    def _matrices(self, index: int) -> list[Delta]:
        """What the method gets of matrix `index`: zeros as factors of rank 0."""
        from .adapters.model import Factors

        shape = (self.layout.count, self.layout.m, self.layout.n)
        result: list[Delta] = []
        for whole in self.wholes:
            x = whole.reshape(shape)[index]
            if self.base is not None and not (bool(x[:1].any()) or bool(x.any())):
                result.append(Factors(x.new_zeros(x.shape[0], 0), x.new_zeros(0, x.shape[1])))
            else:
                result.append(x)
        return [*result, *self.companions]

    def measure(self, state: Any) -> dict[str, Any]:
        """Scope "model": the measurements of this tensor's matrices by name."""
        specs = [self.call.spec(self.inputs.name, self.layout, i) for i in range(self.layout.count)]
        return {spec.name: self.call.method.measure(spec, self._matrices(i), state) for i, spec in enumerate(specs)}

    def merged(self, state: Any, dtype: torch.dtype, report: MutableMapping[str, Any] | None) -> torch.Tensor:
        """The merged tensor, whole.

        Raises
        ------
        DataError : it overflows its dtype.
        """
        import torch

        results = []
        for i in range(self.layout.count):
            spec = self.call.spec(self.inputs.name, self.layout, i)
            found = self._merge(spec, i, state)
            for sentence in found.warnings:
                _log.warning("tensor '%s': %s", spec.name, sentence)
            if report is not None:
                report[spec.name] = {**found.report, **({"warnings": found.warnings} if found.warnings else {})}
            results.append(self._written(found, i, dtype))
        whole = results[0] if len(results) == 1 else torch.stack(results)
        if not _all_finite(whole):
            bad = (~torch.isfinite(whole)).flatten()
            first, count = int(bad.to(torch.int8).argmax()), int(bad.sum())
            raise nonfinite("", first, count, _scope(self.inputs), [self.inputs.name], output=True)
        return whole.reshape(self.inputs.shape)

    def _merge(self, spec: MatrixSpec, index: int, state: Any) -> Merged:
        matrices = self._matrices(index)
        try:
            if self.layout.plain:
                return merge_plain(self.call.method, spec, matrices, state)
            return self.call.method.merge(spec, matrices, state)
        except MergeError as error:
            if error.tensor or not spec.name:
                raise
            fields = {**error.to_dict(), "tensor": spec.name}
            raise MergeError.from_dict(fields) from error

    def _written(self, merged: Merged, index: int, dtype: torch.dtype) -> torch.Tensor:
        """Base + lambda delta, rounded once."""
        import torch

        from .adapters.model import Factors

        scale, delta = self.call.params.get("lambda", 1.0), merged.delta
        shape = (self.layout.count, self.layout.m, self.layout.n)
        base = None if self.base is None else self.base.reshape(shape)[index]
        if isinstance(delta, Factors):
            if base is None or delta.rank:
                delta = (delta.b * scale) @ delta.a if scale != 1.0 else delta.dense()
            else:
                delta = torch.zeros_like(base)
        elif scale != 1.0:
            delta = delta * scale
        return (delta if base is None else base + delta).to(dtype)


def _all_finite(x: torch.Tensor) -> bool:
    """Whether no entry is NaN or Inf: one pass, without a tensor of flags."""
    import math

    import torch

    if not x.numel():
        return True
    low, high = torch.aminmax(x)  # a NaN anywhere is both
    return math.isfinite(float(low)) and math.isfinite(float(high))


def _whole(inputs: Inputs, position: int, dim: int) -> torch.Tensor:
    import torch

    parts = [shard[position] for shard in inputs.tensors]
    if len(parts) == 1:
        return parts[0]
    return torch.cat([p.to(parts[0].device) for p in parts], dim)


def _scope(inputs: Inputs) -> Scope:
    return Scope((0,), (inputs.tensor,), inputs.n, "F64" if inputs.compute is F64 else "F32")


def _nonfinite(
    inputs: Inputs, model: int, column: torch.Tensor, base: torch.Tensor | None, delta: torch.Tensor
) -> DataError:
    """Who is to blame: the base, the model, or a difference beyond the compute dtype."""
    import torch

    label = inputs.labels[model] if inputs.labels else f"model {model}"
    for what, x in (("the base", base), (label, column)):
        bad = None if x is None else (~torch.isfinite(x)).flatten()
        if bad is not None and bool(bad.any()):
            return nonfinite(what, int(bad.to(torch.int8).argmax()), int(bad.sum()), _scope(inputs), [inputs.name])
    bad = (~torch.isfinite(delta)).flatten()
    return DataError(
        f"the difference of {label} and the base overflows float32 at flat index {int(bad.to(torch.int8).argmax())}",
        code="data.overflow",
        tensor=inputs.name or None,
        hint="Give one of them as float64.",
    )


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


def resolved(call: MatrixCall, tasks: Any) -> Any:
    """The state with which `call.method` merges. tasks : a function that yields every tensor's Task, anew each time."""

    def measure(state: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for task in tasks():
            if not task.layout.plain or hasattr(call.method, "merge_plain"):
                found |= task.measure(state)
        return found

    return measured_state(call.method, call.params, call.dialect, measure)
