"""Merging whole state dicts in memory, tensor by tensor, mappings of any kind."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from ._backends.dispatch import Backend, pick
from ._entries import Entry, are_mappings, common_buffer, same_names
from ._matrix_call import MatrixCall
from ._methods.arguments import bind
from ._methods.modifiers import Then, blocks_of
from ._methods.protocol import Coeffs, Spec
from ._outputs import dtype_like, into
from ._rounds import resolve_scope
from ._small import SmallTensors
from .errors import ArgumentError
from .matrices import is_matrix_method, merge_matrices
from .merging import Call, merge_one
from .ops.inputs import Inputs
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
    out: Mapping[str, Any] | None = None,
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
    out : name -> tensor (or list of shards) to write into: its own memory or exactly one of the inputs of that name.
        Its dtype is what the result is rounded to, and `out_dtype` stays None. After an error some may be written.

    The other parameters are those of `mergekernels.merge`; each tensor's own name enters its random words. Scope
    "model" counts over all float tensors.

    Returns
    -------
    A new dict in the order of the base (of the first model without one); with `out`, of its tensors.

    Raises
    ------
    InputError : names that some inputs lack. ArgumentError, BackendError, DataError : as `merge`, naming the tensor.
    """
    if isinstance(models, Mapping) or not isinstance(models, Iterable):
        raise ArgumentError("the models are not a list of state dicts", code="models.type", got=type(models).__name__)
    models = list(models)
    _check_out(out, out_dtype)
    if is_matrix_method(method):
        matrix = MatrixCall.of(
            method, params, weights, len(models), base is not None, dialect, nan, seed, backend, shard_dim, then
        )
        return merge_matrices(matrix, models, base, out_dtype, threads, report, out)
    call = Call.of(method, params, weights, dialect, nan, seed, backend, threads, shard_dim, then)
    everything = [*models] if base is None else [base, *models]
    are_mappings(everything)
    call.check_arity(len(models), base is not None)
    companions = _companions(call, len(models))
    labels = (["the base"] if base is not None else []) + [f"model {i}" for i in range(len(models))]
    labels += [f"{call.method.info.companions} {i}" for i in range(len(companions))]
    targets = [] if out is None else [out]
    same_names([*everything, *companions, *targets], [*labels, *["out"] * len(targets)])
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
            result[name] = into(out, name, common_buffer(found.models, found.base, name))
            continue
        inputs, coeffs = _inputs(call, found), None
        if scope is None:
            spec = call.spec(inputs)
        else:
            spec, coeffs = scope[0][name], scope[1]
            inputs = replace(inputs, compute=spec.compute)
        target = None if out is None else out[name]
        dtype = out_dtype if target is None else dtype_like(target)
        shared = small.take(spec, inputs, coeffs, dtype, target)
        result[name] = merge_one(call, spec, inputs, coeffs, dtype, target) if shared is None else shared
    small.flush()
    return result


def _check_out(out: Any, out_dtype: Any) -> None:
    if out is None:
        return
    are_mappings([out], "out")
    if out_dtype is not None:
        raise ArgumentError(
            "out has dtypes of its own",
            code="out_dtype",
            expected="out_dtype=None beside out",
            got=repr(out_dtype),
        )


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
class _Sources:
    """The state dicts of a merge."""

    models: Sequence[Mapping[str, Any]]
    base: Mapping[str, Any] | None
    companions: Sequence[Mapping[str, Any]]

    def read(self, name: str) -> Entry:
        """The entry called `name`."""
        base = None if self.base is None else self.base[name]
        return Entry(name, [m[name] for m in self.models], base, [c[name] for c in self.companions])


def _inputs(call: Call, entry: Entry) -> Inputs:
    return call.inputs(entry.models, entry.base, entry.companions, entry.name)


def _resolve_model(call: Call, sources: _Sources, order: Sequence[str]) -> tuple[dict[str, Spec], Coeffs]:
    """The coefficients of a model scope, and the spec of every float tensor in it. Reads each tensor once per pass."""
    specs: list[Spec] = []
    backend: Backend | None = None
    for name in sorted(order, key=lambda n: n.encode()):
        found = sources.read(name)
        if not found.is_float:
            continue
        inputs = _inputs(call, found)
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
        return replace(_inputs(self.call, self.sources.read(self.names[i])), compute=self.compute)
