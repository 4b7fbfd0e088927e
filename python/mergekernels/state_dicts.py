"""Merging whole state dicts in memory, tensor by tensor, mappings of any kind."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from ._backends.dispatch import Backend, pick
from ._checks import refuse_unequal
from ._methods.arguments import bind
from ._methods.modifiers import Then, blocks_of
from ._methods.protocol import Coeffs, Spec
from ._rounds import resolve_scope
from ._small import SmallTensors
from .errors import ArgumentError, DataError, InputError
from .matrices import MatrixCall, Task, check_layouts, is_matrix_method, resolved, using_threads
from .merging import Call, deliver, matrix_dtype, merge_one, outputs
from .ops.inputs import Inputs, check_name, joined_shape
from .ops.selection import Scope
from .tensors import F32, F64, DType

if TYPE_CHECKING:
    import torch

__all__ = ["merge_state_dicts"]

_log = logging.getLogger("mergekernels")


def merge_state_dicts(
    models: Sequence[Mapping[str, Any]],
    method: str,
    *,
    base: Mapping[str, Any] | None = None,
    weights: Any = None,
    seed: int = 0,
    dialect: str = "default",
    nan: Literal["error", "propagate"] = "error",
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
    threads: int | None = None,
    shard_dim: int = 0,
    then: Then = (),
    report: MutableMapping[str, Any] | None = None,
    **params: Any,
) -> dict[str, Any]:
    """Merge state dicts of one architecture.

    Parameters
    ----------
    models, base : mappings from name to tensor (or list of shards); lazy ones are read one tensor at a time, every
        tensor once per pass (in scope "model" once more, for its shape). Never mutated. All must have the same names.
    out_dtype : dtype of the merged float tensors, default the promoted dtype of the inputs. Integer and bool
        tensors are copied where they are equal; where not, the base's is taken with a warning, and without a base it
        is an error.

    then : modifiers of the merged task vector, [("lines", {"alpha": 0.2})]. The layer blocks are those that the names
        show (`model.layers.7.mlp...`); a modifier's parameter may say otherwise.
    report : a mapping that a method over matrices fills, tensor name -> rank, route, residual and so on.

    The other parameters are those of `mergekernels.merge`; each tensor's own name enters its random words. Scope
    "model" counts over all float tensors.

    Returns
    -------
    A new dict in the order of the base (of the first model without one).

    Raises
    ------
    InputError : names that some inputs lack. ArgumentError, BackendError, DataError : as `merge`, naming the tensor.
    """
    if isinstance(models, Mapping) or not isinstance(models, Iterable):
        raise ArgumentError("the models are not a list of state dicts", code="models.type", got=type(models).__name__)
    models = list(models)
    if is_matrix_method(method):
        return _merge_matrices(
            models, method, base, weights, seed, dialect, nan, out_dtype, backend, threads, shard_dim, then, report,
            params,
        )  # fmt: skip
    call = Call.of(method, params, weights, dialect, nan, seed, backend, threads, shard_dim, then)
    everything = [*models] if base is None else [base, *models]
    _are_mappings(everything)
    call.check_arity(len(models), base is not None)
    companions = _companions(call, len(models))
    labels = (["the base"] if base is not None else []) + [f"model {i}" for i in range(len(models))]
    labels += [f"{call.method.info.companions} {i}" for i in range(len(companions))]
    _same_names([*everything, *companions], labels)
    order = list(everything[0].keys())
    sources = _Sources(models, base, companions)
    bound = bind(call.method, call.arguments, len(models), dialect, nan)
    call = replace(call, blocks=blocks_of(bound, order))
    scope: tuple[dict[str, Spec], Coeffs] | None = None
    if call.method.scope(bound, dialect) == "model":
        scope = _resolve_model(call, sources, order)
    result: dict[str, Any] = {}
    small = SmallTensors(call)
    for name in order:
        found = sources.read(name)
        if not found.is_float:
            result[name] = _integer(found.models, found.base, name)
            continue
        inputs, coeffs = found.inputs(call), None
        if scope is None:
            spec = call.spec(inputs)
        else:
            spec, coeffs = scope[0][name], scope[1]
            inputs = replace(inputs, compute=spec.compute)
        shared = small.take(spec, inputs, coeffs, out_dtype)
        result[name] = merge_one(call, spec, inputs, coeffs, out_dtype) if shared is None else shared
    small.flush()
    return result


def _are_mappings(everything: Sequence[Any], what: str = "state dict") -> None:
    for i, m in enumerate(everything):
        if not (hasattr(m, "keys") and hasattr(m, "__getitem__")):
            raise ArgumentError(f"{what} {i} is not a mapping", code="models.type", got=type(m).__name__)


def _merge_matrices(
    models: Sequence[Any], method: str, base: Any, weights: Any, seed: int, dialect: str, nan: str,
    out_dtype: torch.dtype | None, backend: str | None, threads: int | None, shard_dim: int, then: Then,
    report: MutableMapping[str, Any] | None, params: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """The merge with a method over matrices."""
    call = MatrixCall.of(
        method, params, weights, len(models), base is not None, dialect, nan, seed, backend, shard_dim, then
    )
    everything = [*models] if base is None else [base, *models]
    _are_mappings(everything)
    _are_mappings(call.companions, call.method.info.companions)
    labels = (["the base"] if base is not None else []) + [f"model {i}" for i in range(len(models))]
    _same_names(everything, labels)
    order = list(everything[0].keys())
    extra = [f"{call.method.info.companions} {i}" for i in range(len(call.companions))]
    _no_strangers(call.companions, extra, order)
    shapes = {}
    for name in order:
        value = everything[0][name]
        if _is_float([value], name):
            parts = list(value) if isinstance(value, (list, tuple)) else [value]
            shapes[name] = joined_shape([tuple(p.shape) for p in parts], shard_dim)
    check_layouts(call, shapes)

    def task(name: str) -> Task:
        companions = [c[name] if name in c.keys() else None for c in call.companions]  # noqa: SIM118
        found = _Read(name, [m[name] for m in models], None if base is None else base[name], companions)
        if not found.is_float:  # the first input's was
            raise InputError("some inputs hold floats, others integers", code="tensor.dtype", tensor=name)
        return call.task(found.models, found.base, companions, name)

    result: dict[str, Any] = {}
    with using_threads(threads):
        state = resolved(call, lambda: (task(name) for name in shapes))
        for name in order:
            if name not in shapes:
                found = _Read(name, [m[name] for m in models], None if base is None else base[name], [])
                result[name] = _integer(found.models, found.base, name)
                continue
            one = task(name)
            dtype = matrix_dtype(one.inputs, out_dtype)
            outs = outputs(one.inputs, dtype, None)
            deliver(one.merged(state, dtype, report), outs, shard_dim)
            result[name] = outs if one.inputs.sharded else outs[0]
    return result


def _no_strangers(companions: Sequence[Any], labels: Sequence[str], order: Sequence[str]) -> None:
    """Refuse what accompanies no tensor of the models, or accompanies it in some models only."""
    known, first = set(order), None
    for label, c in zip(labels, companions, strict=True):
        names = set(c.keys())
        first = names if first is None else first
        if not names <= known:
            raise InputError(
                f"{label} names tensors that the models lack: " + ", ".join(sorted(names - known)[:5]), code="names"
            )
        if names != first:
            raise InputError(
                f"{label} and {labels[0]} name different tensors: " + ", ".join(sorted(names ^ first)[:5]),
                code="names",
            )
    if first is not None and not first:
        raise InputError(f"{labels[0]} is empty: no tensor would be merged with it", code="names")


def _companions(call: Call, num_models: int) -> list[Mapping[str, Any]]:
    """The state dicts that accompany the models."""
    name = call.method.info.companions
    for i, m in enumerate(call.companions):
        if not (hasattr(m, "keys") and hasattr(m, "__getitem__")):
            raise ArgumentError(f"{name} {i} is not a mapping", code="models.type", got=type(m).__name__)
    if name and len(call.companions) != num_models:
        raise ArgumentError(
            f"{call.method.info.name}: '{name}' has the wrong number of values",
            code="parameter.count",
            expected=f"{num_models}, one per model",
            got=str(len(call.companions)),
        )
    return list(call.companions)


@dataclass(frozen=True)
class _Read:
    """One entry of all state dicts, each read once."""

    name: str
    models: list[Any]
    base: Any
    companions: list[Any]

    @property
    def is_float(self) -> bool:
        """True if it is a tensor to be merged."""
        return _is_float(self.models if self.base is None else [self.base, *self.models], self.name)

    def inputs(self, call: Call) -> Inputs:
        """The inputs of the merge."""
        return call.inputs(self.models, self.base, self.companions, self.name)


@dataclass(frozen=True)
class _Sources:
    """The state dicts of a merge."""

    models: Sequence[Mapping[str, Any]]
    base: Mapping[str, Any] | None
    companions: Sequence[Mapping[str, Any]]

    def read(self, name: str) -> _Read:
        """The entry called `name`."""
        base = None if self.base is None else self.base[name]
        return _Read(name, [m[name] for m in self.models], base, [c[name] for c in self.companions])


def _resolve_model(call: Call, sources: _Sources, order: Sequence[str]) -> tuple[dict[str, Spec], Coeffs]:
    """The coefficients of a model scope, and the spec of every float tensor in it. Reads each tensor once per pass."""
    specs: list[Spec] = []
    backend: Backend | None = None
    for name in sorted(order, key=lambda n: n.encode()):
        found = sources.read(name)
        if not found.is_float:
            continue
        inputs = found.inputs(call)
        if backend is None:
            _, backend = pick("select", inputs.all_views, call.backend)
        specs.append(call.spec(inputs))
    if backend is None:
        return {}, Coeffs()
    offsets, total = [], 0
    for spec in specs:
        offsets.append(total)
        total += spec.n
    compute = F64 if any(s.compute is F64 for s in specs) else F32
    scope = Scope(tuple(offsets), tuple(s.tensor for s in specs), total, "F64" if compute is F64 else "F32")
    specs = [replace(s, scope=scope, offset=o, compute=compute) for s, o in zip(specs, offsets, strict=True)]
    tensors = _Lazy(call, sources, [s.name for s in specs], compute)
    coeffs = resolve_scope(call.method, specs, tensors, backend, call.threads, call.nan)
    return {s.name: s for s in specs}, coeffs


class _Lazy(Sequence[Inputs]):
    """The inputs of each tensor, made when they are asked for, so that lazy mappings stay lazy."""

    def __init__(self, call: Call, sources: _Sources, names: Sequence[str], compute: DType) -> None:
        self.call, self.sources, self.names, self.compute = call, sources, names, compute

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: Any) -> Any:
        return replace(self.sources.read(self.names[i]).inputs(self.call), compute=self.compute)


def _same_names(everything: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> None:
    union = {name for m in everything for name in m.keys()}  # noqa: SIM118 - keys() is all that is asked of a mapping
    for name in union:
        check_name(name)
    lacking = []
    for label, m in zip(labels, everything, strict=True):
        missing = sorted(union.difference(m.keys()))
        if missing:
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            lacking.append(f"{label} lacks {', '.join(missing[:5])}{more}")
    if lacking:
        raise InputError("the state dicts have different tensors: " + "; ".join(lacking), code="names")


def _is_float(values: Sequence[Any], name: str) -> bool:
    """True if the tensor is to be merged, False if it is an integer or bool buffer; all inputs must agree on that."""
    import torch

    dtypes = []
    for value in values:
        first = value[0] if isinstance(value, (list, tuple)) and value else value
        dtypes.append(getattr(first, "dtype", None))
    merged = [d is None or d.is_floating_point or d.is_complex for d in dtypes]
    if any(merged) and not all(merged):
        raise InputError(
            "some inputs hold floats, others integers",
            code="tensor.dtype",
            tensor=name,
            expected="one kind of dtype",
            got=", ".join(str(d) for d in dtypes),
        )
    if merged[0]:
        return True  # dtypes that cannot be merged are refused where the tensors are gathered
    quantised = (torch.qint8, torch.quint8, torch.qint32)
    return any(d in quantised for d in dtypes)


def _integer(values: list[Any], base: Any, name: str) -> Any:
    """The common value of an integer or bool buffer, else the base's."""
    import torch

    everything = values if base is None else [base, *values]
    labels = (["the base"] if base is not None else []) + [f"model {i}" for i in range(len(values))]
    shards = [list(v) if isinstance(v, (list, tuple)) else [v] for v in everything]
    refuse_unequal(labels, [[str(t.dtype) for t in s] for s in shards], "dtype", name)
    refuse_unequal(labels, [[tuple(t.shape) for t in s] for s in shards], "shape", name)
    if not all(all(map(torch.equal, s, shards[0])) for s in shards):
        if base is None:
            raise DataError(
                "an integer or bool tensor differs between the models, and there is no base to decide",
                code="buffer.unequal",
                tensor=name,
            )
        _log.warning("tensor '%s': integer values differ between the models; the base's are taken", name)
    chosen = [t.clone() for t in shards[0]]
    return chosen if isinstance(everything[0], (list, tuple)) else chosen[0]
