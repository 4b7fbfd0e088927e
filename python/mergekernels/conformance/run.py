"""The cases of a kit, merged by this package."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .._backends.dispatch import Backend, pick
from .._methods import get, names
from .._methods.matrix_table import get_matrix
from .._methods.protocol import MethodInfo, Round
from .._rounds import run_reduce
from ..merging import Call
from ..ops.inputs import Inputs
from ..ops.stream import run_program
from ..ops.sums import QUANTITIES, Sums
from ..state_dicts import merge_state_dicts
from .kit import Case, Kit

if TYPE_CHECKING:
    import torch

__all__ = ["outputs_of"]


def outputs_of(kit: Kit, case: Case, backend: str | None = None) -> dict[str, torch.Tensor]:
    """The tensors of a case, in the dtype of its inputs; of merged adapters the deltas.

    Where the tool drew random masks, these are used instead of our own: a model's entries that its mask drops are set
    to the base's, and everything else runs as ever.

    Raises
    ------
    MergeError : the method refuses the case, or the backend cannot run it.
    """
    expected, masks = kit.expected(case)
    if case.takes == "adapters":
        return _adapters(kit, case)
    if case.method not in names():
        backend = None  # methods over matrices run on torch
    base = None if case.base is None else _only(kit.inputs[case.base], expected, case.dtype)
    models = [_only(kit.inputs[m], expected, case.dtype) for m in case.models]
    method = get(case.method) if case.method in names() else get_matrix(case.method, "models")
    arguments = _arguments(method.info, case)
    if method.info.companions:
        weights = [_only(kit.inputs[f"importance_{m}"], expected, case.dtype) for m in case.models]
        arguments[method.info.companions] = weights
    if not masks:
        return merge_state_dicts(models, case.method, base=base, dialect=case.dialect, backend=backend, **arguments)
    assert base is not None and case.method in names()
    call = Call.of(case.method, arguments, None, case.dialect, "error", 0, backend, None, 0)
    result = {}
    for name in expected:
        drawn = [masks[m][name].bool() if name in masks.get(m, {}) else None for m in case.models]
        whole = call.inputs([m[name] for m in models], base[name], (), name)
        kept = [
            m[name] if mask is None else m[name].where(mask, base[name]) for m, mask in zip(models, drawn, strict=True)
        ]
        result[name] = _with_masks(call, whole, call.inputs(kept, base[name], (), name))
    return result


def _arguments(info: MethodInfo, case: Case) -> dict[str, Any]:
    keywords = {p.name: p.keyword for p in info.params}
    return {keywords.get(name, name): value for name, value in case.params.items()}


def _adapters(kit: Kit, case: Case) -> dict[str, torch.Tensor]:
    """The deltas of the merged adapter by module, in the shape of the weights."""
    from ..adapters.merge import merge_adapters

    arguments = _arguments(get_matrix(case.method, "adapters").info, case)
    given = [(kit.inputs[m], kit.adapters[m]) for m in case.models]
    merged = merge_adapters(given, case.method, rank=case.rank, dialect=case.dialect, **arguments)
    return {module: merged.delta(module) for module in merged.modules}


def _only(tensors: Mapping[str, torch.Tensor], names: Mapping[str, Any], dtype: str) -> dict[str, torch.Tensor]:
    import torch

    return {name: tensors[name].to(getattr(torch, dtype)) for name in names}


def _with_masks(call: Call, whole: Inputs, kept: Inputs) -> torch.Tensor:
    """The merge of one tensor whose entries are kept as in `kept`; what is dropped there equals the base."""
    import torch

    spec = call.spec(whole)
    _, backend = pick("stream", whole.all_views, call.backend)
    state = call.method.start(spec)
    while isinstance(state, Round):
        assert state.reduce is not None and state.coeffs is not None
        program = call.method.apply(spec, state.coeffs)
        plain = replace(program, keep=(None,) * spec.num_models, rows=None)
        sums = _sums(state, whole, kept, backend, call.threads, plain)
        state = call.method.resolve(spec, state, sums, spec.n)
    program = replace(call.method.apply(spec, state), keep=(None,) * spec.num_models, rows=None)
    out = torch.empty(spec.shape)
    run_program(program, kept, [out], backend, call.threads, call.nan)
    return out


def _sums(state: Round, whole: Inputs, kept: Inputs, backend: Backend, threads: int, plain: Any) -> Sums:
    """The sums of a round: those of all entries from `whole`, those of kept ones from `kept`."""
    assert state.reduce is not None
    before, after = (run_reduce(plain, state.reduce, inputs, backend, threads) for inputs in (whole, kept))
    found = []
    slot = 0
    for name in state.reduce.quantities:
        count = 1 if name in QUANTITIES[-2:] else whole.num_models
        found += list((before if name in ("abs", "squares") else after)[slot : slot + count])
        slot += count
    return Sums((tuple(found),))
