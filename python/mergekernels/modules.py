"""Merging live modules: `merge_modules`."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from ._entries import common_buffer
from ._methods.arguments import bind
from ._methods.modifiers import Then, blocks_of
from ._module_tensors import Named, is_dtensor, refuse_overlap, same_module, tensors_of, under_names_of
from ._outputs import into
from .errors import ArgumentError
from .matrices import is_matrix_method
from .merging import Call, merge_one
from .state_dicts import merge_state_dicts

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["merge_modules"]


def merge_modules(
    models: Sequence[nn.Module],
    method: str,
    *,
    base: nn.Module | None = None,
    out: nn.Module | None = None,
    weights: Any = None,
    seed: int = 0,
    dialect: str = "default",
    nan: Literal["error", "propagate"] = "error",
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
    threads: int | None = None,
    then: Then = (),
    report: MutableMapping[str, Any] | None = None,
    **params: Any,
) -> nn.Module:
    """Merge live modules of one architecture into a new one, or into one of them.

    Parameters
    ----------
    models : 1 to 64 modules with the same names and shapes; base : their common base. None of them is changed unless
        it is `out`. Wrappers (DataParallel, DistributedDataParallel, torch.compile) are looked through.
    method : a name from `mergekernels.methods()`.
    out : the module whose parameters and buffers are overwritten, one of the inputs or another one; each keeps its
        dtype and device. Everything but the values is checked before the first write; after a DataError some tensors
        are written. Default: a new module.
    out_dtype : of a new module's floats, default the promoted dtype of the inputs, name by name.
    The other parameters are those of `mergekernels.merge_state_dicts`; what accompanies the models (importance=,
        gram=) may be modules or mappings.

    Parameters and persistent buffers are merged as `merge_state_dicts` merges a state dict: integer buffers are copied
    where they are equal, else the base's are taken with a warning, without a base that is an error. Buffers that no
    state dict holds (`persistent=False`), hooks, configs and the training mode are those of the new module's pattern:
    the base, without one the first model. Tied parameters are merged once, under their first name, and stay tied;
    inputs that are not tied where the result is must have equal values there. Tensors that share memory in other ways
    (a transposed view) become separate in a new module; in place they are refused. A model may lie on several devices,
    and each model on others: tensors are computed, and end, where the pattern's (or `out`'s) lie.

    DTensor parameters must be spread alike in all inputs. Each process merges its shards with the bits of the unsharded
    call; methods that sum over a tensor or rank rows gather one parameter at a time. Methods over matrices and scope
    "model" are refused.

    Returns
    -------
    The new module (with `requires_grad` as in the pattern), or `out`. No gradient flows.

    Raises
    ------
    ArgumentError, InputError, PlanError : meta, quantised or uninitialised tensors, names or shapes that differ, ties
        that do not hold, memory that overlaps, placements. DataError, BackendError : as `merge`. All name the tensor.
    """
    from torch import nn

    if isinstance(models, (nn.Module, Mapping)) or not isinstance(models, Iterable):
        raise ArgumentError("the models are not a list of modules", code="models.type", got=type(models).__name__)
    read = [tensors_of(m, f"model {i}") for i, m in enumerate(models)]
    if not read:
        raise ArgumentError("a merge takes 1 to 64 models", code="models.count", got="0")
    common = None if base is None else tensors_of(base, "the base")
    target = None if out is None else tensors_of(out, "out")
    if target is not None and out_dtype is not None:
        raise ArgumentError(
            "out has dtypes of its own", code="out_dtype", expected="out_dtype=None beside out", got=repr(out_dtype)
        )
    pattern = target or common or read[0]
    if target is None and any(type(part).__name__.startswith("FSDP") for part in pattern.module.modules()):
        raise ArgumentError(
            "a module of fully_shard cannot be copied",
            code="module.fsdp2",
            expected="out=, a module sharded in the same way",
            got="out=None",
        )
    for given in [*read, *([] if common is None else [common])]:
        same_module(pattern, given)
    for name, companions in params.items():
        if isinstance(companions, (list, tuple)) and any(isinstance(c, nn.Module) for c in companions):
            params[name] = [_companion(pattern, c, f"{name} {i}") for i, c in enumerate(companions)]
    inputs = [_Placed(pattern, under_names_of(pattern, m)) for m in read]
    origin = None if common is None else _Placed(pattern, under_names_of(pattern, common))
    if target is not None:
        refuse_overlap(target, [*read, *([] if common is None else [common])])
    outs = None if target is None else {name: t.detach() for name, t in pattern.tensors.items()}
    options = dict(weights=weights, seed=seed, dialect=dialect, nan=nan, backend=backend, threads=threads, then=then)
    everything = [pattern, *read, *([] if common is None else [common])]
    if any(is_dtensor(t) for m in everything for t in m.tensors.values()):
        merged = _merge_spread(inputs, method, origin, outs, out_dtype, options, params)
    else:
        for name, value in params.items():
            if isinstance(value, (list, tuple)) and value and all(isinstance(v, Mapping) for v in value):
                params[name] = [_Placed(pattern, v) for v in value]
        merged = merge_state_dicts(
            inputs, method, base=origin, out_dtype=out_dtype, report=report, out=outs, **options, **params
        )
    if target is None:
        return _renewed(pattern, merged)
    _mark_written(target)
    assert out is not None
    return out


class _Placed(Mapping[str, Any]):
    """Tensors of one module under the pattern's names, each where the pattern's lies; moved when they are asked for."""

    def __init__(self, pattern: Named, tensors: Mapping[str, Any]) -> None:
        self._pattern = pattern
        self._tensors = tensors

    def __getitem__(self, name: str) -> Any:
        tensor = self._tensors[name]
        if is_dtensor(tensor) or name not in self._pattern.tensors or not hasattr(tensor, "detach"):
            return tensor
        return tensor.detach().to(self._pattern.tensors[name].device)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _companion(pattern: Named, given: Any, label: str) -> Any:
    from torch import nn

    return under_names_of(pattern, tensors_of(given, label)) if isinstance(given, nn.Module) else given


def _merge_spread(
    models: Sequence[_Placed],
    method: str,
    base: _Placed | None,
    outs: Mapping[str, Any] | None,
    out_dtype: torch.dtype | None,
    options: Mapping[str, Any],
    params: Mapping[str, Any],
) -> dict[str, Any]:
    """Merged tensors of modules some of whose parameters are DTensors."""
    from ._dtensors import check_placements, merge_dtensors

    order = list(models[0])
    spread = [n for n in order if any(is_dtensor(m[n]) for m in [*models, *([] if base is None else [base])])]
    _refuse_whole(is_matrix_method(method), f"{method} decomposes whole matrices", spread)
    rest = {k: v for k, v in options.items() if k != "weights"}
    call = Call.of(method, params, options["weights"], shard_dim=0, **rest)
    call.check_arity(len(models), base is not None)
    bound = bind(call.method, call.arguments, len(models), call.dialect, call.nan)
    _refuse_whole(call.method.scope(bound, call.dialect) == "model", "scope 'model' counts over all tensors", spread)
    call = replace(call, blocks=blocks_of(bound, order))
    ends = {label: m for label, m in (("the base", base), ("out", outs)) if m is not None}
    labelled = {f"model {i}": m for i, m in enumerate(models)}
    labelled |= {f"{call.method.info.companions} {i}": m for i, m in enumerate(call.companions)}
    for name in spread:
        check_placements({label: m[name] for label, m in {**labelled, **ends}.items()}, name)
    merged: dict[str, Any] = {}
    for name in order:
        values, start = [m[name] for m in models], None if base is None else base[name]
        companions = [c[name] for c in call.companions]
        out = None if outs is None else outs[name]
        if name in spread:
            merged[name] = merge_dtensors(call, name, values, start, companions, out_dtype, out)
        elif values[0].is_floating_point():
            inputs = call.inputs(values, start, companions, name)
            dtype = out_dtype if out is None else out.dtype
            merged[name] = merge_one(call, call.spec(inputs), inputs, None, dtype, out)
        else:
            merged[name] = into(outs, name, common_buffer(values, start, name))
    return merged


def _refuse_whole(refused: bool, why: str, names: Sequence[str]) -> None:
    if refused:
        raise ArgumentError(
            f"{why}, and the parameter is a DTensor",
            code="dtensor.method",
            tensor=names[0],
            expected="a method that goes element by element",
            hint="Merge full state dicts (get_model_state_dict with full_state_dict=True) with merge_state_dicts.",
        )


def _renewed(pattern: Named, merged: Mapping[str, torch.Tensor]) -> nn.Module:
    """A copy of the pattern's module with other tensors, none of its own being copied."""
    import torch
    from torch import nn

    memo: dict[int, Any] = {}
    for prefix, part in pattern.module.named_modules():
        dot = f"{prefix}." if prefix else ""
        for local, tensor in [*part._parameters.items(), *part._buffers.items()]:
            name = dot + local
            if tensor is None or name not in pattern.first or id(tensor) in memo:
                continue
            new = merged[pattern.first[name]]
            if isinstance(tensor, nn.Parameter):
                fresh = torch.nn.Parameter(new, tensor.requires_grad)
                fresh.__dict__.update(tensor.__dict__)
                new = fresh
            memo[id(tensor)] = new
    return copy.deepcopy(pattern.module, memo)


def _mark_written(target: Named) -> None:
    """Tell autograd that the values changed, so that a graph over the old ones refuses to run backwards."""
    import torch

    for name in target.first:
        tensor = target[name]
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)
